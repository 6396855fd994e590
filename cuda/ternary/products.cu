// Products of `ternary` stacks: a linear layer, and a layer's experts; and what their streams say, number by number.
#include "experts/check.cuh"
#include "ternary/few_tokens.cuh"

namespace qmoe::cuda {

QMOE_TERNARY_FEW_TOKENS(extern, 3)
QMOE_TERNARY_FEW_TOKENS(extern, 4)
QMOE_TERNARY_FEW_TOKENS(extern, 5)
QMOE_TERNARY_FEW_TOKENS(extern, 6)
QMOE_TERNARY_FEW_TOKENS(extern, 7)

namespace {

constexpr uint32_t kUnpackWarps = 8;

Status check_stack(const TernaryStack& stack) noexcept {
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

Status projection_of(const TernaryStack& stack, TernaryProjection& p) noexcept {
    QMOE_TRY(check_stack(stack));
    const TernaryStreams layout(stack.shape);
    p.streams = static_cast<const uint8_t*>(stack.streams);
    p.rows = static_cast<uint32_t>(layout.rows);
    p.cols = static_cast<uint32_t>(layout.cols);
    p.slots = layout.slots();
    p.all_slots = layout.all_slots();
    p.gap_bits = layout.gap_bits;
    p.segments = layout.segments;
    p.segment_bits = static_cast<uint32_t>(__builtin_ctz(layout.segments));
    p.levels_at = static_cast<uint32_t>(layout.levels_at);
    p.starts_at = static_cast<uint32_t>(layout.starts_at);
    p.bases_at = static_cast<uint32_t>(layout.bases_at);
    p.quads_at = static_cast<uint32_t>(layout.quads_at);
    p.groups = Divisor(layout.groups);
    p.order = stack.order;
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
        second_at = ceil_div(choices * e.first.shape.rows * sizeof(float), uint64_t{16}) * 16;
        bytes = second_at + choices * e.second.shape.rows * sizeof(float);
    }
};

// A warp per group, as the products go; `out` is zeros.
template <typename T>
__global__ __launch_bounds__(kUnpackWarps* kLanes) void unpack_streams(const TernaryStreams layout,
                                                                       const uint8_t* __restrict__ stack,
                                                                       uint64_t expert, T* __restrict__ out) {
    const uint64_t group = blockIdx.x * uint64_t{kUnpackWarps} + threadIdx.x / kLanes;
    if (group >= layout.groups) return;
    const uint8_t* const matrix = stack + reinterpret_cast<const uint64_t*>(stack)[expert];
    const uint32_t lane = threadIdx.x % kLanes, bits = layout.gap_bits + 1, row_in_group = lane / layout.segments,
                   segment = lane % layout.segments;
    const uint64_t at = group * layout.group_rows + row_in_group;
    const uint32_t info = reinterpret_cast<const uint32_t*>(matrix)[at];
    const uint32_t levels = reinterpret_cast<const uint32_t*>(matrix + layout.levels_at)[at];
    const T high = from_float<T>(__uint_as_float(levels << 16)),
            low = from_float<T>(__uint_as_float(levels & 0xffff0000u));
    const uint32_t quads = info >> TernaryStreams::kRowBits, row = info & ((1u << TernaryStreams::kRowBits) - 1);
    uint32_t next = reinterpret_cast<const uint16_t*>(matrix + layout.starts_at)[at * layout.segments + segment];
    const uint4* const from = reinterpret_cast<const uint4*>(matrix + layout.quads_at) +
                              reinterpret_cast<const uint32_t*>(matrix + layout.bases_at)[group] + row_in_group;
    for (uint32_t k = segment * quads / layout.segments; k < (segment + 1) * quads / layout.segments; ++k) {
        const uint4 quad = from[k * layout.group_rows];
        uint32_t words[4] = {quad.x, quad.y, quad.z, quad.w};
        for (uint32_t i = 0; i < layout.symbols(); ++i) {
            const uint32_t symbol = words[0] >> (32 - bits), slot = next + (symbol >> 1);
            if (!layout.is_empty(slot)) out[row * layout.cols + layout.col(slot)] = (symbol & 1) != 0 ? low : high;
            next = slot + 1;
            for (int w = 0; w < 4; ++w) words[w] = __funnelshift_l(w < 3 ? words[w + 1] : 0, words[w], bits);
        }
    }
}

}  // namespace

Status unpack_ternary(const TernaryStack& stack, uint64_t expert, void* out, OutputType type,
                      cudaStream_t stream) noexcept {
    QMOE_TRY(check_stack(stack));
    if (expert >= stack.experts)
        return Status::mismatch(Code::kValue, "cuda: experts of a stack", 0, stack.experts, expert);
    const TernaryStreams layout(stack.shape);
    return with_output_type(type, [&](auto element) {
        using T = decltype(element);
        QMOE_TRY(runtime_status(cudaMemsetAsync(out, 0, layout.rows * layout.cols * sizeof(T), stream)));
        const auto grid = static_cast<uint32_t>(ceil_div(layout.groups, uint64_t{kUnpackWarps}));
        return launch_in_order(unpack_streams<T>, grid, kUnpackWarps * kLanes, stream, layout,
                               static_cast<const uint8_t*>(stack.streams), expert, static_cast<T*>(out));
    });
}

Status linear_ternary(const TernaryLinear& linear, cudaStream_t stream) noexcept {
    QMOE_TRY(check_linear(linear));
    if (linear.tokens == 0) return {};
    TernaryFewTokens call{};
    TernaryProjection& p = call.projections[0];
    QMOE_TRY(projection_of(linear.weight, p));
    Device device{};
    QMOE_TRY(Device::current(device));
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
    *bytes = Workspace(experts).bytes;
    return {};
}

Status experts_ternary(const TernaryExperts& e, cudaStream_t stream) noexcept {
    QMOE_TRY(check_experts(e));
    const Workspace room(e);
    QMOE_TRY(check_workspace(room.bytes, e.workspace_bytes));
    if (e.tokens == 0) return {};
    Device device{};
    QMOE_TRY(Device::current(device));
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
