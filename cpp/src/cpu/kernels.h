// The inner loops of the CPU path, compiled once per instruction set from kernels.inc and chosen once at start.
#pragma once

#include <cstdint>

#include "formats/int.h"

namespace qmoe {

inline constexpr uint64_t kPadCols = 32;  // float rows are zero-filled to a multiple of this

struct Kernels {
    const char* isa;
    // sums[g] = sum of x (padded to kPadCols) over the g-th group of `group` columns.
    void (*group_sums)(const float* x, uint64_t cols, uint64_t group, float* sums) noexcept;
    // y[0 .. count) = rows [first, first + count) of an int matrix times x (padded) with its group sums.
    void (*int_dot)(const IntLayout& layout, const uint8_t* data, uint64_t first, uint64_t count, const float* x,
                    const float* sums, float* y) noexcept;
    // One row of an int matrix to floats; the padding becomes zero.
    void (*int_row)(const IntLayout& layout, const uint8_t* data, uint64_t row, float* out) noexcept;
    // sums[0] = sum of x[k] * t[k], sums[1] = sum of x[k] * |t[k]|, k < cols; t in {-1, 0, 1}.
    void (*trit_dot)(const int8_t* t, const float* x, uint64_t cols, float sums[2]) noexcept;
    // out[k] = low, 0 or high by t[k]; the padding becomes zero.
    void (*trit_row)(const int8_t* t, uint64_t cols, float low, float high, float* out) noexcept;
    // y[t * ldy + n] = sum over k of w[n * padded + k] * x[t * padded + k], for `rows` n and `tokens` t.
    void (*gemm)(const float* w, uint64_t rows, const float* x, uint64_t tokens, uint64_t padded, float* y,
                 uint64_t ldy) noexcept;
};

}  // namespace qmoe
