// The run-time layout of a matrix, and the kernels that read it.
//
// Storage keeps a row's codes together; a kernel wants sixteen rows side by side. A *panel* is 16 rows. Its codes come
// in lines of 64 bytes: byte 4 r + j of a line belongs to row r and to column j of four neighbouring columns (a *quad*).
// That is the operand order of VPDPBUSD (a lane per row, four products a lane), of SDOT, and of an AMX B tile (a line
// per tile row), so one layout serves every instruction set. A byte holds the codes of several quads:
//
//              bits 7-6        5-4        3-2        1-0       columns of a step
//   8 bits    [            quad 0                        ]     4
//   4 bits    [    quad 1           ][    quad 0         ]     8
//   2 bits    [quad 3    ][quad 2   ][quad 1  ][quad 0   ]     16
//   3 bits    a step is three lines, a, b, c, and 32 columns:
//             a: [6, bits 1-0][quad 1, 3 bits][quad 0, 3 bits]
//             b: [7, bits 1-0][quad 3        ][quad 2        ]
//             c: [7, bit 2][6, bit 2][quad 5 ][quad 4        ]
//
// Ternary matrices of two levels use the 2-bit lines with bit 0 "high" and bit 1 "low" of every code; of one level they
// are 2-bit matrices with the codes 0, 1, 2 and the zero 1.
//
// Four panels are a *unit*: 64 rows, the piece of work of a thread, and one stream of bytes, read from the first to the
// last. It holds group by group the scales of the four panels, their zeros where they are stored, and then the lines of
// the codes: a step of each panel in turn. So what is asked for ahead is always what comes next, scales and the next unit
// included, however short the rows.
#pragma once

#include <cstddef>
#include <cstdint>

#include "qmoe/checked.h"
#include "qmoe/prepacked.h"

namespace qmoe {

inline constexpr uint32_t kPanelRows = 16, kLine = 64, kUnitPanels = 4, kUnitRows = kPanelRows * kUnitPanels;
// Integer sums are turned into floats at the end of every group, and of every 128 columns of longer ones. A chunk's
// activations share one scale.
inline constexpr uint32_t kMaxChunk = 128;

// How the codes of a line become weights.
enum class Codes : uint8_t { kInt2, kInt3, kInt4, kInt8, kTrits };
inline constexpr uint32_t kCodes = 5;
// Where a group's zero comes from.
enum class Zeros : uint8_t { kConstant, kStored };
enum class Scales : uint8_t { kFloat16, kFloat32 };

// Columns and lines of one step.
constexpr uint32_t step_cols(Codes codes) noexcept {
    switch (codes) {
        case Codes::kInt3: return 32;
        case Codes::kInt4: return 8;
        case Codes::kInt8: return 4;
        default: return 16;
    }
}
constexpr uint32_t step_lines(Codes codes) noexcept {
    return codes == Codes::kInt3 ? 3 : 1;
}

// One unit of a matrix. Strides are bytes from a panel to the next, steps those from a group to the next; a panel's
// scales of a group are 16. Trits have two vectors of float32, high and low, and one group.
struct UnitView {
    const uint8_t* codes;
    uint64_t codes_stride;
    const uint8_t* scales;
    uint64_t scales_stride, scale_step;
    const uint8_t* zeros;  // one byte a row and group; null where zeros are constant
    uint64_t zeros_stride, zero_step;
    uint32_t chunks, steps, last_steps;  // steps of every chunk but the last, and of the last
    uint32_t repeat;                     // chunks of a group
    uint32_t gap;                        // bytes between the codes of two groups
    uint32_t far, near;                  // bytes ahead of the line being read: asked for into L2, into L1
    // What is unpacked after this: tiles ask for it into L2 while they multiply, when memory has nothing else to do.
    const uint8_t* coming = nullptr;
    uint64_t coming_bytes = 0;
};

// Asks for a unit's `coming` bytes, an equal share at each of so many times.
struct Coming {
    const uint8_t *at, *end;
    uint64_t lines;  // a time

    Coming(const UnitView& unit, uint64_t times) noexcept
        : at(unit.coming), end(at + unit.coming_bytes), lines(ceil_div(unit.coming_bytes, times * kLine)) {}
    void ask() noexcept {
        for (uint64_t i = 0; i < lines && at < end; ++i, at += kLine) __builtin_prefetch(at, 0, 2);
    }
};

// What a chunk's values of a token share. Stored zeros are subtracted from the sums of products as integers, before
// anything becomes a float: a weight is scale * (code - zero - offset).
struct ActivationChunk {
    float scale;
    float correction;      // -offset * scale * (sum of the values)
    int32_t negative_sum;  // -(sum of the values), which fits 16 bits
};

// Activations of some tokens, quantized: values (tokens, x_stride) int8 in [-127, 127], zero beyond the last column.
struct QuantizedView {
    const int8_t* x;
    uint64_t x_stride;
    const ActivationChunk* chunks;
    uint64_t chunk_stride;  // chunks from a token to the next
};

// y[t * y_stride + r] = the unit's row r times token t; 64 rows are written.
using UnitKernel = void (*)(const UnitView& unit, const QuantizedView& x, float* y, uint64_t y_stride) noexcept;
// The same for `tokens` tokens and the first tile_panels panels, whose codes have been unpacked to one code a byte,
// (panels, quads, 64); codes_stride counts those bytes, steps are quads.
using TileKernel = void (*)(const UnitView& unit, const QuantizedView& x, uint64_t tokens, float* y,
                            uint64_t y_stride) noexcept;
// `steps` steps of a panel's lines, as they lie in a unit, to one code a byte.
using UnpackKernel = void (*)(const uint8_t* lines, uint64_t steps, uint8_t* codes) noexcept;
// And for the first tile_panels panels as they are packed.
using PackedTileKernel = void (*)(const UnitView& unit, Codes codes, const QuantizedView& x, uint64_t tokens, float* y,
                                  uint64_t y_stride) noexcept;

struct PanelKernels {
    const char* isa;
    // Few tokens, straight from the packed lines: [codes][scales][zeros][0: one token, 1: two, 2: four].
    UnitKernel direct[kCodes][2][2][3];
    UnpackKernel unpack[kCodes];
    // Many tokens: [trits or not][scales][zeros].
    TileKernel tile[2][2][2];
    uint32_t tile_panels[2];  // [trits or not]: how many panels such a kernel takes; divides kUnitPanels
    // One row of activations: cols values to int8, chunk by chunk.
    void (*quantize)(const float* x, uint64_t cols, uint32_t chunk, float offset, int8_t* out,
                     ActivationChunk* chunks) noexcept;
    // Weights of one panel as float32, (chunk * chunks, 16), from unpacked codes.
    void (*dequantize)(const UnitView& unit, uint32_t panel, bool trits, Scales scales, float offset,
                       float* out) noexcept;
    // y[t * y_stride + r] = sum over k < cols of w[k * 16 + r] * x[t * x_stride + k], one panel.
    void (*float_tile)(const float* w, uint64_t cols, const float* x, uint64_t x_stride, uint64_t tokens, float* y,
                       uint64_t y_stride) noexcept;
    // out[i] = what the experts' activation makes of gate[i] and up[i]; up is null without a gate.
    void (*activate)(const ExpertsSpec& spec, const float* gate, const float* up, uint64_t count, float* out) noexcept;
    // In place of unpack and tile for up to so many tokens of what is not ternary: [scales][zeros].
    PackedTileKernel packed_tile[2][2] = {};
    uint64_t packed_tile_tokens = 0;
};

}  // namespace qmoe
