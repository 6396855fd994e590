// Division by a number that the host knows.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace qmoe::cuda {

// Of numbers below 2^31.
struct Divisor {
    uint32_t by = 1, magic = 0xffffffff;

    Divisor() = default;
    explicit Divisor(uint64_t divisor) noexcept
        : by(static_cast<uint32_t>(divisor)), magic(by == 0 ? 0 : 0xffffffff / by) {}
    __device__ __forceinline__ uint32_t divide(uint32_t n) const {
        const uint32_t low = __umulhi(n, magic);  // right, or one too small
        return low + (n - low * by >= by ? 1 : 0);
    }
};

// The same, where the compiler knows the number.
template <uint32_t kBy>
struct FixedDivisor {
    static constexpr uint32_t by = kBy;
    static __device__ __forceinline__ uint32_t divide(uint32_t n) { return n / kBy; }
};

}  // namespace qmoe::cuda
