// The sums over each token's choices.
#pragma once

#include "common.cuh"
#include "experts/schedule.cuh"
#include "launch.cuh"

namespace qmoe::cuda {

// y[token], four columns of it, from what the second projection made of its choices, weights included. kAtOnce: loads on
// their way.
template <uint32_t kAtOnce, typename T, typename Value>
__device__ __forceinline__ void combine(const Choices& choices, const Value* values, T* y, uint32_t token, uint32_t col,
                                        uint32_t cols) {
    const uint32_t count = min(cols - col, 4u);
    float sum[4] = {};
#pragma unroll 1
    for (uint32_t first = 0; first < choices.top_k.by; first += kAtOnce) {
        float more[kAtOnce][4];
#pragma unroll
        for (uint32_t j = 0; j < kAtOnce; ++j) {
            const uint64_t choice = uint64_t{token} * choices.top_k.by + first + j;
            const int64_t id = first + j < choices.top_k.by ? choices.ids[choice] : -1;
            const Value* const from = values + choice * cols + col;
            // What belongs to no expert here has not been written: it may be loaded where it is, but not used.
            if (cols % 4 == 0 && first + j < choices.top_k.by) {
                struct alignas(4 * sizeof(Value)) Four {
                    Value values[4];
                } const four = *reinterpret_cast<const Four*>(from);
                for (uint32_t i = 0; i < 4; ++i) more[j][i] = to_float(four.values[i]);
            } else {
                for (uint32_t i = 0; i < 4; ++i)
                    more[j][i] = first + j < choices.top_k.by && i < count ? to_float(from[i]) : 0.0f;
            }
            if (id < 0 || id >= choices.experts) more[j][0] = more[j][1] = more[j][2] = more[j][3] = 0.0f;
        }
#pragma unroll
        for (uint32_t j = 0; j < kAtOnce; ++j)
            for (uint32_t i = 0; i < 4; ++i) sum[i] += more[j][i];
    }
    for (uint32_t i = 0; i < count; ++i) y[uint64_t{token} * cols + col + i] = from_float<T>(sum[i]);
}

// All of y, by all threads of a launch: neighbouring columns by warps of different blocks of threads, since they may be few.
template <uint32_t kAtOnce, typename T, typename Value>
__device__ __forceinline__ void combine_all(const Choices& choices, const Value* values, T* y, uint32_t cols) {
    const uint32_t pieces = (cols + 3) / 4, warp = threadIdx.x / kLanes * gridDim.x + blockIdx.x;
    for (uint32_t i = warp * kLanes + threadIdx.x % kLanes; i < choices.tokens * pieces; i += gridDim.x * blockDim.x)
        combine<kAtOnce>(choices, values, y, i / pieces, i % pieces * 4, cols);
}

inline constexpr uint32_t kCombineThreads = 256;

// The same as a launch of its own, where the kernels of the projections are two.
template <typename T>
__global__ __launch_bounds__(kCombineThreads) void combine_choices(const __grid_constant__ Choices choices,
                                                                   const float* values, T* y, uint32_t cols) {
    wait_for_previous();
    let_next_begin();
    const uint32_t col = (blockIdx.x * kCombineThreads + threadIdx.x) * 4;
    if (col < cols) combine<8>(choices, values, y, blockIdx.y, col, cols);
}

inline Status launch_combine(const Choices& choices, const void* values, void* y, OutputType type, uint32_t cols,
                             const Device& device, cudaStream_t stream) noexcept {
    const dim3 grid(static_cast<uint32_t>(ceil_div(uint64_t{cols}, uint64_t{4 * kCombineThreads})), choices.tokens);
    const auto from = static_cast<const float*>(values);
    if (type == OutputType::kFloat16)
        return launch(combine_choices<__half>, grid, kCombineThreads, 0, false, device, stream, choices, from,
                      static_cast<__half*>(y), cols);
    return launch(combine_choices<__nv_bfloat16>, grid, kCombineThreads, 0, false, device, stream, choices, from,
                  static_cast<__nv_bfloat16*>(y), cols);
}

}  // namespace qmoe::cuda
