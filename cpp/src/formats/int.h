// Layout of the `int` format, shared by the codec and the kernels. Bit diagram: int.cpp and cpp/FORMAT.md.
#pragma once

#include <cstdint>

#include "bytes.h"
#include "half.h"
#include "qmoe/checked.h"
#include "qmoe/format.h"

namespace qmoe {

inline constexpr uint16_t kIntId = 1;
inline constexpr uint32_t kIntBlock = 32;  // codes per packed block
inline constexpr uint32_t kIntHalf = 16;   // the smallest group: half a block, all others are whole blocks or the row

// Flags of the spec.
inline constexpr uint8_t kIntZeros = 1, kIntHalfStep = 2;

QMOE_INLINE uint32_t scale_bytes(ScaleType type) noexcept {
    return type == ScaleType::kFloat32 ? 4 : 2;
}

QMOE_INLINE float load_scale(const uint8_t* p, ScaleType type) noexcept {
    switch (type) {
        case ScaleType::kFloat16: return half_to_float(load<uint16_t>(p));
        case ScaleType::kBfloat16: return bfloat_to_float(load<uint16_t>(p));
        case ScaleType::kFloat32: return load<float>(p);
    }
    return 0.0f;
}

// Where everything is in one stored matrix. Sizes cannot overflow: rows and cols are at most 2^24.
struct IntLayout {
    uint32_t bits = 0, group = 0;  // group in columns, the row length where the spec says "whole row"
    ScaleType scale_type = ScaleType::kFloat16;
    bool has_zeros = false;
    float offset = 0.0f;  // added to zeros as stored, or to 2^(bits-1) where none are
    uint64_t rows = 0, cols = 0, groups = 0;
    uint64_t block_bytes = 0, row_bytes = 0, zero_row_bytes = 0;
    uint64_t scales_at = 0, zeros_at = 0, bytes = 0;

    IntLayout(const uint8_t* spec, uint64_t n, uint64_t k) noexcept
        : bits(spec[2]), scale_type(static_cast<ScaleType>(spec[3])), has_zeros(spec[4] & kIntZeros), rows(n), cols(k) {
        if (spec[4] & kIntHalfStep) offset = has_zeros ? 0.5f : -0.5f;
        const uint32_t stored_group = load<uint32_t>(spec + 8);
        group = stored_group == 0 ? static_cast<uint32_t>(k) : stored_group;
        groups = ceil_div(k, group);
        block_bytes = 4 * bits;
        row_bytes = ceil_div(k, kIntBlock) * block_bytes;
        zero_row_bytes = has_zeros ? ceil_div(groups * bits, 8) : 0;
        scales_at = rows * row_bytes;
        zeros_at = scales_at + rows * groups * scale_bytes(scale_type);
        bytes = zeros_at + rows * zero_row_bytes;
    }

    QMOE_INLINE float scale(const uint8_t* data, uint64_t row, uint64_t g) const noexcept {
        return load_scale(data + scales_at + (row * groups + g) * scale_bytes(scale_type), scale_type);
    }
    // Whole, or with half steps half integers: code - zero is exact either way.
    QMOE_INLINE float zero(const uint8_t* data, uint64_t row, uint64_t g) const noexcept {
        if (!has_zeros) return static_cast<float>(1u << (bits - 1)) + offset;
        const uint8_t* p = data + zeros_at + row * zero_row_bytes;
        const uint64_t bit = g * bits;
        uint32_t window = p[bit / 8];
        if (bit / 8 + 1 < zero_row_bytes) window |= static_cast<uint32_t>(p[bit / 8 + 1]) << 8;
        return static_cast<float>((window >> (bit % 8)) & ((1u << bits) - 1)) + offset;
    }
};

// Code i (0..31) of one packed block.
QMOE_INLINE uint32_t int_code(const uint8_t* block, uint32_t bits, uint32_t i) noexcept {
    switch (bits) {
        case 2: return (block[i % 8] >> (2 * (i / 8))) & 3;
        case 3: return ((block[i % 8] >> (2 * (i / 8))) & 3) | (((block[8 + i / 8] >> (i % 8)) & 1u) << 2);
        case 4: return (block[i % 16] >> (4 * (i / 16))) & 15;
        default: return block[i];
    }
}

}  // namespace qmoe
