// `int` to floats. One thread per packed block of 32 codes: a row's blocks are neighbours, so a warp reads up to 1 KiB
// in one go.
#include "common.cuh"
#include "formats/int.h"

namespace qmoe::cuda {
namespace {

__device__ float device_scale(const uint8_t* p, ScaleType type) {
    if (type == ScaleType::kFloat32) return *reinterpret_cast<const float*>(p);
    if (type == ScaleType::kFloat16) return __half2float(*reinterpret_cast<const __half*>(p));
    return __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(p));
}

template <class T>
__global__ void dequantize_int_kernel(IntLayout layout, const uint8_t* __restrict__ data, T* __restrict__ out) {
    const uint64_t blocks = layout.row_bytes / layout.block_bytes, total = layout.rows * blocks;
    for (uint64_t i = blockIdx.x * uint64_t{blockDim.x} + threadIdx.x; i < total;
         i += uint64_t{gridDim.x} * blockDim.x) {
        const uint64_t row = i / blocks, first = i % blocks * kIntBlock;
        const uint8_t* block = data + i * layout.block_bytes;
        float scale = 0, zero = 0;
        for (uint32_t j = 0; j < kIntBlock && first + j < layout.cols; ++j) {
            // Groups are half a block, whole blocks, or the whole row.
            if (j == 0 || (j == kIntHalf && layout.group == kIntHalf)) {
                const uint64_t g = (first + j) / layout.group;
                scale =
                    device_scale(data + layout.scales_at + (row * layout.groups + g) * scale_bytes(layout.scale_type),
                                 layout.scale_type);
                zero = layout.zero(data, row, g);
            }
            out[row * layout.cols + first + j] =
                from_float<T>((static_cast<float>(int_code(block, layout.bits, j)) - zero) * scale);
        }
    }
}

}  // namespace

Status dequantize_int(const DeviceMatrix& matrix, void* out, OutputType type, cudaStream_t stream) noexcept {
    const IntLayout layout(matrix.spec, matrix.rows, matrix.cols);
    if (matrix.bytes < layout.bytes)
        return Status::mismatch(Code::kShape, "cuda: int data is shorter than its shape", 0, layout.bytes,
                                matrix.bytes);
    const uint64_t blocks = layout.rows * (layout.row_bytes / layout.block_bytes);
    return with_output_type(type, [&](auto element) {
        using T = decltype(element);
        dequantize_int_kernel<T><<<grid_for(blocks), 256, 0, stream>>>(layout, matrix.data, static_cast<T*>(out));
        return launch_status();
    });
}

}  // namespace qmoe::cuda
