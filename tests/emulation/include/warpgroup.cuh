// cuda/warpgroup.cuh, emulated: a device with clusters, but without products of four warps.
#pragma once

#include <stdexcept>

#include "barriers.cuh"
#include "common.cuh"

namespace qmoe::cuda {

inline constexpr bool kHasWarpgroups = false, kHasClusters = true;

inline uint64_t swizzled_operand(const uint8_t*) {
    return 0;
}
inline void begin_products() {}
inline void commit_products() {}
template <int kBut>
void wait_for_products() {}
template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}
template <typename T, int kN>
void multiply(float (&)[kN / 8][4], const uint32_t (&)[4], uint64_t) {
    throw std::logic_error("emulation: no products of four warps");
}

}  // namespace qmoe::cuda
