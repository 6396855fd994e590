// Copies from global to shared memory that a thread makes for itself, many at a time. tests/emulation has its own.
#pragma once

#include <cstdint>

namespace qmoe::cuda {

// Asks for kBytes, 4, 8 or 16, aligned to as many. What is copied may be read by this thread when wait_for_copies says so.
template <int kBytes>
__device__ __forceinline__ void copy_async(uint8_t* shared, const uint8_t* global) {
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    if constexpr (kBytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(kBytes) : "memory");
}

// Ends a group of copies, which may be of none.
__device__ __forceinline__ void end_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Returns when all groups but the last kLater are there.
template <int kLater>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
}

}  // namespace qmoe::cuda
