// Products of `int` stacks: a linear layer, and a layer's experts.
#include "experts/check.cuh"
#include "int/few_tokens.cuh"

namespace qmoe::cuda {

QMOE_FEW_TOKENS(extern, 2)
QMOE_FEW_TOKENS(extern, 3)
QMOE_FEW_TOKENS(extern, 4)
QMOE_FEW_TOKENS(extern, 8)

namespace {

Status tiles_of(const IntStack& stack, Projection& p, IntTiles& tiles) noexcept {
    const IntLayout stored(stack.spec, stack.rows, stack.cols);
    if (!has_tiles(stored)) return Status::error(Code::kNoKernel, "cuda: there are no tiles of this matrix");
    if (reinterpret_cast<uintptr_t>(stack.tiles) % 16 != 0)
        return Status::error(Code::kValue, "cuda: tiles must be aligned to 16 bytes");
    tiles = IntTiles(stored, stack.order);
    p.tiles = static_cast<const uint8_t*>(stack.tiles);
    p.expert_bytes = tiles.bytes;
    p.scales_at = tiles.scales_at;
    p.rows = static_cast<uint32_t>(tiles.rows);
    p.cols = static_cast<uint32_t>(tiles.cols);
    p.count = Divisor(tiles.tiles);
    p.all_blocks = p.blocks = static_cast<uint32_t>(tiles.blocks);
    p.zero = tiles.zero;
    p.order = stack.order;
    return {};
}

void set_format(FewTokens& call, const IntTiles& tiles) noexcept {
    call.groups = tiles.groups == 0 ? 1 : tiles.groups;
    call.row_groups = tiles.groups == 0;
    call.scale_bytes = tiles.scale_bytes;
    call.has_zeros = tiles.has_zeros;
    call.bf16_scales = tiles.scale_type == ScaleType::kBfloat16;
}

// Whether one launch can have both.
bool alike(const IntTiles& a, const IntTiles& b) noexcept {
    return a.bits == b.bits && a.groups == b.groups && a.has_zeros == b.has_zeros && a.scale_type == b.scale_type;
}

template <bool kExperts>
Status launch_type(const FewTokens& call, uint32_t bits, OutputType type, const Device& device,
                   cudaStream_t stream) noexcept {
    const auto with = [&]<typename T>(T) {
        switch (bits) {
            case 2: return launch_few_tokens<T, 2, kExperts>(call, device, stream);
            case 3: return launch_few_tokens<T, 3, kExperts>(call, device, stream);
            case 4: return launch_few_tokens<T, 4, kExperts>(call, device, stream);
            default: return launch_few_tokens<T, 8, kExperts>(call, device, stream);
        }
    };
    switch (type) {
        case OutputType::kFloat16: return with(__half{});
        case OutputType::kBfloat16: return with(__nv_bfloat16{});
        default: return Status::error(Code::kDtype, "cuda: activations are float16 or bfloat16");
    }
}

// Where the outputs of both projections, one per choice, are in the workspace.
struct Workspace {
    uint64_t width, choices, second_at, bytes;

    explicit Workspace(const IntExperts& e) noexcept : width(width_of(e)), choices(e.tokens * e.top_k) {
        second_at = ceil_div(choices * width * 2, 16) * 16;
        bytes = second_at + choices * e.second.rows * sizeof(float);
    }
};

}  // namespace

Status linear_int(const IntLinear& linear, cudaStream_t stream) noexcept {
    QMOE_TRY(check_linear(linear));
    QMOE_TRY(check_no_kernel_for_many(linear.kernel));
    if (linear.tokens == 0) return {};
    FewTokens call{};
    Projection& p = call.projections[0];
    IntTiles tiles;
    QMOE_TRY(tiles_of(linear.weight, p, tiles));
    set_format(call, tiles);
    Device device{};
    QMOE_TRY(Device::current(device));
    call.count = 1;
    p.bias = linear.bias;
    const uint64_t launches = ceil_div(linear.tokens, uint64_t{16});
    for (uint64_t i = 0, first = 0; i < launches; ++i) {
        const uint64_t last = linear.tokens * (i + 1) / launches;
        call.tokens = static_cast<uint32_t>(last - first);
        p.x = static_cast<const uint16_t*>(linear.x) + first * p.cols;
        p.y = static_cast<uint16_t*>(linear.y) + first * p.rows;
        QMOE_TRY(launch_type<false>(call, tiles.bits, linear.type, device, stream));
        first = last;
    }
    return {};
}

Status workspace_int(const IntExperts& experts, uint64_t* bytes) noexcept {
    QMOE_TRY(check_experts(experts));
    QMOE_TRY(check_choices(experts, kMostChoices));
    *bytes = Workspace(experts).bytes;
    return {};
}

Status experts_int(const IntExperts& e, cudaStream_t stream) noexcept {
    QMOE_TRY(check_experts(e));
    QMOE_TRY(check_choices(e, kMostChoices));
    QMOE_TRY(check_no_kernel_for_many(e.kernel));
    const Workspace room(e);
    QMOE_TRY(check_workspace(room.bytes, e.workspace_bytes));
    if (e.tokens == 0) return {};
    Device device{};
    QMOE_TRY(Device::current(device));
    FewTokens call{};
    Projection &first = call.projections[0], &second = call.projections[1];
    IntTiles first_tiles, second_tiles;
    QMOE_TRY(tiles_of(e.first, first, first_tiles));
    QMOE_TRY(tiles_of(e.second, second, second_tiles));
    set_format(call, first_tiles);
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
    second.x = e.workspace;
    second.bias = e.second_bias;
    second.y = static_cast<uint8_t*>(e.workspace) + room.second_at;
    if (alike(first_tiles, second_tiles)) {
        call.count = 2;
        return launch_type<true>(call, first_tiles.bits, e.type, device, stream);
    }
    call.count = 1;
    FewTokens behind = call;
    behind.projections[0] = second;
    set_format(behind, second_tiles);
    QMOE_TRY(launch_type<true>(call, first_tiles.bits, e.type, device, stream));
    QMOE_TRY(launch_type<true>(behind, second_tiles.bits, e.type, device, stream));
    return launch_combine(call.choices, second.y, e.y, e.type, second.rows, device, stream);
}

}  // namespace qmoe::cuda
