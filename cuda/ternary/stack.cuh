// `ternary` stacks as kernels see them: what a call must fulfil, where things are, and how quads are taken apart.
#pragma once

#include "common.cuh"
#include "formats/ternary_streams.h"

namespace qmoe::cuda {

// Where the parts of a stack's matrices are; see formats/ternary_streams.h.
struct TernaryView {
    const uint8_t* streams;  // the stack
    uint32_t rows, cols, slots, all_slots, gap_bits;
    uint32_t segments, segment_bits, group_rows;  // lanes of a row, its logarithm, and rows of a group
    uint32_t levels_at, starts_at, bases_at, quads_at;
    RowOrder order;

    __device__ __forceinline__ const uint8_t* matrix(uint32_t expert) const {
        return streams + reinterpret_cast<const uint64_t*>(streams)[expert];
    }
};

inline Status check_stack(const TernaryStack& stack) noexcept {
    const StreamsShape& shape = stack.shape;
    const bool sound = shape.gap_bits >= TernaryStreams::kMinGapBits && shape.gap_bits <= TernaryStreams::kMaxGapBits &&
                       shape.segments > 0 && shape.segments <= kLanes && (shape.segments & (shape.segments - 1)) == 0 &&
                       shape.rows > 0 && shape.cols > 0 && TernaryStreams(shape).all_slots() <= 0xffff;
    if (!sound) return Status::error(Code::kValue, "cuda: there are no streams of this shape");
    if (reinterpret_cast<uintptr_t>(stack.streams) % 16 != 0)
        return Status::error(Code::kValue, "cuda: streams must be aligned to 16 bytes");
    if (stack.order != RowOrder::kPlain && shape.rows % 2 != 0)
        return Status::error(Code::kShape, "cuda: an odd number of rows has no gates");
    return {};
}

inline Status view_of(const TernaryStack& stack, TernaryView& view) noexcept {
    QMOE_TRY(check_stack(stack));
    const TernaryStreams layout(stack.shape);
    view.streams = static_cast<const uint8_t*>(stack.streams);
    view.rows = static_cast<uint32_t>(layout.rows);
    view.cols = static_cast<uint32_t>(layout.cols);
    view.slots = layout.slots();
    view.all_slots = layout.all_slots();
    view.gap_bits = layout.gap_bits;
    view.segments = layout.segments;
    view.segment_bits = static_cast<uint32_t>(__builtin_ctz(layout.segments));
    view.group_rows = static_cast<uint32_t>(layout.group_rows);
    view.levels_at = static_cast<uint32_t>(layout.levels_at);
    view.starts_at = static_cast<uint32_t>(layout.starts_at);
    view.bases_at = static_cast<uint32_t>(layout.bases_at);
    view.quads_at = static_cast<uint32_t>(layout.quads_at);
    view.order = stack.order;
    return {};
}

// The symbols of a quad, by number: known when compiled, where loops are unrolled.
template <int kGap>
struct TernarySymbols {
    static constexpr int kBits = kGap + 1, kCount = TernaryStreams::kQuadBits / kBits;
    uint32_t words[5];

    __device__ __forceinline__ explicit TernarySymbols(const uint4& quad) : words{quad.x, quad.y, quad.z, quad.w, 0} {}
    // Symbol i in the highest bits, and others below it.
    __device__ __forceinline__ uint32_t operator[](int i) const {
        const int word = i * kBits / 32, shift = i * kBits % 32;
        return shift == 0            ? words[word]
               : shift + kBits <= 32 ? words[word] << shift
                                     : __funnelshift_l(words[word + 1], words[word], shift);
    }
    // How many slots a symbol goes ahead, less one.
    static __device__ __forceinline__ uint32_t gap(uint32_t symbol) { return symbol >> (32 - kGap); }
};

}  // namespace qmoe::cuda
