// The kernels behind qmoe/gptq.h, compiled once per instruction set from kernels.inc. Each does some rows of one matrix
// by itself.
#pragma once

#include <cstdint>

#include "qmoe/gptq.h"

namespace qmoe {

struct GptqKernels {
    // Rows [first, first + count) of matrix `expert`.
    void (*round_block)(const RoundBlock& a, uint64_t expert, uint64_t first, uint64_t count) noexcept;
    // The same; `room` holds choose_room(columns) floats.
    void (*choose_grid)(const ChooseGrid& a, uint64_t expert, uint64_t first, uint64_t count, float* room) noexcept;
    // The same; counts (3) are added to instead of a.counts.
    void (*ternary_sums)(const TernarySums& a, uint64_t expert, uint64_t first, uint64_t count,
                         uint32_t* counts) noexcept;
};

// A group of columns of as many rows as a vector has lanes, of at most 16.
inline constexpr uint64_t choose_room(uint64_t columns) noexcept {
    return columns * 16;
}

}  // namespace qmoe
