// Activations in shared memory, as the products of few_tokens.cuh take them.
#pragma once

#include "experts/schedule.cuh"
#include "int/operands.cuh"

namespace qmoe::cuda {

// Bytes of a row of x, of so many blocks of 128 columns: neighbouring rows are in different banks.
QMOE_INLINE uint32_t row_bytes(uint32_t blocks) noexcept {
    return blocks * kTileColumns * 2 + 64;
}

// Eight neighbouring columns of one token as they are, zeros beyond the last column.
template <typename T>
__device__ __forceinline__ uint4 load_columns(const T* row, uint32_t col, uint32_t cols, bool aligned) {
    if (aligned) return col < cols ? *reinterpret_cast<const uint4*>(row + col) : uint4{};
    uint32_t words[4] = {};
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i)
        if (col + i < cols)
            words[i / 2] |= uint32_t{*reinterpret_cast<const uint16_t*>(row + col + i)} << (16 * (i % 2));
    return {words[0], words[1], words[2], words[3]};
}

// Of a matrix's columns the `blocks` blocks from `first` on.
struct Slab {
    const void* x;
    uint32_t cols, first, blocks;
    Divisor lines;  // of 512 bytes of a row, what a warp loads at once
};

// Brings rows of x to `to`: `row_of(i)` is where row i is in x. Calls `behind` when the last loads are on their way.
template <typename T, typename Row, typename Behind>
__device__ __forceinline__ void load_activations(const Slab& slab, uint8_t* to, uint32_t rows, const Row& row_of,
                                                 const Behind& behind) {
    constexpr uint32_t kAtOnce = 4;  // loads on their way
    const bool aligned = slab.cols % 8 == 0 && reinterpret_cast<uintptr_t>(slab.x) % 16 == 0;
    const uint32_t warps = blockDim.x / kLanes, lane = threadIdx.x % kLanes, pieces = slab.blocks * 16,
                   lines = rows * slab.lines.by;
#pragma unroll 1
    for (uint32_t line = threadIdx.x / kLanes;; line += kAtOnce * warps) {
        uint4 raw[kAtOnce];
        uint32_t at[kAtOnce];
#pragma unroll
        for (uint32_t j = 0; j < kAtOnce; ++j) {
            const uint32_t own = line + j * warps, row = slab.lines.divide(own);
            const uint32_t piece = (own - row * slab.lines.by) * kLanes + lane;
            at[j] = own < lines && piece < pieces ? row * row_bytes(slab.blocks) + piece * 16 : ~0u;
            if (at[j] != ~0u)
                raw[j] = load_columns(static_cast<const T*>(slab.x) + uint64_t{row_of(row)} * slab.cols,
                                      slab.first * kTileColumns + 8 * piece, slab.cols, aligned);
        }
        const bool last = line + kAtOnce * warps >= lines;
        if (last) behind();
#pragma unroll
        for (uint32_t j = 0; j < kAtOnce; ++j)
            if (at[j] != ~0u)
                *reinterpret_cast<uint4*>(to + at[j]) = {prepared<T>(raw[j].x), prepared<T>(raw[j].y),
                                                         prepared<T>(raw[j].z), prepared<T>(raw[j].w)};
        if (last) return;
    }
}

}  // namespace qmoe::cuda
