// What the streams of a `ternary` stack say, number by number.
//
// A warp decodes a group of rows into shared memory, two bits per slot, and then writes whole rows from there: nonzeros
// come in no order that memory would like.
#include "launch.cuh"
#include "ternary/stack.cuh"

namespace qmoe::cuda {

namespace {

constexpr uint32_t kMostWarps = 8, kSlotsOfWord = 16;
constexpr uint32_t kSharedAtOnce = 48 << 10;  // a block's, where a warp does not need more

// Words of a row's slots, and one more, so that two can always be read.
QMOE_INLINE uint32_t words_of(const TernaryStreams& layout) noexcept {
    return (layout.all_slots() + kSlotsOfWord - 1) / kSlotsOfWord + 1;
}

// Leaves 1 for a plus and 2 for a minus at the slots of a quad, from `next` on; returns the slot behind the last one.
template <int kGap>
__device__ __forceinline__ uint32_t mark(const uint4& quad, uint32_t* row, uint32_t next, uint32_t slots) {
    using Symbols = TernarySymbols<kGap>;
    const Symbols symbols(quad);
#pragma unroll
    for (int i = 0; i < Symbols::kCount; ++i) {
        const uint32_t symbol = symbols[i];
        next += Symbols::gap(symbol) + (i > 0 ? 1 : 0);
        const uint32_t code = 1 + Symbols::minus(symbol);
        if (next < slots) atomicOr(row + next / kSlotsOfWord, code << 2 * (next % kSlotsOfWord));
    }
    return next + 1;
}

template <int kGap>
__device__ __forceinline__ void mark_row(const TernaryStreams& layout, const uint4* from, uint32_t k, uint32_t k_end,
                                         uint32_t next, uint32_t* row) {
    const uint32_t slots = layout.slots(), step = static_cast<uint32_t>(layout.group_rows);
    uint4 now = k < k_end ? from[k * step] : uint4{}, ahead = k + 1 < k_end ? from[(k + 1) * step] : uint4{};
#pragma unroll 1
    for (; k < k_end; ++k) {
        const uint4 fetched = k + 2 < k_end ? from[(k + 2) * step] : uint4{};
        next = mark<kGap>(now, row, next, slots);
        now = ahead, ahead = fetched;
    }
}

template <typename T>
__global__ __launch_bounds__(kMostWarps* kLanes) void unpack_streams(const TernaryStreams layout,
                                                                     const uint8_t* __restrict__ stack, uint64_t expert,
                                                                     T* __restrict__ out) {
    constexpr uint32_t kAtOnce = 16 / sizeof(T);  // columns of one store
    QMOE_SHARED_MEMORY(shared, 16);
    const uint32_t warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const uint64_t group = uint64_t{blockIdx.x} * (blockDim.x / kLanes) + warp;
    if (group >= layout.groups) return;
    const uint32_t words = words_of(layout), group_rows = static_cast<uint32_t>(layout.group_rows);
    uint32_t* const codes = reinterpret_cast<uint32_t*>(shared) + warp * group_rows * words;
    for (uint32_t i = lane; i < group_rows * words; i += kLanes) codes[i] = 0;
    __syncwarp();

    const uint8_t* const matrix = stack + reinterpret_cast<const uint64_t*>(stack)[expert];
    const uint32_t own = lane / layout.segments, segment = lane % layout.segments;
    const uint64_t at = group * group_rows + own;
    const uint32_t quads = reinterpret_cast<const uint32_t*>(matrix)[at] >> TernaryStreams::kRowBits;
    const uint32_t next = reinterpret_cast<const uint16_t*>(matrix + layout.starts_at)[at * layout.segments + segment];
    const uint4* const from = reinterpret_cast<const uint4*>(matrix + layout.quads_at) +
                              reinterpret_cast<const uint32_t*>(matrix + layout.bases_at)[group] + own;
    const uint32_t k = segment * quads / layout.segments, k_end = (segment + 1) * quads / layout.segments;
    uint32_t* const row_codes = codes + own * words;
    switch (layout.gap_bits) {
        case 3: mark_row<3>(layout, from, k, k_end, next, row_codes); break;
        case 4: mark_row<4>(layout, from, k, k_end, next, row_codes); break;
        case 5: mark_row<5>(layout, from, k, k_end, next, row_codes); break;
        case 6: mark_row<6>(layout, from, k, k_end, next, row_codes); break;
        default: mark_row<7>(layout, from, k, k_end, next, row_codes);
    }
    __syncwarp();

    const uint32_t cols = static_cast<uint32_t>(layout.cols), step = layout.step();
#pragma unroll 1
    for (uint32_t r = 0; r < group_rows; ++r) {
        const uint32_t info = reinterpret_cast<const uint32_t*>(matrix)[group * group_rows + r];
        const uint32_t row = info & ((1u << TernaryStreams::kRowBits) - 1);
        if (row >= layout.rows) continue;
        const uint32_t levels = reinterpret_cast<const uint32_t*>(matrix + layout.levels_at)[group * group_rows + r];
        const T high = from_float<T>(__uint_as_float(levels << 16)),
                low = from_float<T>(__uint_as_float(levels & 0xffff0000u)), zero = from_float<T>(0.0f);
        T* const to = out + uint64_t{row} * cols;
        const bool whole = cols % kAtOnce == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
#pragma unroll 1
        for (uint32_t col = lane * kAtOnce; col < cols; col += kLanes * kAtOnce) {
            const uint32_t first = layout.slot(col), word = first / kSlotsOfWord;
            const uint64_t codes_here =
                (uint64_t{codes[r * words + word + 1]} << 32 | codes[r * words + word]) >> 2 * (first % kSlotsOfWord);
            T values[kAtOnce];
            uint32_t in_step = first % step;
#pragma unroll
            for (uint32_t j = 0, skipped = 0; j < kAtOnce; ++j, ++in_step) {
                if (in_step == step - 1) ++skipped, in_step = 0;  // the empty slot
                const uint32_t code = codes_here >> 2 * (j + skipped) & 3;
                values[j] = code == 0 ? zero : code == 1 ? high : low;
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

Status unpack_ternary(const TernaryStack& stack, uint64_t expert, void* out, OutputType type,
                      cudaStream_t stream) noexcept {
    QMOE_TRY(check_stack(stack));
    if (expert >= stack.experts)
        return Status::mismatch(Code::kValue, "cuda: experts of a stack", 0, stack.experts, expert);
    Device device{};
    QMOE_TRY(Device::current(device));
    const TernaryStreams layout(stack.shape);
    const uint32_t each = static_cast<uint32_t>(layout.group_rows) * words_of(layout) * 4;
    if (each > device.shared)
        return Status::mismatch(Code::kNoKernel, "cuda: shared memory for a group of rows", 0, device.shared, each);
    const uint32_t fit = kSharedAtOnce / each, warps = fit > kMostWarps ? kMostWarps : fit > 0 ? fit : 1;
    return with_output_type(type, [&](auto element) {
        using T = decltype(element);
        const auto kernel = unpack_streams<T>;
        QMOE_TRY(runtime_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                     static_cast<int>(device.shared))));
        const auto grid = static_cast<uint32_t>(ceil_div(layout.groups, uint64_t{warps}));
        return launch_in_order(kernel, grid, warps * kLanes, warps * each, stream, layout,
                               static_cast<const uint8_t*>(stack.streams), expert, static_cast<T*>(out));
    });
}

}  // namespace qmoe::cuda
