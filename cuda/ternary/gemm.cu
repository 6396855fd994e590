#include "ternary/gemm.cuh"
#include "ternary/weights.cuh"

namespace qmoe::cuda {

template <typename T>
Status launch_ternary_gemm(const Gemm& call, const Device& device, cudaStream_t stream) noexcept {
    return launch_gemm_as<T, TernaryWeights<T>>(call, device, stream);
}
template Status launch_ternary_gemm<__half>(const Gemm&, const Device&, cudaStream_t) noexcept;
template Status launch_ternary_gemm<__nv_bfloat16>(const Gemm&, const Device&, cudaStream_t) noexcept;

}  // namespace qmoe::cuda
