// What a call for ternary matrices on a device must fulfil.
#pragma once

#include "common.cuh"
#include "formats/ternary_streams.h"

namespace qmoe::cuda {

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

}  // namespace qmoe::cuda
