// The layout of `int` that the CUDA matrix products read, made once from the stored one.
//
// A *tile* is 16 rows, cut into *blocks* of 128 columns, of 4 *steps* of 32. A lane of a warp (g = lane / 4, t = lane % 4)
// has what mma.m16n8k16 (and a warp of wgmma.m64nNk16) wants of it as the first operand, for the product q = 0 .. 7 of
// each 16 columns. Pair j of it is
//
//     row     g + 8 (j & 1) of the tile
//     columns 16 q + 8 (j >> 1) + 2 t of the block, and the next one
//
// A word (32 bits) has the first code of a pair in its lower half and the second one 16 bits above. Where in its half a
// pair is decides what it costs to make an operand of it: at the lowest bits, or a few bits up where the factor that this
// means is the same for all columns, it is one masking (see operands.cuh). Hence, with h = j >> 1 and r = j & 1,
//
//     2 bits  word 2 (q / 4) + h, at bit 8 (q / 2 % 2) + 4 (q % 2) + 2 r
//     3 bits  q < 6: word 2 (q / 2) + h, at bit 6 (q % 2) + 3 r
//             q = 6: word 2 r + h, at bit 12
//             q = 7: r = 0: word 4 + h, at bit 12; r = 1: bit i of the code in word 2 i + h, at bit 15
//     4 bits  word 2 (q / 2) + h, at bit 8 (q % 2) + 4 r
//     8 bits  word 2 q + h, at bit 8 r
//
// Memory holds tile by tile, and of each one block by block, what a warp takes in one go: words 0-3 of all lanes, then 4-7
// (for 3 bits 4 and 5), and so on; behind them the block's scales in the stored type, by g, group, and row (g, g + 8); then
// zeros, where they are stored, as float16 in the same order. Where a row is one group, its scale and zero are behind the
// tile's last block.
//
// Rows of a tile are rows of the matrix one after the other; of a gated first projection, whose rows are those of gate and
// up, rows 0-7 of a tile are of gate and 8-15 the ones of up that belong to them: a lane then has both.
#pragma once

#include "formats/int.h"
#include "qmoe/prepacked.h"

namespace qmoe::cuda {

inline constexpr uint32_t kTileRows = 16, kTileColumns = 128, kTileSteps = 4, kLanes = 32;

struct IntTiles {
    uint32_t bits = 0, words = 0;  // words of a lane and block
    uint32_t groups = 0;           // of a block, 1, 2 or 4; 0 where a row is one group
    bool has_zeros = false;
    RowOrder order = RowOrder::kPlain;
    float zero = 0.0f;  // of all codes, where none are stored
    ScaleType scale_type = ScaleType::kFloat16;
    uint64_t rows = 0, cols = 0, tiles = 0, blocks = 0;
    uint32_t block_bytes = 0;
    uint64_t tile_bytes = 0, bytes = 0;

    IntTiles(const IntLayout& stored, RowOrder row_order) noexcept
        : bits(stored.bits),
          words(2 * stored.bits),
          has_zeros(stored.has_zeros),
          order(row_order),
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

    // The matrix's row that is row r of a tile; `rows` and more where there is none.
    QMOE_INLINE uint64_t row(uint64_t tile, uint32_t r) const noexcept {
        if (order == RowOrder::kPlain) return tile * kTileRows + r;
        const uint64_t half = rows / 2, unit = tile * (kTileRows / 2) + r % 8;
        if (unit >= half) return rows;
        return order == RowOrder::kHalves ? unit + (r < 8 ? 0 : half) : 2 * unit + (r < 8 ? 0 : 1);
    }
};

// Whether there are such tiles of a stored matrix: groups of 32, 64 or 128 columns or the row, 16-bit scales.
inline bool has_tiles(const IntLayout& stored) noexcept {
    const bool group = stored.groups == 1 || stored.group == 32 || stored.group == 64 || stored.group == 128;
    return group && stored.scale_type != ScaleType::kFloat32;
}

}  // namespace qmoe::cuda
