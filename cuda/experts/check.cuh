// What a call for a layer of experts must fulfil, whatever the format.
#pragma once

#include "common.cuh"
#include "experts/schedule.cuh"

namespace qmoe::cuda {

inline uint64_t rows_of(const IntStack& stack) noexcept {
    return stack.rows;
}
inline uint64_t rows_of(const TernaryStack& stack) noexcept {
    return stack.shape.rows;
}
inline uint64_t cols_of(const IntStack& stack) noexcept {
    return stack.cols;
}
inline uint64_t cols_of(const TernaryStack& stack) noexcept {
    return stack.shape.cols;
}

// Columns of the second projection: what a gate leaves of the first one's rows.
template <typename Stack>
uint64_t width_of(const Experts<Stack>& e) noexcept {
    return e.first.order == RowOrder::kPlain ? rows_of(e.first) : rows_of(e.first) / 2;
}

template <typename Stack>
Status check_experts(const Experts<Stack>& e) noexcept {
    if (e.second.order != RowOrder::kPlain)
        return Status::error(Code::kValue, "cuda: the second projection has no gate");
    if (e.first.experts != e.second.experts || e.first.experts == 0)
        return Status::mismatch(Code::kShape, "cuda: experts of both projections", 0, e.first.experts,
                                e.second.experts);
    if (e.first.experts >= 0xffff)
        return Status::mismatch(Code::kNoKernel, "cuda: experts of a layer", 0, 0xfffe, e.first.experts);
    if (cols_of(e.second) != width_of(e))
        return Status::mismatch(Code::kShape, "cuda: columns of the second projection", 0, width_of(e),
                                cols_of(e.second));
    if (rows_of(e.second) != cols_of(e.first))
        return Status::mismatch(Code::kShape, "cuda: rows of the second projection", 0, cols_of(e.first),
                                rows_of(e.second));
    return {};
}

template <typename Stack>
Status check_choices(const Experts<Stack>& e, uint64_t most) noexcept {
    return e.tokens * e.top_k <= most
               ? Status{}
               : Status::mismatch(Code::kNoKernel, "cuda: choices of one call", 0, most, e.tokens * e.top_k);
}

template <typename Stack>
Status check_linear(const Linear<Stack>& linear) noexcept {
    if (linear.weight.experts == 1 && linear.weight.order == RowOrder::kPlain) return {};
    return Status::error(Code::kValue, "cuda: a linear layer has one matrix, without a gate");
}

// Where the kernel for many tokens becomes faster than the one for few, measured on an H100: tokens of an expert on
// average. Small experts are over before the former has begun, and ternary ones become tiles first.
inline uint64_t few_tokens_of(const IntStack& stack) noexcept {
    return stack.rows * stack.cols < 1 << 24 ? 7 : 4;
}
inline uint64_t few_tokens_of(const TernaryStack&) noexcept {
    return 8;
}
// And of a linear layer. Of int the former takes at most 8 at once where activations of more have no room in shared memory.
inline uint64_t few_tokens_of_linear(const IntStack& stack) noexcept {
    return stack.cols > 8192 ? 8 : 16;
}
// Of ternary it walks through nonzeros for every four tokens; up to 16 are multiplied as codes in shared memory where there
// is room for their activations.
inline constexpr uint64_t kMostTokensToWalk = 4;
inline uint64_t few_tokens_of_linear(const TernaryStack& stack) noexcept {
    constexpr uint64_t kNumbers = 72 << 10;
    return 16 * stack.shape.cols <= kNumbers ? 16 : 8 * stack.shape.cols <= kNumbers ? 8 : kMostTokensToWalk;
}
template <typename Stack>
bool is_for_many(const Linear<Stack>& linear) noexcept {
    return linear.kernel == Kernel::kManyTokens ||
           (linear.kernel == Kernel::kAuto && linear.tokens > few_tokens_of_linear(linear.weight));
}
template <typename Stack>
bool is_for_many(const Experts<Stack>& e) noexcept {
    const uint64_t choices = e.tokens * e.top_k, few_tokens = few_tokens_of(e.first);
    return e.kernel == Kernel::kManyTokens ||
           (e.kernel == Kernel::kAuto && (choices > kMostChoices || choices > few_tokens * e.first.experts));
}

// What the kernel for many tokens counts in: rows of x in 16 bits, its numbers in 32.
template <typename Stack>
Status check_many(const Experts<Stack>& e) noexcept {
    QMOE_TRY(check_choices(e, kMostChoicesOfMany));
    constexpr uint64_t kMostNumbers = 0xfffffffe;
    if (e.tokens * cols_of(e.first) <= kMostNumbers) return {};
    return Status::mismatch(Code::kNoKernel, "cuda: activations of one call", 0, kMostNumbers,
                            e.tokens * cols_of(e.first));
}

// What a launch has of a call as it is.
template <typename Launch, typename Stack>
void take_call(Launch& launch, const Experts<Stack>& e) noexcept {
    launch.tokens = static_cast<uint32_t>(e.tokens);
    launch.choices = {e.ids, launch.tokens, static_cast<uint32_t>(e.first.experts), Divisor(e.top_k)};
    launch.weights = e.weights;
    launch.weights_type = e.weights_type;
    launch.gate = e.gate;
    launch.y = e.y;
    launch.projections[0].is_first = true;
    launch.projections[0].x = e.x;
    launch.projections[0].bias = e.first_bias;
    launch.projections[1].bias = e.second_bias;
}

// Tokens of a linear layer in parts of at most `most`, as even as can be: launch(first, count).
template <typename Launch>
Status in_parts(uint64_t tokens, uint64_t most, const Launch& launch) noexcept {
    const uint64_t parts = ceil_div(tokens, most);
    for (uint64_t i = 0, first = 0; i < parts; ++i) {
        const uint64_t last = tokens * (i + 1) / parts;
        QMOE_TRY(launch(first, last - first));
        first = last;
    }
    return {};
}
inline constexpr uint64_t kMostTokensOfMany = 1 << 16;  // of a linear layer, of one launch

// Parts of a workspace are whole lines of memory: what is written in parts of its sectors has to be read before. Where tiles
// of ternary codes began anywhere, making them took more than twice as long.
inline uint64_t whole_lines(uint64_t bytes) noexcept {
    return ceil_div(bytes, uint64_t{128}) * 128;
}
inline Status check_workspace(uint64_t needed, const void* workspace, uint64_t given) noexcept {
    if (given < needed) return Status::mismatch(Code::kShape, "cuda: bytes of the workspace", 0, needed, given);
    return needed == 0 || reinterpret_cast<uintptr_t>(workspace) % 16 == 0
               ? Status{}
               : Status::error(Code::kValue, "cuda: the workspace must be aligned to 16 bytes");
}

}  // namespace qmoe::cuda
