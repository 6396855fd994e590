// Products of `int` stacks: a linear layer, and a layer's experts.
#include "int/few_tokens.cuh"

namespace qmoe::cuda {

QMOE_FEW_TOKENS(extern, 2)
QMOE_FEW_TOKENS(extern, 3)
QMOE_FEW_TOKENS(extern, 4)
QMOE_FEW_TOKENS(extern, 8)

namespace {

constexpr uint32_t kCombineThreads = 256;

Status tiles_of(const IntStack& stack, Projection& p, uint32_t& bits) noexcept {
    const IntLayout stored(stack.spec, stack.rows, stack.cols);
    if (!has_tiles(stored)) return Status::error(Code::kNoKernel, "cuda: there are no tiles of this matrix");
    if (reinterpret_cast<uintptr_t>(stack.tiles) % 16 != 0)
        return Status::error(Code::kValue, "cuda: tiles must be aligned to 16 bytes");
    const IntTiles tiles(stored, stack.order);
    p.tiles = static_cast<const uint8_t*>(stack.tiles);
    p.expert_bytes = tiles.bytes;
    p.tile_bytes = tiles.tile_bytes;
    p.block_bytes = tiles.block_bytes;
    p.rows = static_cast<uint32_t>(tiles.rows);
    p.cols = static_cast<uint32_t>(tiles.cols);
    p.count = Divisor(tiles.tiles);
    p.blocks = Divisor(tiles.blocks);
    p.groups = tiles.groups == 0 ? 1 : tiles.groups;
    p.zero = tiles.zero;
    p.has_zeros = tiles.has_zeros;
    p.bf16_scales = tiles.scale_type == ScaleType::kBfloat16;
    p.row_groups = tiles.groups == 0;
    p.order = stack.order;
    bits = tiles.bits;
    return {};
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

// Sums over the choices of each token, where they are not those of few_tokens.
template <typename T>
__global__ __launch_bounds__(kCombineThreads) void combine_choices(const __grid_constant__ FewTokens call) {
    wait_for_previous();
    let_next_begin();
    const uint32_t cols = call.projections[0].rows, col = (blockIdx.x * kCombineThreads + threadIdx.x) * 4;
    if (col < cols)
        combine(call, static_cast<const float*>(call.projections[0].y), static_cast<T*>(call.y), blockIdx.y, col, cols);
}

// Where the outputs of both projections, one per choice, are in the workspace.
struct Workspace {
    uint64_t width, choices, second_at, bytes;

    explicit Workspace(const IntExperts& e) noexcept
        : width(e.first.order == RowOrder::kPlain ? e.first.rows : e.first.rows / 2), choices(e.tokens * e.top_k) {
        second_at = ceil_div(choices * width * 2, 16) * 16;
        bytes = second_at + choices * e.second.rows * sizeof(float);
    }
};

Status check_experts(const IntExperts& e) noexcept {
    const Workspace room(e);
    if (e.second.order != RowOrder::kPlain)
        return Status::error(Code::kValue, "cuda: the second projection has no gate");
    if (e.first.experts != e.second.experts || e.first.experts == 0)
        return Status::mismatch(Code::kShape, "cuda: experts of both projections", 0, e.first.experts,
                                e.second.experts);
    if (e.first.experts >= 0xffff)
        return Status::mismatch(Code::kNoKernel, "cuda: experts of a layer", 0, 0xfffe, e.first.experts);
    if (e.second.cols != room.width)
        return Status::mismatch(Code::kShape, "cuda: columns of the second projection", 0, room.width, e.second.cols);
    if (e.second.rows != e.first.cols)
        return Status::mismatch(Code::kShape, "cuda: rows of the second projection", 0, e.first.cols, e.second.rows);
    if (room.choices > kMostChoices)
        return Status::mismatch(Code::kNoKernel, "cuda: choices of one call", 0, kMostChoices, room.choices);
    return {};
}

template <typename T>
Status launch_combine(const FewTokens& call, const Device& device, cudaStream_t stream) noexcept {
    const dim3 grid(ceil_div(call.projections[0].rows, 4 * kCombineThreads), call.tokens);
    return launch(combine_choices<T>, grid, kCombineThreads, 0, false, device, stream, call);
}

}  // namespace

Status linear_int(const IntLinear& linear, cudaStream_t stream) noexcept {
    if (linear.weight.experts != 1 || linear.weight.order != RowOrder::kPlain)
        return Status::error(Code::kValue, "cuda: a linear layer has one matrix, without a gate");
    if (linear.tokens == 0) return {};
    FewTokens call{};
    Projection& p = call.projections[0];
    uint32_t bits = 0;
    QMOE_TRY(tiles_of(linear.weight, p, bits));
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
        QMOE_TRY(launch_type<false>(call, bits, linear.type, device, stream));
        first = last;
    }
    return {};
}

Status experts_workspace(const IntExperts& experts, uint64_t* bytes) noexcept {
    QMOE_TRY(check_experts(experts));
    *bytes = Workspace(experts).bytes;
    return {};
}

Status experts_int(const IntExperts& e, cudaStream_t stream) noexcept {
    QMOE_TRY(check_experts(e));
    const Workspace room(e);
    if (e.workspace_bytes < room.bytes)
        return Status::mismatch(Code::kShape, "cuda: bytes of the workspace", 0, room.bytes, e.workspace_bytes);
    if (e.tokens == 0) return {};
    Device device{};
    QMOE_TRY(Device::current(device));
    FewTokens call{};
    Projection &first = call.projections[0], &second = call.projections[1];
    uint32_t first_bits = 0, second_bits = 0;
    QMOE_TRY(tiles_of(e.first, first, first_bits));
    QMOE_TRY(tiles_of(e.second, second, second_bits));
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
    // A ring has slots of one size, and kernels are for one number of bits and groups.
    if (first_bits == second_bits && first.block_bytes == second.block_bytes && first.groups == second.groups) {
        call.count = 2;
        return launch_type<true>(call, first_bits, e.type, device, stream);
    }
    call.count = 1;
    FewTokens behind = call;
    behind.projections[0] = second;
    QMOE_TRY(launch_type<true>(call, first_bits, e.type, device, stream));
    QMOE_TRY(launch_type<true>(behind, second_bits, e.type, device, stream));
    return e.type == OutputType::kFloat16 ? launch_combine<__half>(behind, device, stream)
                                          : launch_combine<__nv_bfloat16>(behind, device, stream);
}

}  // namespace qmoe::cuda
