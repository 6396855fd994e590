// A stack of matrices in tiles of 16 rows, as int/tiles.h and ternary/tiles.h have them, for kernels.
#pragma once

#include "experts/divisor.cuh"
#include "int/tiles.h"

namespace qmoe::cuda {

struct TiledMatrix {
    const uint8_t* tiles;  // of expert 0
    uint64_t expert_bytes, tile_bytes;
    uint32_t block_bytes, rows, cols;  // rows as stored
    Divisor count, blocks;             // tiles of an expert; blocks of a tile
    RowOrder order;
    // Of int alone.
    uint32_t groups;  // of a block; 1 where a row is a group
    float zero;
    bool has_zeros, bf16_scales, row_groups;
};

}  // namespace qmoe::cuda
