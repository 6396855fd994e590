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
    // As soon as this thread's copies until here have come.
    __device__ __forceinline__ void arrive_after_copies() {
        asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(this)) : "memory");
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

// 16 bytes from global to shared memory, both aligned so; arrive_after_copies() tells when they have come.
__device__ __forceinline__ void copy_16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

}  // namespace qmoe::cuda
