// `int` times many tokens.
#pragma once

#include "gemm/gemm.cuh"
#include "int/weights.cuh"

namespace qmoe::cuda {

template <typename T, int kBits>
Status launch_int_gemm(const Gemm& call, const Device& device, cudaStream_t stream) noexcept {
    return call.projections[call.begin].groups == 1
               ? launch_gemm_as<T, IntWeights<T, kBits, true>>(call, device, stream)
               : launch_gemm_as<T, IntWeights<T, kBits, false>>(call, device, stream);
}

// What gemm_<bits>_<type>.cu compile.
#define QMOE_INT_GEMM_OF(what, type, bits) \
    what template Status launch_int_gemm<type, bits>(const Gemm&, const Device&, cudaStream_t) noexcept;
#define QMOE_INT_GEMM(what, bits)        \
    QMOE_INT_GEMM_OF(what, __half, bits) \
    QMOE_INT_GEMM_OF(what, __nv_bfloat16, bits)

}  // namespace qmoe::cuda
