// Stored `int` to the tiles of tiles.h, a thread per lane and block and one per scale; and from tiles to dense weights.
#include "common.cuh"
#include "int/tiles.h"
#include "launch.cuh"

namespace qmoe::cuda {
namespace {

// Puts `code`, pair j of product q, second or not, into a lane's words.
__device__ inline void place(uint32_t* words, uint32_t bits, uint32_t q, uint32_t j, bool second, uint32_t code) {
    const uint32_t h = j >> 1, r = j & 1, half = second ? 16 : 0;
    switch (bits) {
        case 2: words[q / 4 * 2 + h] |= code << (8 * (q / 2 % 2) + 4 * (q % 2) + 2 * r + half); break;
        case 3:
            if (q < 6)
                words[q / 2 * 2 + h] |= code << (6 * (q % 2) + 3 * r + half);
            else if (q == 6)
                words[2 * r + h] |= code << (12 + half);
            else if (r == 0)
                words[4 + h] |= code << (12 + half);
            else
                for (uint32_t i = 0; i < 3; ++i) words[2 * i + h] |= (code >> i & 1) << (15 + half);
            break;
        case 4: words[q / 2 * 2 + h] |= code << (8 * (q % 2) + 4 * r + half); break;
        default: words[2 * q + h] |= code << (8 * r + half);
    }
}

// What place() has put there.
template <uint32_t kBits>
__device__ __forceinline__ uint32_t taken(const uint32_t* words, uint32_t q, uint32_t j, bool second) {
    const uint32_t h = j >> 1, r = j & 1, half = second ? 16 : 0, mask = (1u << kBits) - 1;
    if constexpr (kBits == 2) return words[q / 4 * 2 + h] >> (8 * (q / 2 % 2) + 4 * (q % 2) + 2 * r + half) & mask;
    if constexpr (kBits == 4) return words[q / 2 * 2 + h] >> (8 * (q % 2) + 4 * r + half) & mask;
    if constexpr (kBits == 8) return words[2 * q + h] >> (8 * r + half) & mask;
    if (q < 6) return words[q / 2 * 2 + h] >> (6 * (q % 2) + 3 * r + half) & mask;
    if (q == 6) return words[2 * r + h] >> (12 + half) & mask;
    if (r == 0) return words[4 + h] >> (12 + half) & mask;
    uint32_t code = 0;
    for (uint32_t i = 0; i < 3; ++i) code |= (words[2 * i + h] >> (15 + half) & 1) << i;
    return code;
}

__device__ __forceinline__ float scale_at(const uint8_t* at, bool bf16) {
    return bf16 ? __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(at))
                : __half2float(*reinterpret_cast<const __half*>(at));
}

template <typename T, uint32_t kBits>
__global__ void unpack(IntTiles tiles, const uint8_t* __restrict__ data, T* __restrict__ out) {
    const uint64_t total = tiles.tiles * tiles.blocks * kLanes;
    const uint32_t groups = tiles.groups == 0 ? 1 : tiles.groups;
    const bool bf16 = tiles.scale_type == ScaleType::kBfloat16;
    for (uint64_t i = blockIdx.x * uint64_t{blockDim.x} + threadIdx.x; i < total;
         i += uint64_t{gridDim.x} * blockDim.x) {
        const uint32_t lane = i % kLanes, g = lane / 4, t = lane % 4;
        const uint64_t block = i / kLanes % tiles.blocks, tile = i / kLanes / tiles.blocks;
        const uint8_t* const from = data + tile * tiles.tile_bytes + block * tiles.block_bytes;
        const uint8_t* const scales = tiles.groups == 0
                                          ? data + tile * tiles.tile_bytes + tiles.blocks * tiles.block_bytes
                                          : from + tiles.code_bytes();
        uint32_t words[2 * kBits];
#pragma unroll
        for (uint32_t w = 0; w < 2 * kBits; ++w) {
            const uint32_t width = 2 * kBits - w / 4 * 4 < 4 ? 2 * kBits - w / 4 * 4 : 4;  // words of this piece
            words[w] = *reinterpret_cast<const uint32_t*>(from + w / 4 * 16 * kLanes + lane * width * 4 + w % 4 * 4);
        }
#pragma unroll
        for (uint32_t q = 0; q < 2 * kTileSteps; ++q)
#pragma unroll
            for (uint32_t j = 0; j < 4; ++j) {
                const uint64_t row = tiles.row(tile, g + 8 * (j & 1));
                const uint64_t col = block * kTileColumns + 16 * q + 8 * (j >> 1) + 2 * t;
                const uint32_t at = (g * groups + q / 2 * groups / kTileSteps) * 2 + (j & 1);
                const float scale = scale_at(scales + at * 2, bf16);
                const float zero = tiles.has_zeros
                                       ? __half2float(*reinterpret_cast<const __half*>(scales + groups * 32 + at * 2))
                                       : tiles.zero;
#pragma unroll
                for (uint32_t second = 0; second < 2; ++second)
                    if (row < tiles.rows && col + second < tiles.cols)
                        out[row * tiles.cols + col + second] =
                            from_float<T>((static_cast<float>(taken<kBits>(words, q, j, second != 0)) - zero) * scale);
            }
    }
}

__global__ void prepack_codes(IntLayout stored, IntTiles tiles, const uint8_t* __restrict__ data,
                              uint8_t* __restrict__ out) {
    const uint64_t total = tiles.tiles * tiles.blocks * kLanes;
    for (uint64_t i = blockIdx.x * uint64_t{blockDim.x} + threadIdx.x; i < total;
         i += uint64_t{gridDim.x} * blockDim.x) {
        const uint32_t lane = i % kLanes, g = lane / 4, t = lane % 4;
        const uint64_t block = i / kLanes % tiles.blocks, tile = i / kLanes / tiles.blocks;
        uint32_t words[16] = {};
        for (uint32_t q = 0; q < 2 * kTileSteps; ++q)
            for (uint32_t j = 0; j < 4; ++j)
                for (uint32_t second = 0; second < 2; ++second) {
                    const uint64_t row = tiles.row(tile, g + 8 * (j & 1));
                    const uint64_t col = block * kTileColumns + 16 * q + 8 * (j >> 1) + 2 * t + second;
                    if (row >= tiles.rows || col >= tiles.cols) continue;
                    const uint8_t* const packed = data + row * stored.row_bytes + col / kIntBlock * stored.block_bytes;
                    place(words, stored.bits, q, j, second != 0, int_code(packed, stored.bits, col % kIntBlock));
                }
        uint8_t* const to = out + tile * tiles.tile_bytes + block * tiles.block_bytes;
        for (uint32_t w = 0; w < tiles.words; ++w) {
            const uint32_t width = min(tiles.words - w / 4 * 4, 4u);  // words of this piece
            *reinterpret_cast<uint32_t*>(to + w / 4 * 16 * kLanes + lane * width * 4 + w % 4 * 4) = words[w];
        }
    }
}

// A thread per row of a tile and group, of which a row of one group has one behind the last block.
__global__ void prepack_scales(IntLayout stored, IntTiles tiles, const uint8_t* __restrict__ data,
                               uint8_t* __restrict__ out) {
    const uint64_t places = tiles.groups == 0 ? 1 : tiles.blocks * tiles.groups;  // of groups in a tile
    const uint64_t total = tiles.tiles * places * kTileRows, groups = tiles.groups == 0 ? 1 : tiles.groups;
    for (uint64_t i = blockIdx.x * uint64_t{blockDim.x} + threadIdx.x; i < total;
         i += uint64_t{gridDim.x} * blockDim.x) {
        const uint64_t r = i % kTileRows, place = i / kTileRows % places, tile = i / kTileRows / places;
        const uint64_t row = tiles.row(tile, r), block = place / groups, group = place % groups;
        const bool there = row < tiles.rows && place < stored.groups;
        uint8_t* const to =
            out + tile * tiles.tile_bytes +
            (tiles.groups == 0 ? tiles.blocks * tiles.block_bytes : block * tiles.block_bytes + tiles.code_bytes());
        const uint64_t at = (r % 8 * groups + group) * 2 + r / 8;
        reinterpret_cast<uint16_t*>(to)[at] =
            there ? load<uint16_t>(data + stored.scales_at + (row * stored.groups + place) * 2) : uint16_t{0};
        if (tiles.has_zeros)
            reinterpret_cast<__half*>(to)[groups * kTileRows + at] =
                __float2half_rn(there ? stored.zero(data, row, place) : 0.0f);
    }
}

}  // namespace

Status int_tiles_bytes(const DeviceMatrix& matrix, uint64_t* bytes) noexcept {
    const IntLayout stored(matrix.spec, matrix.rows, matrix.cols);
    if (!has_tiles(stored))
        return Status::error(Code::kNoKernel,
                             "cuda: products take groups of 32, 64 or 128 columns or whole rows, and 16-bit scales");
    *bytes = IntTiles(stored, RowOrder::kPlain).bytes;  // the same for every order
    return {};
}

Status prepack_int(const DeviceMatrix& matrix, RowOrder order, void* out, uint64_t out_bytes,
                   cudaStream_t stream) noexcept {
    const IntLayout stored(matrix.spec, matrix.rows, matrix.cols);
    if (matrix.bytes < stored.bytes)
        return Status::mismatch(Code::kShape, "cuda: int data is shorter than its shape", 0, stored.bytes,
                                matrix.bytes);
    uint64_t bytes = 0;
    QMOE_TRY(int_tiles_bytes(matrix, &bytes));
    if (out_bytes != bytes) return Status::mismatch(Code::kShape, "cuda: bytes of the tiles", 0, bytes, out_bytes);
    if (order != RowOrder::kPlain && matrix.rows % 2 != 0)
        return Status::mismatch(Code::kShape, "cuda: rows of gate and up, an even number", 0, matrix.rows + 1,
                                matrix.rows);
    const IntTiles tiles(stored, order);
    auto* const to = static_cast<uint8_t*>(out);
    QMOE_TRY(launch_in_order(prepack_codes, grid_for(tiles.tiles * tiles.blocks * kLanes), 256, 0, stream, stored,
                             tiles, matrix.data, to));
    const uint64_t groups = tiles.groups == 0 ? 1 : tiles.blocks * tiles.groups;
    return launch_in_order(prepack_scales, grid_for(tiles.tiles * groups * kTileRows), 256, 0, stream, stored, tiles,
                           matrix.data, to);
}

Status unpack_int(const IntStack& matrix, void* out, OutputType type, cudaStream_t stream) noexcept {
    const IntLayout stored(matrix.spec, matrix.rows, matrix.cols);
    if (!has_tiles(stored)) return Status::error(Code::kNoKernel, "cuda: there are no tiles of this matrix");
    const IntTiles tiles(stored, matrix.order);
    const uint32_t grid = grid_for(tiles.tiles * tiles.blocks * kLanes);
    const auto* const data = static_cast<const uint8_t*>(matrix.tiles);
    return with_output_type(type, [&]<typename T>(T) {
        const auto kernel = tiles.bits == 2   ? unpack<T, 2>
                            : tiles.bits == 3 ? unpack<T, 3>
                            : tiles.bits == 4 ? unpack<T, 4>
                                              : unpack<T, 8>;
        return launch_in_order(kernel, grid, 256, 0, stream, tiles, data, static_cast<T*>(out));
    });
}

}  // namespace qmoe::cuda
