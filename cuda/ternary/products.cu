// Products of `ternary` stacks: a linear layer, and a layer's experts.
#include "experts/check.cuh"
#include "ternary/few_tokens.cuh"
#include "ternary/many_tokens.cuh"
#include "ternary/stack.cuh"

namespace qmoe::cuda {

QMOE_TERNARY_FEW_TOKENS(extern, 3)
QMOE_TERNARY_FEW_TOKENS(extern, 4)
QMOE_TERNARY_FEW_TOKENS(extern, 5)
QMOE_TERNARY_FEW_TOKENS(extern, 6)
QMOE_TERNARY_FEW_TOKENS(extern, 7)
QMOE_TERNARY_MANY_TOKENS(extern, 16)
QMOE_TERNARY_MANY_TOKENS(extern, 32)
QMOE_TERNARY_MANY_TOKENS(extern, 64)
QMOE_TERNARY_MANY_TOKENS(extern, 128)
QMOE_TERNARY_MANY_TOKENS(extern, 256)

namespace {

Status projection_of(const TernaryStack& stack, TernaryProjection& p) noexcept {
    QMOE_TRY(view_of(stack, p));
    p.groups = Divisor(ceil_div(uint64_t{p.rows}, uint64_t{p.group_rows}));
    return {};
}

template <bool kExperts>
Status launch_type(const TernaryFewTokens& call, OutputType type, const Device& device, cudaStream_t stream) noexcept {
    const auto with = [&]<typename T>(T) {
        switch (call.projections[call.begin].gap_bits) {
            case 3: return launch_ternary<T, 3, kExperts>(call, device, stream);
            case 4: return launch_ternary<T, 4, kExperts>(call, device, stream);
            case 5: return launch_ternary<T, 5, kExperts>(call, device, stream);
            case 6: return launch_ternary<T, 6, kExperts>(call, device, stream);
            default: return launch_ternary<T, 7, kExperts>(call, device, stream);
        }
    };
    switch (type) {
        case OutputType::kFloat16: return with(__half{});
        case OutputType::kBfloat16: return with(__nv_bfloat16{});
        default: return Status::error(Code::kDtype, "cuda: activations are float16 or bfloat16");
    }
}

// What the first projection leaves, (choices, its rows) float32, and behind it what the second one does.
struct Workspace {
    uint64_t second_at, bytes;

    explicit Workspace(const TernaryExperts& e) noexcept {
        const uint64_t choices = e.tokens * e.top_k;
        second_at = aligned(choices * e.first.shape.rows * sizeof(float));
        bytes = second_at + choices * e.second.shape.rows * sizeof(float);
    }
    static uint64_t aligned(uint64_t bytes) noexcept { return ceil_div(bytes, uint64_t{16}) * 16; }
};

constexpr uint64_t kMostTokensOfMany = 4096;  // of a linear layer, of one launch

// Calls with(n) for the smallest tile of at least `tokens` tokens, or the largest that this device has room for.
// E_NO_KERNEL where it has none for any.
template <typename With>
Status with_tile(uint64_t tokens, const Device& device, const With& with) noexcept {
    const auto fits = [&]<uint32_t kN>() { return kTernaryShared<kN> <= device.shared; };
    if (tokens > 128 && fits.template operator()<256>()) return with.template operator()<256>();
    if (tokens > 64 && fits.template operator()<128>()) return with.template operator()<128>();
    if (tokens > 32 && fits.template operator()<64>()) return with.template operator()<64>();
    if (tokens > 16 && fits.template operator()<32>()) return with.template operator()<32>();
    if (fits.template operator()<16>()) return with.template operator()<16>();
    return Status::error(Code::kNoKernel, "cuda: shared memory of a block is too small for many tokens");
}

// Tokens of a product, most often: some experts have more than others.
uint64_t tokens_of_expert(const TernaryExperts& e) noexcept {
    return ceil_div(2 * e.tokens * e.top_k, e.first.experts);
}

Status tile_for(uint64_t tokens, const Device& device, uint64_t& tile) noexcept {
    return with_tile(tokens, device, [&]<uint32_t kN>() {
        tile = kN;
        return Status{};
    });
}

Status tiles_of(const TernaryStack& stack, TernaryTiles& p) noexcept {
    QMOE_TRY(view_of(stack, p));
    p.windows = static_cast<uint32_t>(ceil_div(uint64_t{p.rows}, uint64_t{TernaryTile::kRows}));
    p.chunks = static_cast<uint32_t>(ceil_div(uint64_t{p.all_slots}, uint64_t{TernaryTile::kChunk}));
    p.splits = 1;
    return {};
}

// In how many parts rows are cut so that all multiprocessors have something to do: a part more costs about a chunk or two.
uint32_t splits_for(const TernaryTiles& p, uint64_t products, const Device& device) noexcept {
    uint32_t best = 1;
    double least = 0.0;
    for (uint32_t splits = 1; splits <= p.segments; ++splits) {
        const uint64_t rounds = ceil_div(products * p.windows * splits, uint64_t{device.multiprocessors});
        const double time = static_cast<double>(rounds) * (static_cast<double>(p.chunks) / splits + 6.0) +
                            (splits > 1 ? 8.0 + splits : 0.0);
        if (splits == 1 || time < least) best = splits, least = time;
    }
    return best;
}

// Of the operands of so many rows, in so many products.
uint64_t operand_bytes(const TernaryTiles& p, uint64_t rows, uint64_t products) noexcept {
    return TernaryProducts::padded_rows(rows, products) * p.chunks * TernaryTile::kChunk * sizeof(uint16_t);
}

// Of the kernel for many tokens: activations by slot, and sums.
struct ManyOfLinear {
    TernaryTiles tiles{};
    uint64_t tokens, tile, sums_at = 0, bytes = 0;

    Status make(const TernaryLinear& linear, const Device& device) noexcept {
        QMOE_TRY(tiles_of(linear.weight, tiles));
        tokens = linear.tokens < kMostTokensOfMany ? linear.tokens : kMostTokensOfMany;
        QMOE_TRY(tile_for(tokens, device, tile));
        tiles.splits = splits_for(tiles, ceil_div(tokens, tile), device);
        sums_at = operand_bytes(tiles, tokens, ceil_div(tokens, tile));
        bytes = sums_at + (tiles.splits > 1 ? tiles.splits * tokens * tiles.rows * sizeof(float) : 0);
        return {};
    }
};
struct ManyOfExperts {
    TernaryTiles first{}, second{};
    uint64_t x_at = 0, first_sums_at = 0, inner_at = 0, second_sums_at = 0, bytes = 0;

    Status make(const TernaryExperts& e, const Device& device) noexcept {
        QMOE_TRY(tiles_of(e.first, first));
        QMOE_TRY(tiles_of(e.second, second));
        uint64_t tile = 0;
        QMOE_TRY(tile_for(tokens_of_expert(e), device, tile));
        // Every expert that is chosen has a product, and one more for every tile that it fills.
        const uint64_t choices = e.tokens * e.top_k;
        const uint64_t products = (choices < e.first.experts ? choices : e.first.experts) + choices / tile;
        x_at = Workspace::aligned(
            Schedule::bytes(static_cast<uint32_t>(choices), static_cast<uint32_t>(e.first.experts)) + 4);
        first_sums_at = x_at + operand_bytes(first, choices, products);
        inner_at = first_sums_at + Workspace::aligned(choices * first.rows * sizeof(float));
        second_sums_at = inner_at + operand_bytes(second, choices, products);
        bytes = second_sums_at + choices * second.rows * sizeof(float);
        return {};
    }
};

template <typename Call>
Status launch_many(const Call& call, uint64_t tokens, OutputType type, const Device& device,
                   cudaStream_t stream) noexcept {
    return with_tile(tokens, device, [&]<uint32_t kN>() {
        switch (type) {
            case OutputType::kFloat16: return launch_ternary_tiles<__half, kN>(call, device, stream);
            case OutputType::kBfloat16: return launch_ternary_tiles<__nv_bfloat16, kN>(call, device, stream);
            default: return Status::error(Code::kDtype, "cuda: activations are float16 or bfloat16");
        }
    });
}

Status linear_many(const TernaryLinear& linear, const Device& device, cudaStream_t stream) noexcept {
    ManyOfLinear plan;
    QMOE_TRY(plan.make(linear, device));
    QMOE_TRY(check_workspace(plan.bytes, linear.workspace_bytes));
    TernaryManyTokens call{};
    TernaryTiles& p = call.projections[0] = plan.tiles;
    p.bias = linear.bias;
    p.x = static_cast<uint8_t*>(linear.workspace);
    p.sums = reinterpret_cast<float*>(static_cast<uint8_t*>(linear.workspace) + plan.sums_at);
    call.count = 1;
    for (uint64_t first = 0; first < linear.tokens; first += plan.tokens) {
        const uint64_t tokens = linear.tokens - first < plan.tokens ? linear.tokens - first : plan.tokens;
        call.tokens = static_cast<uint32_t>(tokens);
        call.x = static_cast<const uint16_t*>(linear.x) + first * p.cols;
        call.y = static_cast<uint16_t*>(linear.y) + first * p.rows;
        QMOE_TRY(launch_many(call, plan.tile, linear.type, device, stream));
    }
    return {};
}

Status experts_many(const TernaryExperts& e, const Device& device, cudaStream_t stream) noexcept {
    ManyOfExperts plan;
    QMOE_TRY(plan.make(e, device));
    QMOE_TRY(check_workspace(plan.bytes, e.workspace_bytes));
    uint8_t* const room = static_cast<uint8_t*>(e.workspace);
    TernaryManyTokens call{};
    call.projections[0] = plan.first, call.projections[1] = plan.second;
    TernaryTiles &first = call.projections[0], &second = call.projections[1];
    first.bias = e.first_bias, second.bias = e.second_bias;
    first.x = room + plan.x_at, second.x = room + plan.inner_at;
    first.sums = reinterpret_cast<float*>(room + plan.first_sums_at);
    second.sums = reinterpret_cast<float*>(room + plan.second_sums_at);
    call.count = 2;
    call.tokens = static_cast<uint32_t>(e.tokens);
    call.x = e.x, call.y = e.y;
    call.choices = {e.ids, call.tokens, static_cast<uint32_t>(e.first.experts), Divisor(e.top_k)};
    call.schedule = room;
    call.weights = e.weights, call.weights_type = e.weights_type;
    call.gate = e.gate;
    return launch_many(call, tokens_of_expert(e), e.type, device, stream);
}

}  // namespace

Status linear_workspace_ternary(const TernaryLinear& linear, uint64_t* bytes) noexcept {
    QMOE_TRY(check_linear(linear));
    Device device{};
    QMOE_TRY(Device::current(device));
    *bytes = 0;
    if (linear.tokens == 0 || linear.kernel != Kernel::kManyTokens) return {};
    ManyOfLinear plan;
    QMOE_TRY(plan.make(linear, device));
    *bytes = plan.bytes;
    return {};
}

Status linear_ternary(const TernaryLinear& linear, cudaStream_t stream) noexcept {
    QMOE_TRY(check_linear(linear));
    if (linear.tokens == 0) return {};
    Device device{};
    QMOE_TRY(Device::current(device));
    if (linear.kernel == Kernel::kManyTokens) return linear_many(linear, device, stream);
    TernaryFewTokens call{};
    TernaryProjection& p = call.projections[0];
    QMOE_TRY(projection_of(linear.weight, p));
    call.end = 1;
    p.bias = linear.bias;
    const uint64_t at_once = linear.type == OutputType::kFloat16 ? tokens_at_once<__half>(call, device)
                                                                 : tokens_at_once<__nv_bfloat16>(call, device);
    const uint64_t launches = ceil_div(linear.tokens, at_once);
    for (uint64_t i = 0, first = 0; i < launches; ++i) {
        const uint64_t last = linear.tokens * (i + 1) / launches;
        call.tokens = static_cast<uint32_t>(last - first);
        p.x = static_cast<const uint16_t*>(linear.x) + first * p.cols;
        p.y = static_cast<uint16_t*>(linear.y) + first * p.rows;
        QMOE_TRY(launch_type<false>(call, linear.type, device, stream));
        first = last;
    }
    return {};
}

Status workspace_ternary(const TernaryExperts& experts, uint64_t* bytes) noexcept {
    QMOE_TRY(check_experts(experts));
    Device device{};
    QMOE_TRY(Device::current(device));
    if (experts.kernel != Kernel::kManyTokens) {
        QMOE_TRY(check_choices(experts, kMostChoices));
        *bytes = Workspace(experts).bytes;
        return {};
    }
    QMOE_TRY(check_choices(experts, kMostChoicesOfMany));
    ManyOfExperts plan;
    QMOE_TRY(plan.make(experts, device));
    *bytes = plan.bytes;
    return {};
}

Status experts_ternary(const TernaryExperts& e, cudaStream_t stream) noexcept {
    QMOE_TRY(check_experts(e));
    if (e.tokens == 0) return {};
    Device device{};
    QMOE_TRY(Device::current(device));
    if (e.kernel == Kernel::kManyTokens) {
        QMOE_TRY(check_choices(e, kMostChoicesOfMany));
        return experts_many(e, device, stream);
    }
    QMOE_TRY(check_choices(e, kMostChoices));
    const Workspace room(e);
    QMOE_TRY(check_workspace(room.bytes, e.workspace_bytes));
    TernaryFewTokens call{};
    TernaryProjection &first = call.projections[0], &second = call.projections[1];
    QMOE_TRY(projection_of(e.first, first));
    QMOE_TRY(projection_of(e.second, second));
    call.tokens = static_cast<uint32_t>(e.tokens);
    call.choices = {e.ids, call.tokens, static_cast<uint32_t>(e.first.experts), Divisor(e.top_k)};
    call.weights = e.weights;
    call.weights_type = e.weights_type;
    call.gate = e.gate;
    call.y = e.y;
    first.is_first = true;
    first.x = e.x;
    first.bias = e.first_bias;
    first.y = e.workspace;
    second.bias = e.second_bias;
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
