// How a `ternary` spec is made, for the encoder here and for the one on a device.
#pragma once

#include <array>
#include <span>

#include "formats/ternary.h"

namespace qmoe {

// How many symbols of each class matrices hold, of whole rows.
struct TernaryCensus {
    std::array<uint64_t, kClasses> count{};
    uint64_t symbols = 0, weights = 0;
};

// The fields of levels, with all others zero. E_SHAPE for another number of levels than 1 or 2 a row, E_VALUE for one that
// is not a finite bfloat16.
Status ternary_describe_levels(std::span<const MatrixInput* const> inputs, SpecBytes& spec);

// All other fields: slots, and how matrices (N, K) are cut.
void ternary_describe_code(const TernaryCensus& census, uint64_t rows, uint64_t cols, SpecBytes& spec);

// The levels of a matrix whose bytes begin at `out`, where there are zeros.
void ternary_put_levels(const MatrixInput& in, const TernaryLayout& layout, uint8_t* out) noexcept;

}  // namespace qmoe
