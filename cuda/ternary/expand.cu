// From streams to tiles of two bits a weight: a warp decodes a group of rows into shared memory, a lane a segment of one,
// and then brings rows to their tiles.
#include "ternary/gemm.cuh"
#include "ternary/weights.cuh"

namespace qmoe::cuda {
namespace {

constexpr uint32_t kMostWarps = 8, kCodesOfWord = 16;
constexpr uint32_t kSharedAtOnce = 48 << 10;  // a block's, where a warp does not need more

// Words of a row's codes.
QMOE_INLINE uint32_t words_of(const TiledMatrix& matrix) noexcept {
    return matrix.blocks.by * (kTileColumns / kCodesOfWord);
}
QMOE_INLINE uint32_t bytes_of_warp(const TernaryView& stack, const TiledMatrix& matrix) noexcept {
    return stack.group_rows * words_of(matrix) * 4;
}

// Leaves the codes of a quad's symbols, from slot `next` on, at their columns; returns the slot behind the last one.
template <int kGap>
__device__ __forceinline__ uint32_t mark(const uint4& quad, uint32_t* row, uint32_t next, uint32_t slots) {
    using Symbols = TernarySymbols<kGap>;
    constexpr uint32_t kStep = 1u << kGap;
    const Symbols symbols(quad);
#pragma unroll
    for (int i = 0; i < Symbols::kCount; ++i) {
        const uint32_t symbol = symbols[i];
        next += Symbols::gap(symbol) + (i > 0 ? 1 : 0);
        const uint32_t col = next - (next >> kGap), code = TernaryTiles::kPlus + Symbols::minus(symbol);
        if (next < slots && (next & (kStep - 1)) != kStep - 1)
            atomicOr(row + col / kCodesOfWord, code << 2 * (col % kCodesOfWord));
    }
    return next + 1;
}

template <int kGap>
__device__ __forceinline__ void mark_segment(const uint4* from, uint32_t step, uint32_t k, uint32_t k_end,
                                             uint32_t next, uint32_t slots, uint32_t* row) {
    uint4 now = k < k_end ? from[k * step] : uint4{}, ahead = k + 1 < k_end ? from[(k + 1) * step] : uint4{};
#pragma unroll 1
    for (; k < k_end; ++k) {
        const uint4 fetched = k + 2 < k_end ? from[(k + 2) * step] : uint4{};
        next = mark<kGap>(now, row, next, slots);
        now = ahead, ahead = fetched;
    }
}

// Where a row of the matrix is among the tiles' rows.
__device__ __forceinline__ uint32_t row_of_tiles(const TiledMatrix& matrix, uint32_t row) {
    if (matrix.order == RowOrder::kPlain) return row;
    const bool halves = matrix.order == RowOrder::kHalves;
    const uint32_t up = halves ? row >= matrix.rows / 2 : row % 2;
    const uint32_t unit = halves ? row - up * (matrix.rows / 2) : row / 2;
    return unit / 8 * kTileRows + up * 8 + unit % 8;
}

// blockIdx: some groups of rows; product, or expert where there is no schedule; stack.
__global__ __launch_bounds__(kMostWarps* kLanes) void expand_streams(const __grid_constant__ TernaryExpansion call) {
    QMOE_SHARED_MEMORY(shared, 16);
    if (call.scheduled) wait_for_previous();
    let_next_begin();
    const TernaryView& stack = call.stacks[blockIdx.z];
    const TiledMatrix& to = call.matrices[blockIdx.z];
    uint32_t expert = call.first + blockIdx.y;
    if (call.scheduled) {
        const uint32_t product = blockIdx.y;
        if (product >= call.schedule.products()) return;
        expert = call.schedule.expert(product);
        if (product > 0 && call.schedule.expert(product - 1) == expert) return;
    }
    const uint32_t warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const uint32_t group = blockIdx.x * (blockDim.x / kLanes) + warp;
    if (expert < call.first || expert >= call.last || group * stack.group_rows >= stack.rows) return;
    const uint32_t words = words_of(to);
    uint32_t* const codes = reinterpret_cast<uint32_t*>(shared + warp * bytes_of_warp(stack, to));
    for (uint32_t i = lane; i < stack.group_rows * words / 4; i += kLanes) reinterpret_cast<uint4*>(codes)[i] = {};
    __syncwarp();

    const uint8_t* const matrix = stack.matrix(expert);
    const uint32_t own = lane >> stack.segment_bits, segment = lane & (stack.segments - 1);
    const uint32_t at = group * stack.group_rows + own;
    const uint32_t quads = reinterpret_cast<const uint32_t*>(matrix)[at] >> TernaryStreams::kRowBits;
    const uint32_t next = reinterpret_cast<const uint16_t*>(matrix + stack.starts_at)[at * stack.segments + segment];
    const uint4* const from = reinterpret_cast<const uint4*>(matrix + stack.quads_at) +
                              reinterpret_cast<const uint32_t*>(matrix + stack.bases_at)[group] + own;
    const uint32_t k = segment * quads >> stack.segment_bits, k_end = (segment + 1) * quads >> stack.segment_bits;
    uint32_t* const row_codes = codes + own * words;
    switch (stack.gap_bits) {
        case 3: mark_segment<3>(from, stack.group_rows, k, k_end, next, stack.slots, row_codes); break;
        case 4: mark_segment<4>(from, stack.group_rows, k, k_end, next, stack.slots, row_codes); break;
        case 5: mark_segment<5>(from, stack.group_rows, k, k_end, next, stack.slots, row_codes); break;
        case 6: mark_segment<6>(from, stack.group_rows, k, k_end, next, stack.slots, row_codes); break;
        default: mark_segment<7>(from, stack.group_rows, k, k_end, next, stack.slots, row_codes);
    }
    __syncwarp();

    if (!call.scheduled) wait_for_previous();  // which may still read the tiles
    uint8_t* const tiles = const_cast<uint8_t*>(to.tiles) + (expert - call.first) * to.expert_bytes;
#pragma unroll 1
    for (uint32_t r = 0; r < stack.group_rows; ++r) {
        const uint32_t in_order = group * stack.group_rows + r;
        const uint32_t row =
            reinterpret_cast<const uint32_t*>(matrix)[in_order] & ((1u << TernaryStreams::kRowBits) - 1);
        if (row >= stack.rows) continue;
        const uint32_t place = row_of_tiles(to, row);
        uint8_t* const tile = tiles + place / kTileRows * to.tile_bytes;
        const uint32_t of_tile = place % kTileRows;
        for (uint32_t i = lane; i < words / 4; i += kLanes)
            *reinterpret_cast<uint4*>(tile + i * TernaryTiles::kHalfBytes + of_tile * 16) =
                *reinterpret_cast<const uint4*>(codes + r * words + 4 * i);
        if (lane == 0)
            reinterpret_cast<uint32_t*>(tile + to.tile_bytes - TernaryTiles::kLevelsBytes)[of_tile] =
                reinterpret_cast<const uint32_t*>(matrix + stack.levels_at)[in_order];
    }
}

}  // namespace

TiledMatrix ternary_tiles(const TernaryView& stack) noexcept {
    TiledMatrix out{};
    out.rows = stack.rows, out.cols = stack.cols;
    out.count = Divisor(ceil_div(uint64_t{stack.rows}, uint64_t{kTileRows}));
    out.blocks = Divisor(ceil_div(uint64_t{stack.cols}, uint64_t{kTileColumns}));
    out.block_bytes = TernaryTiles::kBlockBytes;
    out.tile_bytes = uint64_t{out.blocks.by} * out.block_bytes + TernaryTiles::kLevelsBytes;
    out.expert_bytes = out.count.by * out.tile_bytes;
    out.order = stack.order;
    return out;
}

Status launch_expansion(const TernaryExpansion& call, const Device& device, cudaStream_t stream) noexcept {
    uint32_t each = 0;
    uint64_t most_groups = 0;
    for (uint32_t i = 0; i < call.count; ++i) {
        each = std::max(each, bytes_of_warp(call.stacks[i], call.matrices[i]));
        most_groups =
            std::max(most_groups, ceil_div(uint64_t{call.stacks[i].rows}, uint64_t{call.stacks[i].group_rows}));
    }
    if (each > device.shared)
        return Status::mismatch(Code::kNoKernel, "cuda: shared memory for a group of rows", 0, device.shared, each);
    const uint32_t fit = kSharedAtOnce / each, warps = fit > kMostWarps ? kMostWarps : fit > 0 ? fit : 1;
    QMOE_TRY(runtime_status(cudaFuncSetAttribute(expand_streams, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(device.shared))));
    const dim3 grid(static_cast<uint32_t>(ceil_div(most_groups, uint64_t{warps})),
                    call.scheduled ? call.most_products : call.last - call.first, call.count);
    return launch(expand_streams, grid, warps * kLanes, warps * each, false, device, stream, call);
}

}  // namespace qmoe::cuda
