// Activations on their way to few_tokens.cuh's products.
#pragma once

#include "int/few_tokens_call.cuh"
#include "int/operands.cuh"

namespace qmoe::cuda {

// The four parts of eight columns that a lane, t of four, has of a block of one token's columns, zeros beyond the last one: part i
// begins at column 32 (i ^ odd) + 8 t. `to` is where the block is to be in shared memory: where rows begin anywhere, columns are
// brought there one by one first.
template <typename T>
__device__ __forceinline__ void load_parts(const T* row, uint32_t col, uint32_t cols, bool aligned, uint32_t t,
                                           uint32_t odd, uint8_t* to, uint4 (&parts)[4]) {
    if (!aligned) {
        T* const own = reinterpret_cast<T*>(to);
#pragma unroll 1
        for (uint32_t i = t * 8; i < kTileColumns; i += i % 8 == 7 ? 25 : 1)
            own[i] = col + i < cols ? row[col + i] : from_float<T>(0.0f);
        row = own, col = 0, cols = kTileColumns;
    }
    const uint32_t even_col = col + t * 8 + odd * 32, odd_col = col + t * 8 + (odd ^ 1) * 32;
    // Two addresses in registers of their own: a load does not wait until the one before has read its.
    const T *const even = row + even_col, *const other = row + odd_col;
    if (even_col < cols) parts[0] = *reinterpret_cast<const uint4*>(even);
    if (odd_col < cols) parts[1] = *reinterpret_cast<const uint4*>(other);
    if (even_col + 64 < cols) parts[2] = *reinterpret_cast<const uint4*>(even + 64);
    if (odd_col + 64 < cols) parts[3] = *reinterpret_cast<const uint4*>(other + 64);
}

// Brings rows of x, a slab of each, to shared memory, as products want them: `row_of(i)` is where row i is in x. Behind a row's
// columns come their sums by group, as products of codes of one would be: times what is to be added for the zeros of rows g
// and g + 8 where those are the same everywhere, else as they are. Calls meanwhile() once, when all loads have been asked for.
//
// Four lanes bring a block of columns, so that a product with ones makes its sums; a warp up to eight of them at once. All
// warps bring some: those that did not would ask for codes before the others have asked for activations, and these wait.
template <typename T, int kBits, typename Row, typename Meanwhile>
__device__ __forceinline__ void load_activations(const Projection& p, uint8_t* x, uint32_t rows, uint32_t first_block,
                                                 uint32_t groups, const Row& row_of, const Meanwhile& meanwhile) {
    constexpr uint32_t kAtOnce = 2, kOnes = std::is_same_v<T, __half> ? 0x3c003c00 : 0x3f803f80;
    const bool aligned = p.cols % 8 == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
    const uint32_t lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4, odd = g % 2;
    const uint32_t slab = p.slab.by, cols = p.cols, row_bytes = p.row_bytes, of_group = 4 / groups;
    // A warp takes `each` blocks at a time, all warps together a round of them.
    const uint32_t all = rows * slab, each = min(8, (all + kWarps - 1) / kWarps), round = kWarps * each;
    const float lower = (p.has_zeros ? 1.0f : -p.zero) / kBehind<T>,
                upper = p.has_zeros ? lower : lower / kUpper<kBits>;
    uint32_t begin = threadIdx.x / kLanes * each;
#pragma unroll 1
    do {
        uint4 parts[kAtOnce][4] = {};
        uint32_t row[kAtOnce], block[kAtOnce];
#pragma unroll
        for (uint32_t j = 0; j < kAtOnce; ++j) {
            if (begin + j * round >= all) break;
            const uint32_t at = begin + j * round + g;
            row[j] = p.slab.divide(at);
            block[j] = g < each && at < all ? at - row[j] * slab : slab;
            if (block[j] < slab)
                load_parts(static_cast<const T*>(p.x) + uint64_t{row_of(row[j])} * cols,
                           (first_block + block[j]) * kTileColumns, cols, aligned, t, odd,
                           x + row[j] * row_bytes + block[j] * (kTileColumns * 2), parts[j]);
        }
        if (begin + kAtOnce * round >= all) meanwhile();
#pragma unroll
        for (uint32_t j = 0; j < kAtOnce; ++j) {
            if (begin + j * round >= all) break;
            uint8_t* const own = x + row[j] * row_bytes;
            float sums[4] = {};
#pragma unroll
            for (uint32_t i = 0; i < 4; ++i) {
                const uint32_t which = i ^ odd;  // neighbouring lanes' in different banks
                const uint4 part = parts[j][i];
                const uint32_t a[4] = {part.x, part.y, part.z, part.w};
                mma<T>(sums, a, kOnes, kOnes);
                if (block[j] < slab)
                    *reinterpret_cast<uint4*>(own + block[j] * (kTileColumns * 2) + which * 64 + t * 16) = {
                        prepared<T>(part.x), prepared<T>(part.y), prepared<T>(part.z), prepared<T>(part.w)};
                if ((i + 1) % of_group != 0) continue;
                const float sum = sums[0] + sums[2];
                if (block[j] < slab && t == 0)
                    reinterpret_cast<float2*>(own + slab * (kTileColumns * 2))[block[j] * groups + which / of_group] = {
                        sum * lower, sum * upper};
                sums[0] = sums[1] = sums[2] = sums[3] = 0.0f;
            }
        }
        begin += kAtOnce * round;
    } while (begin < all);
}

}  // namespace qmoe::cuda
