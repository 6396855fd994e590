// What threads of a block wait for when not all of them do the same: each other, and copies. tests/emulation has its own.
#pragma once

#include <cstdint>

namespace qmoe::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// In shared memory. A phase of it is over when as many threads have arrived as it was made for; what they did before can
// then be seen by those that have waited. Phases have parities 0, 1, 0, ...; of the phase before the first one it is 1.
struct Barrier {
    uint64_t state;

    // By one thread, before all others are told of it.
    __device__ __forceinline__ void init(uint32_t arrivals) {
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals));
    }
    __device__ __forceinline__ void arrive() {
        asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
    }
    // At the barrier that is where this one is, of block of threads `rank` of the cluster.
    __device__ __forceinline__ void arrive_at(uint32_t rank) {
#if __CUDA_ARCH__ >= 900
        asm volatile(
            "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
            "mbarrier.arrive.shared::cluster.b64 _, [there];\n}\n" ::"r"(shared_address(this)),
            "r"(rank)
            : "memory");
#else
        __trap();
#endif
    }
    // As so many threads, of a phase that is over only when copies have brought so many bytes, too.
    __device__ __forceinline__ void arrive_expecting(uint32_t threads, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
        asm volatile("mbarrier.expect_tx.relaxed.cta.shared.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                     : "memory");
        asm volatile("mbarrier.arrive.shared.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(threads) : "memory");
#else
        __trap();
#endif
    }
    // Waits for it, but not for long.
    __device__ __forceinline__ bool is_over(uint32_t parity) const {
        uint32_t over;
        asm volatile(
            "{\n"
            ".reg .pred over;\n"
#if __CUDA_ARCH__ >= 900
            "mbarrier.try_wait.parity.shared.b64 over, [%1], %2;\n"
#else
            "mbarrier.test_wait.parity.shared.b64 over, [%1], %2;\n"
#endif
            "selp.u32 %0, 1, 0, over;\n"
            "}\n"
            : "=r"(over)
            : "r"(shared_address(this)), "r"(parity)
            : "memory");
        return over != 0;
    }
    __device__ __forceinline__ void wait(uint32_t parity) const {
        while (!is_over(parity)) {}
    }
};

// The same number, of which the compiler does not know where it comes from: it stays in a register. Whole warps call.
__device__ __forceinline__ uint32_t kept(uint32_t number) {
    return __shfl_sync(~0u, number, static_cast<int>(threadIdx.x % 32));
}

// Barrier `id`, 1 to 15, of `count` threads, whole warps.
template <int count>
__device__ __forceinline__ void sync_threads(uint32_t id) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(count) : "memory");
}

// All threads of a cluster.
__device__ __forceinline__ void sync_cluster() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __trap();
#endif
}

// Leaves `value` in global memory behind what this thread has written, or has seen at a barrier that others had.
__device__ __forceinline__ void raise_flag(uint64_t* flag, uint64_t value) {
    asm volatile("fence.acq_rel.gpu;\nst.relaxed.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}
// Waits until it is there, whoever writes it; what was before it can then be seen.
__device__ __forceinline__ void wait_for_flag(const uint64_t* flag, uint64_t value) {
    uint64_t found;
    do asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(found) : "l"(flag) : "memory");
    while (found != value);
}

// Arrivals that a barrier is made for which copy_pieces() tells of what has come.
#if __CUDA_ARCH__ >= 900
inline constexpr uint32_t kCopyArrivals = 1;
#else
inline constexpr uint32_t kCopyArrivals = 32;
#endif

// By a warp: brings `count` pieces of `bytes`, a multiple of 16, from global to shared memory, piece i from `from + i *
// stride` to `to + i * bytes`; in place of those that are not `there`, the last one that is. `full` is over when all have
// come. At most 32 pieces; all are aligned to 16 bytes.
__device__ __forceinline__ void copy_pieces(Barrier& full, uint8_t* to, const uint8_t* from, uint64_t stride,
                                            uint32_t bytes, uint32_t count, uint32_t there) {
    const uint32_t lane = threadIdx.x % 32;
#if __CUDA_ARCH__ >= 900
    const uint32_t barrier = shared_address(&full);
    if (lane == 0)
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(count * bytes) : "memory");
    __syncwarp();
    if (lane < count)
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         shared_address(to + lane * bytes)),
                     "l"(from + min(lane, there - 1) * stride), "r"(bytes), "r"(barrier)
                     : "memory");
#else
    for (uint32_t i = 0; i < count; ++i)
        for (uint32_t at = lane * 16; at < bytes; at += 32 * 16)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to + i * bytes + at)),
                         "l"(from + min(i, there - 1) * stride + at)
                         : "memory");
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(&full)) : "memory");
#endif
}

// If `wanted`, begins to bring 16 bytes from global to shared memory; zeros where they are not `there`, wherever `from` is.
__device__ __forceinline__ void copy_16_if(bool wanted, uint8_t* to, const void* from, bool there) {
    asm volatile(
        "{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %3, 0;\n"
        "@wanted cp.async.cg.shared.global [%0], [%1], 16, %2;\n}\n" ::"r"(shared_address(to)),
        "l"(from), "r"(there ? 16 : 0), "r"(wanted ? 1 : 0)
        : "memory");
}
// Waits for all that this thread has asked for by copy_16_if().
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}
// This thread arrives when all that it has asked for by copy_16_if() has come.
__device__ __forceinline__ void arrive_with_copies(Barrier& barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Barriers that this thread has made are there for copies, and for other blocks of threads of the cluster behind
// sync_cluster().
__device__ __forceinline__ void publish_barriers() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// What this thread has written to shared memory, or has seen at a barrier that others had, also by copy_16_if(), is there for
// products of warpgroups that begin behind this.
__device__ __forceinline__ void publish_to_async() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// The same for global memory, before and behind what all threads wait at, and for copies of boxes.
__device__ __forceinline__ void publish_memory_to_async() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}

}  // namespace qmoe::cuda
