// Launches of strips.cuh's kernel.
#include "ternary/strips.cuh"

namespace qmoe::cuda {

namespace {

template <typename T, int kN>
Status launch_as(const StripTokens& call, uint32_t shared, const Device& device, cudaStream_t stream) noexcept {
    const auto kernel = ternary_strips<T, kN>;
    QMOE_TRY(runtime_status(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(device.shared))));
    return launch(kernel, call.grid.by, Strips::kWarps * kLanes, shared, false, device, stream, call);
}

template <int kN>
Status launch_tokens(StripTokens& call, OutputType type, const Device& device, cudaStream_t stream,
                     bool& launched) noexcept {
    const uint32_t beside = StripRoom<kN>(call).strips + TernaryCodes::kBehind;
    const uint32_t strip_bytes = call.strip_rows() * Strips::pitch(call.blocks) * 4;
    const uint32_t each = static_cast<uint32_t>(ceil_div(uint64_t{call.strips}, uint64_t{call.grid.by}));
    const uint32_t wanted = std::min(each, Strips::kMostTiles * Strips::kTile / call.strip_rows());
    const uint32_t fit = device.shared > beside ? (device.shared - beside) / strip_bytes : 0;
    launched = fit >= std::min(wanted, 2u);
    if (!launched) return {};
    // Batches as even as can be.
    call.batch = static_cast<uint32_t>(ceil_div(each, ceil_div(each, uint64_t{std::min(wanted, fit)})));
    const uint32_t shared = beside + call.batch * strip_bytes;
    return with_activation_type(type, [&]<typename T>(T) { return launch_as<T, kN>(call, shared, device, stream); });
}

}  // namespace

Status launch_strips(StripTokens call, OutputType type, const Device& device, cudaStream_t stream,
                     bool& launched) noexcept {
    call.strip_groups = call.group_rows < Strips::kTile ? Strips::kTile / call.group_rows : 1;
    call.strips = static_cast<uint32_t>(ceil_div(uint64_t{call.rows}, uint64_t{call.strip_rows()}));
    call.blocks = static_cast<uint32_t>(ceil_div(TernaryCodes::all_columns(call), uint64_t{Strips::kOfBlock}));
    call.grid = Divisor(std::min(call.strips, device.multiprocessors));
    return call.tokens <= 8 ? launch_tokens<1>(call, type, device, stream, launched)
                            : launch_tokens<2>(call, type, device, stream, launched);
}

}  // namespace qmoe::cuda
