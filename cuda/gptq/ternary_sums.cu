// What a round of TernaryGrid.begin (python/qmoe_core/quantize/grids.py) needs of the weights, in one pass over them: every
// weight's code by error and rate, each row's weighted sums per sign, and how often each code occurs.
//
// One warp per row. Sums of floats always go the same way; the counts are whole numbers, so that their order is free.
#include "common.cuh"
#include "gptq/ternary_rounding.cuh"

namespace qmoe::cuda {
namespace {

constexpr uint32_t kThreads = 256;

__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

__global__ void __launch_bounds__(kThreads) ternary_sums_kernel(const __grid_constant__ TernarySums a) {
    const uint64_t row = (blockIdx.x * uint64_t{kThreads} + threadIdx.x) / 32, total = uint64_t{a.experts} * a.rows;
    if (row >= total) return;  // whole warps
    const uint32_t lane = threadIdx.x % 32;
    const uint64_t expert = row / a.rows;
    const float* const weight = a.weight + row * a.columns;
    const float* const precision = a.precision + expert * a.columns;
    const TernaryRounding round(a.low, a.high, a.price, a.bits + 3 * expert, row);
    float high_weight = 0, high_sum = 0, low_weight = 0, low_sum = 0;
    uint32_t ups = 0, downs = 0;
#pragma unroll 4
    for (uint32_t k = lane; k < a.columns; k += 32) {
        const float w = weight[k], p = precision[k];
        const int code = round(w, p).code;
        ups += code > 0;
        downs += code < 0;
        high_weight += code > 0 ? p : 0.0f;
        high_sum += code > 0 ? p * w : 0.0f;
        low_weight += code < 0 ? p : 0.0f;
        low_sum += code < 0 ? p * w : 0.0f;
    }
    high_weight = warp_sum(high_weight);
    high_sum = warp_sum(high_sum);
    low_weight = warp_sum(low_weight);
    low_sum = warp_sum(low_sum);
    ups = __reduce_add_sync(~0u, ups);
    downs = __reduce_add_sync(~0u, downs);
    if (lane == 0) {
        float* const sums = a.sums + 4 * row;
        sums[0] = low_sum;
        sums[1] = low_weight;
        sums[2] = high_sum;
        sums[3] = high_weight;
        atomicAdd(a.counts + 3 * expert, downs);
        atomicAdd(a.counts + 3 * expert + 1, a.columns - ups - downs);
        atomicAdd(a.counts + 3 * expert + 2, ups);
    }
}

}  // namespace

Status ternary_sums(const TernarySums& a, cudaStream_t stream) noexcept {
    if (a.experts == 0 || a.rows == 0 || a.columns == 0) return Status::error(Code::kShape, "ternary_sums: empty");
    if (uint64_t{a.rows} * a.columns > INT32_MAX)
        return Status::mismatch(Code::kLimit, "ternary_sums: weights of a matrix", 0, INT32_MAX,
                                uint64_t{a.rows} * a.columns);
    const uint64_t blocks = (uint64_t{a.experts} * a.rows * 32 + kThreads - 1) / kThreads;
    ternary_sums_kernel<<<static_cast<uint32_t>(blocks), kThreads, 0, stream>>>(a);
    return launch_status();
}

}  // namespace qmoe::cuda
