// `int` times many tokens.
#pragma once

#include "gemm/gemm.cuh"
#include "int/weights.cuh"

namespace qmoe::cuda {

template <typename T, int kBits>
Status launch_int_gemm(const Gemm& call, const Device& device, cudaStream_t stream) noexcept {
    IntForm form = IntForm::kPlain;
    for (uint32_t i = call.begin; i < call.end; ++i) {
        const TiledMatrix& p = call.projections[i];
        if (p.groups != 1) form = IntForm::kAny;
        if (form == IntForm::kPlain && (p.has_zeros || p.zero != static_cast<float>(1 << (kBits - 1))))
            form = IntForm::kWhole;
    }
    switch (form) {
        case IntForm::kPlain: return launch_gemm_as<T, IntWeights<T, kBits, IntForm::kPlain>>(call, device, stream);
        case IntForm::kWhole: return launch_gemm_as<T, IntWeights<T, kBits, IntForm::kWhole>>(call, device, stream);
        default: return launch_gemm_as<T, IntWeights<T, kBits, IntForm::kAny>>(call, device, stream);
    }
}

// What gemm_<bits>_<type>.cu compile.
#define QMOE_INT_GEMM_OF(what, type, bits) \
    what template Status launch_int_gemm<type, bits>(const Gemm&, const Device&, cudaStream_t) noexcept;
#define QMOE_INT_GEMM(what, bits)        \
    QMOE_INT_GEMM_OF(what, __half, bits) \
    QMOE_INT_GEMM_OF(what, __nv_bfloat16, bits)

}  // namespace qmoe::cuda
