// Products of `ternary` stacks: a linear layer, and a layer's experts.
#include "experts/check.cuh"
#include "ternary/few_tokens.cuh"
#include "ternary/gemm.cuh"
#include "ternary/stack.cuh"
#include "ternary/strips.cuh"

namespace qmoe::cuda {

QMOE_TERNARY_FEW_TOKENS(extern, 3)
QMOE_TERNARY_FEW_TOKENS(extern, 4)
QMOE_TERNARY_FEW_TOKENS(extern, 5)
QMOE_TERNARY_FEW_TOKENS(extern, 6)
QMOE_TERNARY_FEW_TOKENS(extern, 7)

namespace {

Status projection_of(const TernaryStack& stack, TernaryProjection& p) noexcept {
    QMOE_TRY(view_of(stack, p));
    p.groups = Divisor(ceil_div(uint64_t{p.rows}, uint64_t{p.group_rows}));
    return {};
}

template <bool kExperts>
Status launch_type(const TernaryFewTokens& call, OutputType type, const Device& device, cudaStream_t stream) noexcept {
    return with_activation_type(type, [&]<typename T>(T) {
        switch (call.projections[call.begin].gap_bits) {
            case 3: return launch_ternary<T, 3, kExperts>(call, device, stream);
            case 4: return launch_ternary<T, 4, kExperts>(call, device, stream);
            case 5: return launch_ternary<T, 5, kExperts>(call, device, stream);
            case 6: return launch_ternary<T, 6, kExperts>(call, device, stream);
            default: return launch_ternary<T, 7, kExperts>(call, device, stream);
        }
    });
}

// What the first projection leaves, (choices, its rows) float32, and behind it what the second one does.
struct Workspace {
    uint64_t second_at, bytes;

    explicit Workspace(const TernaryExperts& e) noexcept {
        const uint64_t choices = e.tokens * e.top_k;
        second_at = whole_lines(choices * e.first.shape.rows * sizeof(float));
        bytes = second_at + choices * e.second.shape.rows * sizeof(float);
    }
};

// Of many tokens: the tiles that streams become.
struct ManyOfLinear {
    GemmPlan plan;
    TernaryExpansion expansion{};
    uint64_t sums_at = 0, bytes = 0;

    Status make(const TernaryLinear& linear, const Device& device) noexcept {
        QMOE_TRY(plan.make(linear.weight.shape.rows, linear.weight.shape.cols, linear.tokens, device));
        QMOE_TRY(view_of(linear.weight, expansion.stacks[0]));
        expansion.count = 1, expansion.last = 1;
        expansion.matrices[0] = ternary_tiles(expansion.stacks[0]);
        sums_at = whole_lines(expansion.matrices[0].expert_bytes);
        bytes = sums_at + plan.sums_bytes(device);
        return {};
    }
};
// And a schedule, activations in its order, outputs of both projections, partial sums.
struct ManyOfExperts {
    static constexpr uint64_t kMostTilesBytes = 512 << 20;

    GemmPlan plan;
    TernaryExpansion expansion{};
    uint32_t at_once = 0;  // experts that there are tiles of
    uint64_t tiles_at[2]{}, gathered_at = 0, first_at = 0, second_at = 0, sums_at = 0, bytes = 0;

    Status make(const TernaryExperts& e, const Device& device) noexcept {
        const uint64_t choices = e.tokens * e.top_k;
        QMOE_TRY(plan.make_for_experts(choices, e.first.experts));
        QMOE_TRY(view_of(e.first, expansion.stacks[0]));
        QMOE_TRY(view_of(e.second, expansion.stacks[1]));
        TiledMatrix &first = expansion.matrices[0], &second = expansion.matrices[1];
        first = ternary_tiles(expansion.stacks[0]), second = ternary_tiles(expansion.stacks[1]);
        const uint64_t fit = kMostTilesBytes / (first.expert_bytes + second.expert_bytes);
        at_once = static_cast<uint32_t>(fit == 0 ? 1 : fit < e.first.experts ? fit : e.first.experts);
        expansion.count = 2, expansion.scheduled = true;
        expansion.most_products = GemmSchedule::most_products(choices, e.first.experts, plan.most);
        tiles_at[0] = whole_lines(GemmSchedule::bytes(choices, expansion.most_products));
        tiles_at[1] = tiles_at[0] + whole_lines(at_once * first.expert_bytes);
        gathered_at = tiles_at[1] + whole_lines(at_once * second.expert_bytes);
        first_at = gathered_at + whole_lines(plan.gathered_bytes_of(choices, e.first.shape.cols));
        second_at = first_at + whole_lines(choices * width_of(e) * 2);
        sums_at = second_at + whole_lines(choices * e.second.shape.rows * 2);
        bytes = sums_at + plan.sums_bytes(device);
        return {};
    }
};

Status launch_many(const Gemm& call, OutputType type, const Device& device, cudaStream_t stream) noexcept {
    return with_activation_type(type, [&]<typename T>(T) { return launch_ternary_gemm<T>(call, device, stream); });
}

Status linear_few(const TernaryLinear& linear, const Device& device, cudaStream_t stream) noexcept {
    TernaryFewTokens call{};
    TernaryProjection& p = call.projections[0];
    QMOE_TRY(projection_of(linear.weight, p));
    call.end = 1;
    p.bias = linear.bias;
    const uint64_t at_once = linear.type == OutputType::kFloat16 ? tokens_at_once<__half>(call, device)
                                                                 : tokens_at_once<__nv_bfloat16>(call, device);
    return in_parts(linear.tokens, at_once, [&](uint64_t first, uint64_t count) {
        call.tokens = static_cast<uint32_t>(count);
        p.x = static_cast<const uint16_t*>(linear.x) + first * p.cols;
        p.y = static_cast<uint16_t*>(linear.y) + first * p.rows;
        return launch_type<false>(call, linear.type, device, stream);
    });
}

// Up to 16 tokens at a time; `launched` is false where there is no room for as many.
Status linear_strips(const TernaryLinear& linear, const Device& device, cudaStream_t stream, bool& launched) noexcept {
    StripTokens call{};
    QMOE_TRY(view_of(linear.weight, call));
    call.bias = linear.bias;
    // Of the parts the last one has most tokens: if there is room for it, there was for all.
    return in_parts(linear.tokens, 16, [&](uint64_t first, uint64_t count) {
        call.tokens = static_cast<uint32_t>(count);
        call.x = static_cast<const uint16_t*>(linear.x) + first * call.cols;
        call.y = static_cast<uint16_t*>(linear.y) + first * call.rows;
        return launch_strips(call, linear.type, device, stream, launched);
    });
}

Status linear_many(const TernaryLinear& linear, const Device& device, cudaStream_t stream) noexcept {
    ManyOfLinear many;
    QMOE_TRY(many.make(linear, device));
    QMOE_TRY(check_workspace(many.bytes, linear.workspace, linear.workspace_bytes));
    uint8_t* const room = static_cast<uint8_t*>(linear.workspace);
    many.expansion.matrices[0].tiles = room;
    QMOE_TRY(launch_expansion(many.expansion, device, stream));
    Gemm call{};
    GemmProjection& p = call.projections[0];
    static_cast<TiledMatrix&>(p) = many.expansion.matrices[0];
    call.end = 1;
    call.codes_are_new = true;
    p.bias = linear.bias;
    return in_parts(linear.tokens, kMostTokensOfMany, [&](uint64_t first, uint64_t count) {
        call.tokens = static_cast<uint32_t>(count);
        p.x = static_cast<const uint16_t*>(linear.x) + first * p.cols;
        p.y = static_cast<uint16_t*>(linear.y) + first * p.rows;
        many.plan.put(call, room + many.sums_at, device);
        return launch_many(call, linear.type, device, stream);
    });
}

Status experts_many(const TernaryExperts& e, const Device& device, cudaStream_t stream) noexcept {
    ManyOfExperts many;
    QMOE_TRY(many.make(e, device));
    QMOE_TRY(check_workspace(many.bytes, e.workspace, e.workspace_bytes));
    uint8_t* const room = static_cast<uint8_t*>(e.workspace);
    TernaryExpansion& expansion = many.expansion;
    Gemm call{};
    for (uint32_t i = 0; i < 2; ++i) {
        expansion.matrices[i].tiles = room + many.tiles_at[i];
        static_cast<TiledMatrix&>(call.projections[i]) = expansion.matrices[i];
    }
    GemmProjection &first = call.projections[0], &second = call.projections[1];
    call.end = 2;
    call.experts = true, call.codes_are_new = true;
    take_call(call, e);
    call.most_products = expansion.most_products;
    call.schedule = expansion.schedule = GemmSchedule(room, expansion.most_products);
    first.y = room + many.first_at;
    second.x = first.y;
    second.y = room + many.second_at;
    many.plan.put(call, room + many.sums_at, device);
    QMOE_TRY(launch_preparation(call, room + many.gathered_at, device, stream));
    for (uint32_t done = 0; done < call.choices.experts; done = call.last_expert) {
        call.first_expert = expansion.first = done;
        call.last_expert = expansion.last = std::min(done + many.at_once, call.choices.experts);
        QMOE_TRY(launch_expansion(expansion, device, stream));
        QMOE_TRY(launch_many(call, e.type, device, stream));
    }
    return {};
}

}  // namespace

Status linear_workspace_ternary(const TernaryLinear& linear, uint64_t* bytes) noexcept {
    QMOE_TRY(check_linear(linear));
    *bytes = 0;
    if (linear.tokens == 0 || !is_for_many(linear)) return {};
    Device device{};
    QMOE_TRY(Device::current(device));
    ManyOfLinear many;
    QMOE_TRY(many.make(linear, device));
    *bytes = many.bytes;
    return {};
}

Status linear_ternary(const TernaryLinear& linear, cudaStream_t stream) noexcept {
    QMOE_TRY(check_linear(linear));
    if (linear.tokens == 0) return {};
    Device device{};
    QMOE_TRY(Device::current(device));
    if (is_for_many(linear)) return linear_many(linear, device, stream);
    bool launched = false;
    if (linear.tokens > kMostTokensToWalk) QMOE_TRY(linear_strips(linear, device, stream, launched));
    return launched ? Status{} : linear_few(linear, device, stream);
}

Status workspace_ternary(const TernaryExperts& experts, uint64_t* bytes) noexcept {
    QMOE_TRY(check_experts(experts));
    *bytes = 0;
    if (experts.tokens == 0) return {};
    if (!is_for_many(experts)) {
        QMOE_TRY(check_choices(experts, kMostChoices));
        *bytes = Workspace(experts).bytes;
        return {};
    }
    QMOE_TRY(check_many(experts));
    Device device{};
    QMOE_TRY(Device::current(device));
    ManyOfExperts many;
    QMOE_TRY(many.make(experts, device));
    *bytes = many.bytes;
    return {};
}

Status experts_ternary(const TernaryExperts& e, cudaStream_t stream) noexcept {
    QMOE_TRY(check_experts(e));
    if (e.tokens == 0) return {};
    Device device{};
    QMOE_TRY(Device::current(device));
    if (is_for_many(e)) {
        QMOE_TRY(check_many(e));
        return experts_many(e, device, stream);
    }
    QMOE_TRY(check_choices(e, kMostChoices));
    const Workspace room(e);
    QMOE_TRY(check_workspace(room.bytes, e.workspace, e.workspace_bytes));
    TernaryFewTokens call{};
    TernaryProjection &first = call.projections[0], &second = call.projections[1];
    QMOE_TRY(projection_of(e.first, first));
    QMOE_TRY(projection_of(e.second, second));
    take_call(call, e);
    first.y = e.workspace;
    second.y = static_cast<uint8_t*>(e.workspace) + room.second_at;
    call.end = 2;
    if (first.gap_bits == second.gap_bits) return launch_type<true>(call, e.type, device, stream);
    call.end = 1;
    QMOE_TRY(launch_type<true>(call, e.type, device, stream));
    call.begin = 1, call.end = 2;
    QMOE_TRY(launch_type<true>(call, e.type, device, stream));
    return launch_combine(call.choices, second.y, e.y, e.type, second.rows, device, stream);
}

}  // namespace qmoe::cuda
