// Round-to-nearest onto the uniform grid of the `int` format: the data-free quantizer fast enough to belong to the
// core.
#pragma once

#include <cstdint>
#include <span>

#include "qmoe/format.h"
#include "qmoe/status.h"

namespace qmoe {

// weight (rows, cols) float32, row-major -> codes (rows, cols), scales (rows, G) already rounded to `scale_type`, and
// with `zeros` not empty zero points (rows, G). G = ceil(cols / group), group 0 = the whole row.
//
// With zero points: the grid spans [min(0, min w), max(0, max w)], zero = round(-min / scale). Symmetric: zero =
// 2^(bits-1) and the weight of largest magnitude sits on the grid's longer side (code 0), so the scale is negative
// where that weight is positive. Codes are round(w / scale + zero) with the rounded scale, ties to even.
//
// With `half_step` every zero lies halfway between two codes. With zero points: as above, stored zero = round(-min /
// scale - 1/2), zero = stored + 1/2. Symmetric: zero = 2^(bits-1) - 1/2, scale = 2 max |w| / (2^bits - 1). No code is
// then worth exactly 0: a group that rounds to nothing but zeros gets a scale of 0.
//
// E_VALUE: a weight is NaN or infinite, or a scale overflows.
Status quantize_rtn(const float* weight, uint64_t rows, uint64_t cols, uint32_t bits, uint32_t group,
                    ScaleType scale_type, bool half_step, uint8_t* codes, float* scales,
                    std::span<uint8_t> zeros) noexcept;

}  // namespace qmoe
