// Products of `int` stacks: a linear layer, and a layer's experts.
#include "int/few_tokens.cuh"

namespace qmoe::cuda {

QMOE_FEW_TOKENS(extern, 2)
QMOE_FEW_TOKENS(extern, 3)
QMOE_FEW_TOKENS(extern, 4)
QMOE_FEW_TOKENS(extern, 8)

namespace {

constexpr uint32_t kCombineThreads = 256;

Status tiles_of(const IntStack& stack, FewTokens& p, uint32_t& bits) noexcept {
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
    p.count = static_cast<uint32_t>(tiles.tiles);
    p.blocks = static_cast<uint32_t>(tiles.blocks);
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
Status launch_type(const FewTokens& p, uint32_t bits, OutputType type, const Device& device,
                   cudaStream_t stream) noexcept {
    const auto with = [&]<typename T>(T) {
        switch (bits) {
            case 2: return launch_few_tokens<T, 2, kExperts>(p, device, stream);
            case 3: return launch_few_tokens<T, 3, kExperts>(p, device, stream);
            case 4: return launch_few_tokens<T, 4, kExperts>(p, device, stream);
            default: return launch_few_tokens<T, 8, kExperts>(p, device, stream);
        }
    };
    switch (type) {
        case OutputType::kFloat16: return with(__half{});
        case OutputType::kBfloat16: return with(__nv_bfloat16{});
        default: return Status::error(Code::kDtype, "cuda: activations are float16 or bfloat16");
    }
}

// y[t] from what the second projection made of each choice, weights included. A thread per four columns of a token.
template <typename T>
__global__ __launch_bounds__(kCombineThreads) void combine(const float* __restrict__ choices, const int64_t* ids,
                                                           T* __restrict__ y, uint32_t tokens, uint32_t top_k,
                                                           uint32_t experts, uint32_t cols) {
    wait_for_previous();
    let_next_begin();
    const uint32_t col = (blockIdx.x * kCombineThreads + threadIdx.x) * 4, token = blockIdx.y;
    if (col >= cols) return;
    const uint32_t count = min(cols - col, 4u);
    float sum[4] = {};
    for (uint32_t j = 0; j < top_k; ++j) {
        const uint64_t choice = uint64_t{token} * top_k + j;
        const int64_t id = ids[choice];
        if (id < 0 || id >= experts) continue;
        const float* const from = choices + choice * cols + col;
        if (cols % 4 == 0) {
            const float4 more = *reinterpret_cast<const float4*>(from);
            sum[0] += more.x, sum[1] += more.y, sum[2] += more.z, sum[3] += more.w;
        } else {
            for (uint32_t i = 0; i < count; ++i) sum[i] += from[i];
        }
    }
    for (uint32_t i = 0; i < count; ++i) y[uint64_t{token} * cols + col + i] = from_float<T>(sum[i]);
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
Status launch_combine(const IntExperts& e, const Device& device, cudaStream_t stream) noexcept {
    const auto cols = static_cast<uint32_t>(e.second.rows);
    const auto* const choices =
        reinterpret_cast<const float*>(static_cast<uint8_t*>(e.workspace) + Workspace(e).second_at);
    const dim3 grid(ceil_div(cols, 4 * kCombineThreads), static_cast<uint32_t>(e.tokens));
    return launch(combine<T>, grid, kCombineThreads, 0, device.overlaps, stream, choices, e.ids, static_cast<T*>(e.y),
                  static_cast<uint32_t>(e.tokens), static_cast<uint32_t>(e.top_k),
                  static_cast<uint32_t>(e.first.experts), cols);
}

}  // namespace

Status linear_int(const IntLinear& linear, cudaStream_t stream) noexcept {
    if (linear.weight.experts != 1 || linear.weight.order != RowOrder::kPlain)
        return Status::error(Code::kValue, "cuda: a linear layer has one matrix, without a gate");
    if (linear.tokens == 0) return {};
    FewTokens p{};
    uint32_t bits = 0;
    QMOE_TRY(tiles_of(linear.weight, p, bits));
    Device device{};
    QMOE_TRY(Device::current(device));
    p.bias = linear.bias;
    const uint64_t launches = ceil_div(linear.tokens, uint64_t{16});
    for (uint64_t i = 0, first = 0; i < launches; ++i) {
        const uint64_t last = linear.tokens * (i + 1) / launches;
        p.tokens = p.most = static_cast<uint32_t>(last - first);
        p.x = static_cast<const uint16_t*>(linear.x) + first * p.cols;
        p.y = static_cast<uint16_t*>(linear.y) + first * p.rows;
        QMOE_TRY(launch_type<false>(p, bits, linear.type, device, stream));
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
    FewTokens first{}, second{};
    uint32_t first_bits = 0, second_bits = 0;
    QMOE_TRY(tiles_of(e.first, first, first_bits));
    QMOE_TRY(tiles_of(e.second, second, second_bits));
    first.tokens = second.tokens = static_cast<uint32_t>(e.tokens);
    first.most = second.most = static_cast<uint32_t>(e.tokens < 16 ? e.tokens : 16);
    first.ids = second.ids = e.ids;
    first.weights = second.weights = e.weights;
    first.weights_type = second.weights_type = e.weights_type;
    first.experts = second.experts = static_cast<uint32_t>(e.first.experts);
    first.top_k = second.top_k = static_cast<uint32_t>(e.top_k);
    first.gate = second.gate = e.gate;
    first.is_first = true;
    first.x = e.x;
    first.bias = e.first_bias;
    first.y = e.workspace;
    second.x = e.workspace;
    second.bias = e.second_bias;
    second.y = static_cast<uint8_t*>(e.workspace) + room.second_at;
    QMOE_TRY(launch_type<true>(first, first_bits, e.type, device, stream));
    QMOE_TRY(launch_type<true>(second, second_bits, e.type, device, stream));
    return e.type == OutputType::kFloat16 ? launch_combine<__half>(e, device, stream)
                                          : launch_combine<__nv_bfloat16>(e, device, stream);
}

}  // namespace qmoe::cuda
