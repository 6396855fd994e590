// What the experts of a layer do between their projections, number by number.
#pragma once

#include "common.cuh"

namespace qmoe::cuda {

__device__ __forceinline__ float activated(float v, Activation activation) {
    switch (activation) {
        case Activation::kSilu: return v / (1.0f + __expf(-v));
        case Activation::kGelu: return 0.5f * v * (1.0f + erff(v * 0.70710678f));
        case Activation::kGeluTanh: return 0.5f * v * (1.0f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
        default: return fmaxf(v, 0.0f);
    }
}

__device__ __forceinline__ float load_weight(const void* weights, uint32_t i, OutputType type) {
    switch (type) {
        case OutputType::kFloat32: return static_cast<const float*>(weights)[i];
        case OutputType::kFloat16: return __half2float(static_cast<const __half*>(weights)[i]);
        default: return __bfloat162float(static_cast<const __nv_bfloat16*>(weights)[i]);
    }
}

__device__ __forceinline__ float gated(float gate, float up, const Gate& how) {
    if (!how.clamped) return activated(gate, how.activation) * up;
    gate = fminf(gate, how.limit);
    up = fminf(fmaxf(up, -how.limit), how.limit);
    return (up + 1.0f) * gate / (1.0f + __expf(-how.alpha * gate));
}

}  // namespace qmoe::cuda
