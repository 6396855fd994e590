// The scale and zero of one group of columns per row, by trying them all: IntGrid._choose of
// python/qmoe_core/quantize/grids.py, its slow twin, in one pass over memory.
//
// One warp per row, four columns per lane, all in registers. Sums over a warp always go the same way.
#include "common.cuh"

namespace qmoe::cuda {
namespace {

constexpr uint32_t kThreads = 256, kPerLane = 4;

__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

__device__ inline float stored(float scale, uint32_t type) {
    if (type == 1) return __half2float(__float2half_rn(fmaxf(scale, 0x1p-14f)));
    if (type == 2) return __bfloat162float(__float2bfloat16_rn(fmaxf(scale, 0x1p-100f)));
    return fmaxf(scale, 0x1p-100f);
}

__global__ void __launch_bounds__(kThreads) choose_grid_kernel(const __grid_constant__ ChooseGrid a) {
    const uint64_t row = (blockIdx.x * uint64_t{kThreads} + threadIdx.x) / 32, total = uint64_t{a.experts} * a.rows;
    if (row >= total) return;  // whole warps
    const uint32_t lane = threadIdx.x % 32;
    const float* const target = a.target + row * a.target_row_stride;
    const float* const precision = a.precision + row / a.rows * a.precision_stride;
    float t[kPerLane], p[kPerLane], low = 0, high = 0;
#pragma unroll
    for (uint32_t i = 0; i < kPerLane; ++i) {
        const uint32_t k = i * 32 + lane;
        t[i] = k < a.columns ? target[k] : 0.0f;
        p[i] = k < a.columns ? precision[k] : 0.0f;
        low = fminf(low, t[i]);
        high = fmaxf(high, t[i]);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        low = fminf(low, __shfl_xor_sync(~0u, low, step));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, step));
    }
    const float top = static_cast<float>(a.top), half = a.half_step ? 0.5f : 0.0f;
    if (!a.zero_point) {
        low = -fmaxf(high, -low);
        high = a.half_step ? -low : -low * (top - 1) / (top + 1);
    }
    const int around = a.top < 15 && a.zero_point ? 1 : 0;
    const bool turned = !a.zero_point && !a.half_step;
    const float middle = static_cast<float>((a.top + 1) / 2) - (a.half_step ? 1.0f : 0.0f);
    float best = INFINITY, scale = INFINITY, zero = 0;  // where no scale fits into its type
    for (uint32_t step = 0; step < a.steps; ++step) {
        const auto share = static_cast<float>(1.0 - step * (2.0 / 3) / max(a.steps - 1, 1u));
        const float size = stored(__fmul_rn(high - low, share) / top, a.scale_type);
        const float centre = a.zero_point ? rintf(__fmul_rn(-low, share) / size - half) : middle;
        for (int offset = -around; offset <= around; ++offset) {
            const float shift = fminf(fmaxf(centre + static_cast<float>(offset), 0.0f), top) + half;
            for (int turn = 0; turn <= (turned ? 1 : 0); ++turn) {
                // Times the reciprocal, which may round a tie the other way: a third of a division's instructions.
                const float tried = turn == 0 ? size : -size, per_step = __frcp_rn(tried);
                float error = 0;
#pragma unroll
                for (uint32_t i = 0; i < kPerLane; ++i) {
                    const float code = fminf(fmaxf(rintf(fmaf(t[i], per_step, shift)), 0.0f), top);
                    const float off = fmaf(code - shift, tried, -t[i]);
                    error += off * off * p[i];
                }
                error = warp_sum(error);
                if (error < best) {
                    best = error;
                    scale = tried;
                    zero = shift;
                }
            }
        }
    }
    if (lane == 0) {
        a.scale[row * a.groups + a.group] = scale;
        a.zero[row * a.groups + a.group] = zero;
    }
}

}  // namespace

Status choose_grid(const ChooseGrid& a, cudaStream_t stream) noexcept {
    if (a.experts == 0 || a.rows == 0 || a.columns == 0) return Status::error(Code::kShape, "choose_grid: empty");
    if (a.columns > 32 * kPerLane)
        return Status::mismatch(Code::kShape, "choose_grid: columns", 0, 32 * kPerLane, a.columns);
    if (a.group >= a.groups) return Status::mismatch(Code::kShape, "choose_grid: group", 0, a.groups, a.group);
    if (a.top == 0 || a.top > 255 || a.steps == 0) return Status::error(Code::kValue, "choose_grid: top code or steps");
    if (a.scale_type < 1 || a.scale_type > 3) return Status::error(Code::kDtype, "choose_grid: type of scales");
    const uint64_t blocks = (uint64_t{a.experts} * a.rows * 32 + kThreads - 1) / kThreads;
    choose_grid_kernel<<<static_cast<uint32_t>(blocks), kThreads, 0, stream>>>(a);
    return launch_status();
}

}  // namespace qmoe::cuda
