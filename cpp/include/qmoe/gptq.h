// The inner loops of calibrated quantization on the CPU; libqmoe_cuda (qmoe/cuda.h) does the same, by the same arguments,
// on a GPU. Their readable twins in torch are python/qmoe_core/quantize/feedback.py and grids.py.
//
// Deterministic: a result depends neither on `threads` nor on the instruction set. Raw pointers to memory of the caller;
// refused are shapes, numbers that cannot be, and a QMOE_FORCE_ISA that this machine or build does not have.
#pragma once

#include <cstdint>

#include "qmoe/status.h"

namespace qmoe {

inline constexpr uint32_t kMaxBlockColumns = 128;

// One block of columns of a stack of E matrices (N, K), rounded with feedback. weight, residual and codes point at the
// block's first column, and share their strides (in elements; columns are neighbours).
struct RoundBlock {
    uint32_t experts, rows, columns;  // columns: of the block, at most kMaxBlockColumns
    uint64_t expert_stride, row_stride;
    const float* weight;
    float* residual;            // weight - quantized: read, then replaced
    uint8_t* codes;             // written: uint8 codes, or int8 trits
    const float* target;        // (E, N, columns)
    const float* coefficients;  // what column k takes of a change of column j < k: row j, column k
    uint64_t coefficient_expert_stride, coefficient_row_stride, coefficient_column_stride;
    const float* precision;  // (E, columns): weight of a squared error; ternary only
    uint64_t precision_stride;
    bool ternary;
    // int: scale and zero (E, N, groups), column c of the matrix in group c / width; codes 0 to top. `first`: the
    // block's first column.
    const float *scale, *zero;
    uint32_t groups, width, top, first;
    // ternary: levels and the price of a bit (E, N), bits of the codes -1, 0, 1 (E, 3).
    const float *low, *high, *price, *bits;
};

// The grid of one group of columns of every row with the least weighted error, among `steps` widths.
struct ChooseGrid {
    uint32_t experts, rows, columns;  // columns: of the group, as many as a row has
    const float* target;              // row r of all E * N at target + r * target_row_stride
    uint64_t target_row_stride;
    const float* precision;  // (E, columns)
    uint64_t precision_stride;
    float *scale, *zero;  // (E, N, groups), of which `group` is written
    uint32_t groups, group, top, steps;
    uint32_t scale_type;  // 1 float16, 2 bfloat16, 3 float32
    bool zero_point, half_step;
};

// Ternary codes of whole matrices without feedback, and what levels and bits are fitted from.
struct TernarySums {
    uint32_t experts, rows, columns;
    const float *weight, *precision;         // (E, N, K), (E, K)
    const float *low, *high, *price, *bits;  // as in RoundBlock
    float* sums;       // (E, N, 4), written: low's sum of precision * weight and of precision, then high's
    uint32_t* counts;  // (E, 3), added to: how many codes are -1, 0, 1
};

Status round_block(const RoundBlock& block, int threads) noexcept;
Status choose_grid(const ChooseGrid& grid, int threads) noexcept;
Status ternary_sums(const TernarySums& sums, int threads) noexcept;

}  // namespace qmoe
