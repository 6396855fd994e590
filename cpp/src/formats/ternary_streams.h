// Ternary matrices as the products of GPUs read them: nonzeros alone, each found by its distance from the one before it.
// Made once, from the stored format, where a matrix goes to a device.
//
// Columns lie on *slots*. Every D-th slot, D = 2^gap_bits, is empty and reads as zero; the others are the columns in order:
// column k is slot k + k / (D - 1). Behind the last column `kTail` more are empty.
//
// A *symbol* of gap_bits + 1 bits goes 1 to D slots ahead, [slots - 1][minus], and adds what is there, or subtracts it.
// Among D slots one is empty, so that a longer way is made of steps from empty slot to empty slot, which add nothing; no
// symbol is special. As many symbols as fit make a *quad* of four words, from the highest bit of the first word downwards;
// a row's last quad is filled up with symbols that end on empty slots.
//
// The quads of a row, Q of them, are divided among S = `segments` lanes of a warp: segment s has quads s Q / S to
// (s + 1) Q / S - 1, and where it begins (one behind the slot before) is stored. 32 / S rows are a *group*, a warp's work.
// Each window of 128 rows is sorted by their quads, most first, so that those of a group have about equally many.
//
//   rows    u32 by row in that order, up to a whole group: the matrix's row | Q << 20; rows that are not there have Q = 0
//   levels  u32 by row: bfloat16 of a plus | of a minus << 16
//   starts  u16 by row and segment
//   bases   u32 by group, and one more: its first quad
//   quads   of a group: quad k of its row r is number k * 32 / S + r; at a multiple of 16 bytes
//
// For random trits, 88.5 % of them zero, this takes 0.72 bits per weight and what rounding up to quads adds, where the
// entropy is 0.63 and the stored format takes 0.65.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "formats/ternary.h"
#include "qmoe/cuda_library.h"

namespace qmoe {

struct TernaryStreams {
    static constexpr uint32_t kQuadBits = 128, kRowBits = 20, kWindow = 128;
    static constexpr uint32_t kMinGapBits = 3, kMaxGapBits = 7;

    uint64_t rows = 0, cols = 0;
    uint32_t gap_bits = 0, segments = 0;
    uint64_t group_rows = 0, groups = 0;
    uint64_t levels_at = 0, starts_at = 0, bases_at = 0, quads_at = 0;  // bytes from the matrix's beginning

    explicit TernaryStreams(const cuda::StreamsShape& shape) noexcept
        : rows(shape.rows), cols(shape.cols), gap_bits(shape.gap_bits), segments(shape.segments) {
        group_rows = kLanes / segments;
        groups = ceil_div(rows, group_rows);
        levels_at = padded_rows() * 4;
        starts_at = levels_at + padded_rows() * 4;
        bases_at = ceil_div(starts_at + padded_rows() * segments * 2, 4) * 4;
        quads_at = ceil_div(bases_at + (groups + 1) * 4, 16) * 16;
    }

    uint64_t padded_rows() const noexcept { return groups * group_rows; }
    QMOE_INLINE uint32_t step() const noexcept { return 1u << gap_bits; }                 // D
    QMOE_INLINE uint32_t symbols() const noexcept { return kQuadBits / (gap_bits + 1); }  // of a quad
    // Slots of the columns, and with those behind them: D to get there, and one for every symbol of a quad.
    QMOE_INLINE uint32_t slots() const noexcept { return slot(static_cast<uint32_t>(cols) - 1) + 1; }
    QMOE_INLINE uint32_t all_slots() const noexcept { return slots() + step() + symbols(); }
    QMOE_INLINE uint32_t slot(uint32_t col) const noexcept { return col + col / (step() - 1); }
    QMOE_INLINE bool is_empty(uint32_t s) const noexcept { return s >= slots() || s % step() == step() - 1; }
    QMOE_INLINE uint32_t col(uint32_t s) const noexcept { return s - s / step(); }  // of a slot that is not empty
};

// The readable decoder: trits (N, K) as -1, 0, 1, and the levels (N, 2) [low, high]. `bytes` are from the encoder.
void ternary_streams_decode(const TernaryStreams& layout, std::span<const uint8_t> bytes, int8_t* trits,
                            float* levels) noexcept;

}  // namespace qmoe
