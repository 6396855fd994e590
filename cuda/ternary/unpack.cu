// What the streams of a `ternary` stack say, number by number: nonzeros come in no order that memory would like, so that a
// warp decodes a group of rows into shared memory, and then writes whole rows from there.
#include "experts/check.cuh"
#include "launch.cuh"
#include "ternary/decode.cuh"
#include "ternary/stack.cuh"

namespace qmoe::cuda {
namespace {

// blockIdx: some groups of rows; expert. out (experts, rows, cols).
template <typename T>
__global__ __launch_bounds__(kMostDecodingWarps* kLanes) void unpack_streams(const TernaryView stack, uint32_t first,
                                                                             T* __restrict__ out) {
    constexpr uint32_t kAtOnce = 16 / sizeof(T);  // columns of one store
    QMOE_SHARED_MEMORY(shared, 16);
    const uint32_t warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const uint32_t group = blockIdx.x * (blockDim.x / kLanes) + warp;
    if (uint64_t{group} * stack.group_rows >= stack.rows) return;
    auto* const codes = reinterpret_cast<uint32_t*>(shared + warp * TernaryCodes::bytes_of_warp(stack));
    TernaryTask task;
    task.look(stack, first + blockIdx.y, group);
    task.fetch(stack);
    const TernaryRows rows = decode_whole(stack, task, codes);

    const uint32_t cols = stack.cols, words = TernaryCodes::words_of(stack);
    const bool whole = cols % kAtOnce == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
#pragma unroll 1
    for (uint32_t r = 0; r < stack.group_rows; ++r) {
        const uint32_t row = rows.number(r), levels = rows.levels_of(r);
        if (row >= stack.rows) continue;
        const T high = from_float<T>(__uint_as_float(levels << 16)),
                low = from_float<T>(__uint_as_float(levels & 0xffff0000u)), zero = from_float<T>(0.0f);
        T* const to = out + (uint64_t{blockIdx.y} * stack.rows + row) * cols;
#pragma unroll 2
        for (uint32_t col = lane * kAtOnce; col < cols; col += kLanes * kAtOnce) {
            const uint32_t here = codes[r * words + col / TernaryCodes::kOfWord] >> 2 * (col % TernaryCodes::kOfWord);
            T values[kAtOnce];
#pragma unroll
            for (uint32_t j = 0; j < kAtOnce; ++j) {
                const uint32_t code = here >> 2 * j & 3;
                values[j] = code == 0 ? zero : code == TernaryCodes::kPlus ? high : low;
            }
            if (whole) {
                *reinterpret_cast<uint4*>(to + col) = *reinterpret_cast<const uint4*>(values);
            } else {
                for (uint32_t j = 0; j < kAtOnce && col + j < cols; ++j) to[col + j] = values[j];
            }
        }
    }
}

}  // namespace

Status unpack_ternary(const TernaryStack& stack, uint64_t first, uint64_t count, void* out, OutputType type,
                      cudaStream_t stream) noexcept {
    constexpr uint32_t kMostAtOnce = 1 << 15;  // experts of a launch
    TernaryView view{};
    QMOE_TRY(view_of(stack, view));
    if (first > stack.experts || count > stack.experts - first)
        return Status::mismatch(Code::kValue, "cuda: experts of a stack", 0, stack.experts, first + count);
    Device device{};
    QMOE_TRY(Device::current(device));
    const uint64_t groups = ceil_div(uint64_t{view.rows}, uint64_t{view.group_rows});
    const uint32_t each = TernaryCodes::bytes_of_warp(view), warps = decoding_warps(each, groups * count, device);
    QMOE_TRY(check_room_of_group(each, device));
    return with_output_type(type, [&](auto element) {
        using T = decltype(element);
        const auto kernel = unpack_streams<T>;
        QMOE_TRY(runtime_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                     static_cast<int>(device.shared))));
        const auto blocks = static_cast<uint32_t>(ceil_div(groups, uint64_t{warps}));
        return in_parts(count, kMostAtOnce, [&](uint64_t done, uint64_t experts) {
            return launch_in_order(kernel, dim3(blocks, static_cast<uint32_t>(experts)), warps * kLanes,
                                   warps * each + TernaryCodes::kBehind, stream, view,
                                   static_cast<uint32_t>(first + done),
                                   static_cast<T*>(out) + done * view.rows * view.cols);
        });
    });
}

}  // namespace qmoe::cuda
