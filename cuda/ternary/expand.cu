// From streams to tiles of two bits a weight: a warp decodes a group of rows and brings them to their tiles.
#include <algorithm>

#include "ternary/decode.cuh"
#include "ternary/gemm.cuh"
#include "ternary/weights.cuh"

namespace qmoe::cuda {
namespace {

// Where a row of the matrix is among the tiles' rows.
__device__ __forceinline__ uint32_t row_of_tiles(const TiledMatrix& matrix, uint32_t row) {
    if (matrix.order == RowOrder::kPlain) return row;
    const bool halves = matrix.order == RowOrder::kHalves;
    const uint32_t up = halves ? row >= matrix.rows / 2 : row % 2;
    const uint32_t unit = halves ? row - up * (matrix.rows / 2) : row / 2;
    return unit / 8 * kTileRows + up * 8 + unit % 8;
}

// blockIdx: some groups of rows; product, or expert where there is no schedule; stack.
__global__ __launch_bounds__(kMostDecodingWarps* kLanes) void expand_streams(
    const __grid_constant__ TernaryExpansion call) {
    constexpr uint32_t kNone = ~0u;
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
    if (expert < call.first || expert >= call.last) return;
    const uint32_t warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const uint32_t group = blockIdx.x * (blockDim.x / kLanes) + warp;
    if (group * stack.group_rows >= stack.rows) return;
    auto* const codes = reinterpret_cast<uint32_t*>(shared + warp * TernaryCodes::bytes_of_warp(stack));
    TernaryTask task;
    task.look(stack, expert, group);
    task.fetch(stack);
    const TernaryRows rows = decode_whole(stack, task, codes);

    if (!call.scheduled) wait_for_previous();  // which may still read the tiles
    // Where this lane's row is in the expert's tiles.
    uint8_t* const tiles = const_cast<uint8_t*>(to.tiles) + (expert - call.first) * to.expert_bytes;
    const uint32_t row = rows.number(lane >> stack.segment_bits), place = row_of_tiles(to, row);
    const uint64_t tile = place / kTileRows * to.tile_bytes;
    const uint32_t own = row < stack.rows
                             ? static_cast<uint32_t>(tile / 16) + place % kTileRows * (TernaryTiles::kRowBytes / 16)
                             : kNone;
    if (own != kNone && (lane & (stack.segments - 1)) == 0)
        *reinterpret_cast<uint32_t*>(tiles + tile + to.tile_bytes - TernaryTiles::kLevelsBytes +
                                     place % kTileRows * 4) = rows.levels;
    const uint32_t words = TernaryCodes::words_of(stack), pieces = to.blocks.by * (TernaryTiles::kRowBytes / 16);
#pragma unroll 1
    for (uint32_t i = lane; i - lane < pieces; i += kLanes) {
        uint8_t* const to_piece = tiles + i / 2 * TernaryTiles::kBlockBytes + i % 2 * 16;
#pragma unroll 4
        for (uint32_t r = 0; r < stack.group_rows; ++r) {
            const uint32_t at = __shfl_sync(~0u, own, static_cast<int>(r << stack.segment_bits));
            if (at != kNone && i < pieces)
                *reinterpret_cast<uint4*>(to_piece + uint64_t{at} * 16) =
                    *reinterpret_cast<const uint4*>(codes + r * words + 4 * i);
        }
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
        each = std::max(each, TernaryCodes::bytes_of_warp(call.stacks[i]));
        most_groups =
            std::max(most_groups, ceil_div(uint64_t{call.stacks[i].rows}, uint64_t{call.stacks[i].group_rows}));
    }
    QMOE_TRY(check_room_of_group(each, device));
    const uint32_t experts = call.scheduled ? call.most_products : call.last - call.first;
    const uint32_t warps = decoding_warps(each, most_groups * experts, device);
    QMOE_TRY(runtime_status(cudaFuncSetAttribute(expand_streams, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(device.shared))));
    const dim3 grid(static_cast<uint32_t>(ceil_div(most_groups, uint64_t{warps})), experts, call.count);
    return launch(expand_streams, grid, warps * kLanes, warps * each + TernaryCodes::kBehind, false, device, stream,
                  call);
}

}  // namespace qmoe::cuda
