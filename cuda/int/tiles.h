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
// Memory holds tile by tile, and of each one block by block, what a warp takes in one go: words 0-3 of all lanes, then 4-7
// (for 3 bits 4 and 5), and so on; behind them the block's scales in the stored type, by g, group, and row (g, g + 8); then
// zeros, where they are stored, as float16 in the same order. Where a row is one group, its scale and zero are behind the
// tile's last block.
#pragma once

#include "formats/int.h"

namespace qmoe::cuda {

inline constexpr uint32_t kTileRows = 16, kTileColumns = 128, kTileSteps = 4, kLanes = 32;

struct IntTiles {
    uint32_t bits = 0, words = 0;  // words of a lane and block
    uint32_t groups = 0;           // of a block, 1, 2 or 4; 0 where a row is one group
    bool has_zeros = false;
    float zero = 0.0f;  // of all codes, where none are stored
    ScaleType scale_type = ScaleType::kFloat16;
    uint64_t rows = 0, cols = 0, tiles = 0, blocks = 0;
    uint32_t block_bytes = 0;
    uint64_t tile_bytes = 0, bytes = 0;

    explicit IntTiles(const IntLayout& stored) noexcept
        : bits(stored.bits),
          words(2 * stored.bits),
          has_zeros(stored.has_zeros),
          zero(static_cast<float>(1u << (stored.bits - 1)) + stored.offset),
          scale_type(stored.scale_type),
          rows(stored.rows),
          cols(stored.cols),
          tiles(ceil_div(rows, kTileRows)),
          blocks(ceil_div(cols, kTileColumns)) {
        groups = stored.groups == 1 ? 0 : kTileColumns / stored.group;
        const uint32_t group_bytes = 2 * kTileRows * (has_zeros ? 2 : 1);
        block_bytes = code_bytes() + groups * group_bytes;
        tile_bytes = blocks * block_bytes + (groups == 0 ? group_bytes : 0);
        bytes = tiles * tile_bytes;
    }
    QMOE_INLINE uint32_t code_bytes() const noexcept { return words * 4 * kLanes; }  // of a block
};

// Whether there are such tiles of a stored matrix: groups of 32, 64 or 128 columns or the row, 16-bit scales.
inline bool has_tiles(const IntLayout& stored) noexcept {
    const bool group = stored.groups == 1 || stored.group == 32 || stored.group == 64 || stored.group == 128;
    return group && stored.scale_type != ScaleType::kFloat32;
}

}  // namespace qmoe::cuda
