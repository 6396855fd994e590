// The layout of `int` that the CUDA matrix products read, made once from the stored one.
//
// A *tile* is 16 rows, cut into *blocks* of 128 columns, of 4 *steps* of 32. A lane of a warp (g = lane / 4, t = lane % 4)
// has what mma.m16n8k16 wants of it as the first operand, for the two products of a step: of rows g and g + 8 the columns
// 8 t .. 8 t + 7, so that its share of the activations is 8 neighbouring columns as well. Pair p = 4 m + j of a step is
//
//     row     g + 8 (j & 1)
//     columns 8 t + 4 m + 2 (j >> 1), and the next one
//
// The words (32 bits) of a lane hold the first code of a pair in their lower half and the second one 16 bits above:
//
//     2 bits  step s is word s:                    pair p at bit 2 p
//     3 bits  words 0-3 as 2 bits; bit 2 of the codes of steps 2 i and 2 i + 1 in word 4 + i: at bits p and 8 + p
//     4 bits  step s is words 2 s + m:             pair (m, j) at bit 4 j
//     8 bits  step s is words 4 s + 2 m + (j >> 1): pair (m, j) at bit 8 (j & 1)
//
// Memory holds, tile by tile and block by block, words 0-3 of all lanes, then 4-7 (for 3 bits 4 and 5), and so on: what a
// warp loads at once is one contiguous piece. Behind the codes of all tiles are the scales in the stored type, by tile,
// block, g, group of the block, and row (g, g + 8); then zeros, where they are stored, as float16 in the same order.
#pragma once

#include "formats/int.h"

namespace qmoe::cuda {

inline constexpr uint32_t kTileRows = 16, kTileColumns = 128, kTileSteps = 4, kLanes = 32;

struct IntTiles {
    uint32_t bits = 0, words = 0;  // words of a lane and block
    uint32_t groups = 0;           // of a block, 1, 2 or 4; 0 where a row is one group
    bool has_zeros = false;
    float zero = 0.0f;  // of all codes where none are stored, from their middle
    ScaleType scale_type = ScaleType::kFloat16;
    uint64_t rows = 0, cols = 0, tiles = 0, blocks = 0;
    uint64_t tile_scales = 0;  // scales of a tile, 2 bytes each
    uint64_t scales_at = 0, zeros_at = 0, bytes = 0;

    explicit IntTiles(const IntLayout& stored) noexcept
        : bits(stored.bits),
          words(2 * stored.bits),
          has_zeros(stored.has_zeros),
          zero(stored.has_zeros ? 0.0f : stored.offset),
          scale_type(stored.scale_type),
          rows(stored.rows),
          cols(stored.cols),
          tiles(ceil_div(rows, kTileRows)),
          blocks(ceil_div(cols, kTileColumns)) {
        groups = stored.groups == 1 ? 0 : kTileColumns / stored.group;
        tile_scales = kTileRows * (groups == 0 ? 1 : blocks * groups);
        scales_at = tiles * blocks * block_bytes();
        zeros_at = scales_at + tiles * tile_scales * 2;
        bytes = zeros_at + (has_zeros ? tiles * tile_scales * 2 : 0);
    }
    QMOE_INLINE uint64_t block_bytes() const noexcept { return uint64_t{words} * 4 * kLanes; }
};

// Whether there are such tiles of a stored matrix: groups of 32, 64 or 128 columns or the row, 16-bit scales.
inline bool has_tiles(const IntLayout& stored) noexcept {
    const bool group = stored.groups == 1 || stored.group == 32 || stored.group == 64 || stored.group == 128;
    return group && stored.scale_type != ScaleType::kFloat32;
}

}  // namespace qmoe::cuda
