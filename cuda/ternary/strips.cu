#include "ternary/strips.cuh"

namespace qmoe::cuda {

namespace {

template <typename T, int kN, bool kExperts>
Status launch_as(StripTokens& call, uint32_t shared, const Device& device, cudaStream_t stream) noexcept {
    const auto kernel = ternary_strips<T, kN, kExperts>;
    QMOE_TRY(runtime_status(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(device.shared))));
    call.grid = Divisor(device.multiprocessors);
    return launch(kernel, device.multiprocessors, Strips::kWarps * kLanes, shared, kExperts, device, stream, call);
}

template <int kN>
Status launch_tokens(StripTokens& call, bool experts, OutputType type, const Device& device, cudaStream_t stream,
                     bool& launched) noexcept {
    const uint32_t shared = divide_strips<kN>(call, experts, device);
    launched = shared != 0;
    if (!launched) return {};
    const auto with = [&]<typename T>(T) {
        return experts ? launch_as<T, kN, true>(call, shared, device, stream)
                       : launch_as<T, kN, false>(call, shared, device, stream);
    };
    switch (type) {
        case OutputType::kFloat16: return with(__half{});
        case OutputType::kBfloat16: return with(__nv_bfloat16{});
        default: return Status::error(Code::kDtype, "cuda: activations are float16 or bfloat16");
    }
}

}  // namespace

Status launch_strips(StripTokens call, bool experts, OutputType type, const Device& device, cudaStream_t stream,
                     bool& launched) noexcept {
    for (uint32_t i = 0; i < call.count; ++i) {
        StripProjection& p = call.projections[i];
        p.strip_groups = p.group_rows < Strips::kTile ? Strips::kTile / p.group_rows : 1;
        p.strips = Divisor(ceil_div(uint64_t{p.rows}, uint64_t{p.strip_rows()}));
    }
    // Most products of experts with fewer choices than that on average have no more than 8.
    const bool one = experts ? call.tokens * call.choices.top_k.by <= 5 * call.choices.experts : call.tokens <= 8;
    return one ? launch_tokens<1>(call, experts, type, device, stream, launched)
               : launch_tokens<2>(call, experts, type, device, stream, launched);
}

}  // namespace qmoe::cuda
