// Products of `int` stacks: a linear layer, and a layer's experts.
#include "experts/check.cuh"
#include "int/gemm.cuh"
#include "int/launch_few_tokens.cuh"

namespace qmoe::cuda {

QMOE_FEW_TOKENS(extern, 2)
QMOE_FEW_TOKENS(extern, 3)
QMOE_FEW_TOKENS(extern, 4)
QMOE_FEW_TOKENS(extern, 8)
QMOE_INT_GEMM(extern, 2)
QMOE_INT_GEMM(extern, 3)
QMOE_INT_GEMM(extern, 4)
QMOE_INT_GEMM(extern, 8)

namespace {

Status tiles_of(const IntStack& stack, TiledMatrix& p, uint32_t& bits) noexcept {
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

// Calls with.operator()<T, kBits>() for a call's activations and bits.
template <typename With>
Status with_types(uint32_t bits, OutputType type, const With& with) noexcept {
    return with_activation_type(type, [&]<typename T>(T) {
        switch (bits) {
            case 2: return with.template operator()<T, 2>();
            case 3: return with.template operator()<T, 3>();
            case 4: return with.template operator()<T, 4>();
            default: return with.template operator()<T, 8>();
        }
    });
}

template <bool kExperts>
Status launch_few(const FewTokens& call, uint32_t bits, OutputType type, const Device& device,
                  cudaStream_t stream) noexcept {
    return with_types(bits, type, [&]<typename T, int kBits>() {
        return launch_few_tokens<T, kBits, kExperts>(call, device, stream);
    });
}

Status launch_many(const Gemm& call, uint32_t bits, OutputType type, const Device& device,
                   cudaStream_t stream) noexcept {
    return with_types(bits, type,
                      [&]<typename T, int kBits>() { return launch_int_gemm<T, kBits>(call, device, stream); });
}

// The workspace of the kernel for few tokens: the outputs of both projections, one per choice.
struct FewWorkspace {
    uint64_t second_at, bytes;

    explicit FewWorkspace(const IntExperts& e) noexcept {
        const uint64_t choices = e.tokens * e.top_k;
        second_at = whole_lines(choices * width_of(e) * 2);
        bytes = second_at + choices * e.second.rows * sizeof(float);
    }
};

// And of the one for many: a schedule, activations in its order, outputs of both projections, partial sums.
struct ManyWorkspace {
    GemmPlan plan;
    uint32_t products;
    uint64_t gathered_at, first_at, second_at, sums_at, bytes;

    Status make(const IntExperts& e, const Device& device) noexcept {
        const uint64_t choices = e.tokens * e.top_k;
        QMOE_TRY(plan.make_for_experts(choices, e.first.experts));
        products = GemmSchedule::most_products(choices, e.first.experts, plan.most);
        gathered_at = whole_lines(GemmSchedule::bytes(choices, products));
        first_at = gathered_at + whole_lines(plan.gathered_bytes_of(choices, e.first.cols));
        second_at = first_at + whole_lines(choices * width_of(e) * 2);
        sums_at = second_at + whole_lines(choices * e.second.rows * 2);
        bytes = sums_at + plan.sums_bytes(device);
        return {};
    }
};

Status linear_few(const IntLinear& linear, const Device& device, cudaStream_t stream) noexcept {
    FewTokens call{};
    Projection& p = call.projections[0];
    uint32_t bits = 0;
    QMOE_TRY(tiles_of(linear.weight, p, bits));
    call.count = 1;
    p.bias = linear.bias;
    return in_parts(linear.tokens, 16, [&](uint64_t first, uint64_t count) {
        call.tokens = static_cast<uint32_t>(count);
        p.x = static_cast<const uint16_t*>(linear.x) + first * p.cols;
        p.y = static_cast<uint16_t*>(linear.y) + first * p.rows;
        return launch_few<false>(call, bits, linear.type, device, stream);
    });
}

Status linear_many(const IntLinear& linear, const Device& device, cudaStream_t stream) noexcept {
    Gemm call{};
    GemmProjection& p = call.projections[0];
    GemmPlan plan;
    uint32_t bits = 0;
    QMOE_TRY(tiles_of(linear.weight, p, bits));
    QMOE_TRY(plan.make(linear.weight.rows, linear.weight.cols, linear.tokens, device));
    QMOE_TRY(check_workspace(plan.sums_bytes(device), linear.workspace, linear.workspace_bytes));
    call.end = 1;
    p.bias = linear.bias;
    return in_parts(linear.tokens, kMostTokensOfMany, [&](uint64_t first, uint64_t count) {
        call.tokens = static_cast<uint32_t>(count);
        p.x = static_cast<const uint16_t*>(linear.x) + first * p.cols;
        p.y = static_cast<uint16_t*>(linear.y) + first * p.rows;
        plan.put(call, linear.workspace, device);
        return launch_many(call, bits, linear.type, device, stream);
    });
}

Status experts_few(const IntExperts& e, const Device& device, cudaStream_t stream) noexcept {
    QMOE_TRY(check_choices(e, kMostChoices));
    const FewWorkspace room(e);
    QMOE_TRY(check_workspace(room.bytes, e.workspace, e.workspace_bytes));
    FewTokens call{};
    Projection &first = call.projections[0], &second = call.projections[1];
    uint32_t first_bits = 0, second_bits = 0;
    QMOE_TRY(tiles_of(e.first, first, first_bits));
    QMOE_TRY(tiles_of(e.second, second, second_bits));
    take_call(call, e);
    first.y = e.workspace;
    second.x = e.workspace;
    second.y = static_cast<uint8_t*>(e.workspace) + room.second_at;
    // A ring has slots of one size, and kernels are for one number of bits and groups.
    if (first_bits == second_bits && first.block_bytes == second.block_bytes && first.groups == second.groups) {
        call.count = 2;
        return launch_few<true>(call, first_bits, e.type, device, stream);
    }
    call.count = 1;
    FewTokens behind = call;
    behind.projections[0] = second;
    QMOE_TRY(launch_few<true>(call, first_bits, e.type, device, stream));
    QMOE_TRY(launch_few<true>(behind, second_bits, e.type, device, stream));
    return launch_combine(call.choices, second.y, e.y, e.type, second.rows, device, stream);
}

Status experts_many(const IntExperts& e, const Device& device, cudaStream_t stream) noexcept {
    Gemm call{};
    GemmProjection &first = call.projections[0], &second = call.projections[1];
    uint32_t first_bits = 0, second_bits = 0;
    QMOE_TRY(tiles_of(e.first, first, first_bits));
    QMOE_TRY(tiles_of(e.second, second, second_bits));
    ManyWorkspace room{};
    QMOE_TRY(room.make(e, device));
    QMOE_TRY(check_workspace(room.bytes, e.workspace, e.workspace_bytes));
    uint8_t* const workspace = static_cast<uint8_t*>(e.workspace);
    call.experts = true;
    take_call(call, e);
    call.most_products = room.products;
    call.last_expert = call.choices.experts;
    call.schedule = GemmSchedule(workspace, room.products);
    first.y = workspace + room.first_at;
    second.x = first.y;
    second.y = workspace + room.second_at;
    room.plan.put(call, workspace + room.sums_at, device);
    QMOE_TRY(launch_preparation(call, workspace + room.gathered_at, device, stream));
    call.end = 2;
    if (first_bits == second_bits && (first.groups == 1) == (second.groups == 1))
        return launch_many(call, first_bits, e.type, device, stream);
    call.end = 1;
    QMOE_TRY(launch_many(call, first_bits, e.type, device, stream));
    call.begin = 1, call.end = 2;
    return launch_many(call, second_bits, e.type, device, stream);
}

}  // namespace

Status linear_workspace_int(const IntLinear& linear, uint64_t* bytes) noexcept {
    QMOE_TRY(check_linear(linear));
    *bytes = 0;
    if (linear.tokens == 0 || !is_for_many(linear)) return {};
    Device device{};
    QMOE_TRY(Device::current(device));
    GemmPlan plan;
    QMOE_TRY(plan.make(linear.weight.rows, linear.weight.cols, linear.tokens, device));
    *bytes = plan.sums_bytes(device);
    return {};
}

Status linear_int(const IntLinear& linear, cudaStream_t stream) noexcept {
    QMOE_TRY(check_linear(linear));
    if (linear.tokens == 0) return {};
    Device device{};
    QMOE_TRY(Device::current(device));
    return is_for_many(linear) ? linear_many(linear, device, stream) : linear_few(linear, device, stream);
}

Status workspace_int(const IntExperts& experts, uint64_t* bytes) noexcept {
    QMOE_TRY(check_experts(experts));
    *bytes = 0;
    if (experts.tokens == 0) return {};
    if (!is_for_many(experts)) {
        QMOE_TRY(check_choices(experts, kMostChoices));
        *bytes = FewWorkspace(experts).bytes;
        return {};
    }
    QMOE_TRY(check_many(experts));
    Device device{};
    QMOE_TRY(Device::current(device));
    ManyWorkspace room{};
    QMOE_TRY(room.make(experts, device));
    *bytes = room.bytes;
    return {};
}

Status experts_int(const IntExperts& e, cudaStream_t stream) noexcept {
    QMOE_TRY(check_experts(e));
    if (e.tokens == 0) return {};
    Device device{};
    QMOE_TRY(Device::current(device));
    if (!is_for_many(e)) return experts_few(e, device, stream);
    QMOE_TRY(check_many(e));
    return experts_many(e, device, stream);
}

}  // namespace qmoe::cuda
