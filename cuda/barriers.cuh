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
    __device__ __forceinline__ bool is_over(uint32_t parity) const {
        uint32_t over;
        asm volatile(
            "{\n"
            ".reg .pred over;\n"
            "mbarrier.test_wait.parity.shared.b64 over, [%1], %2;\n"
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

// Barrier `id`, 1 to 15, of `count` threads, whole warps.
template <int id, int count>
__device__ __forceinline__ void sync_threads() {
    asm volatile("bar.sync %0, %1;" ::"n"(id), "n"(count) : "memory");
}

// Copies from global to shared memory that `threads` threads of a block ask for together.
template <uint32_t threads>
struct SharedCopy {
#if __CUDA_ARCH__ >= 900
    static constexpr uint32_t kArrivals = 1;
#else
    static constexpr uint32_t kArrivals = threads;
#endif
    static __device__ __forceinline__ bool takes_part(uint32_t thread) {
        return kArrivals > 1 || thread == 0;
    }
    // By all that take part: `bytes`, a multiple of 16, both ends aligned so. `full`, made for kArrivals, is over when they
    // have come.
    static __device__ __forceinline__ void begin(Barrier& full, uint8_t* to, const uint8_t* from, uint32_t bytes,
                                                 uint32_t thread) {
#if __CUDA_ARCH__ >= 900
        const uint32_t barrier = shared_address(&full);
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         shared_address(to)),
                     "l"(from), "r"(bytes), "r"(barrier)
                     : "memory");
#else
        for (uint32_t i = thread * 16; i < bytes; i += threads * 16)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to + i)), "l"(from + i)
                         : "memory");
        asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(&full)) : "memory");
#endif
    }
};

// Asks for what is there to come to the second-level cache.
__device__ __forceinline__ void bring_near(const void* from) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// What this thread has written, to global memory for copies from there or to shared memory where copies go, comes before
// copies that begin after the next barrier.
__device__ __forceinline__ void publish_to_copies() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async;" ::: "memory");
#endif
}

}  // namespace qmoe::cuda
