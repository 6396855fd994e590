// What the kernels share: output conversion, launch checks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "qmoe/checked.h"
#include "qmoe/cuda.h"

namespace qmoe::cuda {

// A kernel's dynamic shared memory. tests/emulation has its own.
#ifndef QMOE_SHARED_MEMORY
#define QMOE_SHARED_MEMORY(name, alignment) \
    extern __shared__ __align__(alignment)  \
    uint8_t name[]
#endif

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
    return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

template <class T>
__device__ inline float to_float(T x) {
    if constexpr (std::is_same_v<T, __half>)
        return __half2float(x);
    else if constexpr (std::is_same_v<T, __nv_bfloat16>)
        return __bfloat162float(x);
    else
        return x;
}

// Bytes of a (0 to 3) and b (4 to 7), chosen by the four lowest hexadecimal digits of `digits`, none of which is above 7.
__device__ inline uint32_t permuted(uint32_t a, uint32_t b, uint32_t digits) {
#ifdef __CUDA_ARCH__
    uint32_t out;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(digits));
    return out;
#else
    return __byte_perm(a, b, digits);
#endif
}

inline Status runtime_status(cudaError_t error) noexcept {
    return error == cudaSuccess ? Status{} : Status::error(Code::kNoKernel, cudaGetErrorString(error));
}

inline Status launch_status() noexcept {
    return runtime_status(cudaGetLastError());
}

// Blocks of 256 threads for kernels whose threads take one thing after the other.
inline uint32_t grid_for(uint64_t threads) noexcept {
    return static_cast<uint32_t>(ceil_div(threads, 256) < 65536 ? ceil_div(threads, 256) : 65536);
}

// Calls launch(T{}) with T the element type of `type`.
template <class Launch>
Status with_output_type(OutputType type, const Launch& launch) noexcept {
    switch (type) {
        case OutputType::kFloat32: return launch(float{});
        case OutputType::kFloat16: return launch(__half{});
        case OutputType::kBfloat16: return launch(__nv_bfloat16{});
    }
    return Status::error(Code::kDtype, "cuda: output must be float32, float16 or bfloat16");
}
// The same for the type of what is multiplied.
template <class Launch>
Status with_activation_type(OutputType type, const Launch& launch) noexcept {
    switch (type) {
        case OutputType::kFloat16: return launch(__half{});
        case OutputType::kBfloat16: return launch(__nv_bfloat16{});
        default: return Status::error(Code::kDtype, "cuda: activations are float16 or bfloat16");
    }
}

Status dequantize_int(const DeviceMatrix& matrix, void* out, OutputType type, cudaStream_t stream) noexcept;
Status dequantize_ternary(const DeviceMatrix& matrix, void* out, OutputType type, cudaStream_t stream) noexcept;
Status int_tiles_bytes(const DeviceMatrix& matrix, uint64_t* bytes) noexcept;
Status prepack_int(const DeviceMatrix& matrix, RowOrder order, void* out, uint64_t out_bytes,
                   cudaStream_t stream) noexcept;
Status unpack_int(const IntStack& matrix, void* out, OutputType type, cudaStream_t stream) noexcept;
Status linear_workspace_int(const IntLinear& linear, uint64_t* bytes) noexcept;
Status linear_int(const IntLinear& linear, cudaStream_t stream) noexcept;
Status workspace_int(const IntExperts& experts, uint64_t* bytes) noexcept;
Status experts_int(const IntExperts& experts, cudaStream_t stream) noexcept;
Status unpack_ternary(const TernaryStack& stack, uint64_t first, uint64_t count, void* out, OutputType type,
                      cudaStream_t stream) noexcept;
Status linear_workspace_ternary(const TernaryLinear& linear, uint64_t* bytes) noexcept;
Status linear_ternary(const TernaryLinear& linear, cudaStream_t stream) noexcept;
Status workspace_ternary(const TernaryExperts& experts, uint64_t* bytes) noexcept;
Status experts_ternary(const TernaryExperts& experts, cudaStream_t stream) noexcept;
Status census_ternary(const int8_t* trits, uint64_t rows, uint64_t cols, uint64_t* counts,
                      cudaStream_t stream) noexcept;
Status ternary_encode_scratch(const TernaryEncode& encode, uint64_t* bytes) noexcept;
Status code_ternary(const TernaryEncode& encode, cudaStream_t stream) noexcept;
Status words_ternary(const TernaryEncode& encode, cudaStream_t stream) noexcept;
Status round_block(const RoundBlock& block, cudaStream_t stream) noexcept;
Status choose_grid(const ChooseGrid& grid, cudaStream_t stream) noexcept;
Status ternary_sums(const TernarySums& sums, cudaStream_t stream) noexcept;

}  // namespace qmoe::cuda
