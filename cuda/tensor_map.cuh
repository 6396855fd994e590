// Matrices of 16-bit numbers that the copy engine brings to shared memory box by box, from compute capability 9.0 on.
// tests/emulation has its own.
//
// Source: PTX ISA, "Tensors"; CUDA driver API, cuTensorMapEncodeTiled.
#pragma once

#include <cuda.h>

#include "barriers.cuh"
#include "common.cuh"

namespace qmoe::cuda {

// Boxes have `box_rows` rows of 64 columns, in shared memory 128 bytes each, of which those of 16 bytes at i lie at
// i ^ row % 8. What is outside of the matrix is zero there.
struct TensorMap {
    static constexpr uint32_t kBoxColumns = 64;
    CUtensorMap map;
    uint32_t box_rows;

    // Whether kernels can have such copies, which are compiled for warpgroups or not.
    static bool are_there(bool has_warpgroups) noexcept { return has_warpgroups; }
    // Whether there is a map of matrices there.
    static bool fits(const void* numbers, uint32_t cols) noexcept {
        return reinterpret_cast<uintptr_t>(numbers) % 16 == 0 && cols % 8 == 0;
    }
    // Of (rows, cols), row-major; box_rows <= 256. E_NO_KERNEL where the driver has no such maps.
    Status make(const void* numbers, uint32_t rows, uint32_t cols, uint32_t rows_of_box) noexcept {
        static const auto encode = [] {
            void* function = nullptr;
            cudaDriverEntryPointQueryResult found{};
            constexpr unsigned kVersion = 12000;  // the first one with Hopper's
            if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kVersion, cudaEnableDefault,
                                                 &found) != cudaSuccess ||
                found != cudaDriverEntryPointSuccess)
                function = nullptr;
            return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
        }();
        if (encode == nullptr) return Status::error(Code::kNoKernel, "cuda: the driver makes no tensor maps");
        box_rows = rows_of_box;
        const cuuint64_t size[2] = {cols, rows}, pitch[1] = {uint64_t{cols} * 2};
        const cuuint32_t box[2] = {kBoxColumns, box_rows}, step[2] = {1, 1};
        const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(numbers), size, pitch,
                                       box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                       CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
        if (result != CUDA_SUCCESS) return Status::error(Code::kValue, "cuda: the driver refuses a tensor map");
        return {};
    }
};

// Begins to bring the box whose first number is at (row, col), to `to`, at a multiple of 1024 bytes or box_rows * 128 behind
// one. `full` is told of its box_rows * 128 bytes. In a cluster of kCluster blocks of threads the box comes to where `to` is
// in each of them, and each one's barrier where `full` is is told. `map` is a kernel's parameter.
template <uint32_t kCluster>
__device__ __forceinline__ void copy_box(Barrier& full, uint8_t* to, const TensorMap& map, uint32_t col, uint32_t row) {
#if __CUDA_ARCH__ >= 900
    if constexpr (kCluster == 1)
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
            "[%4];" ::"r"(shared_address(to)),
            "l"(&map.map), "r"(col), "r"(row), "r"(shared_address(&full))
            : "memory");
    else
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
            "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
            "l"(&map.map), "r"(col), "r"(row), "r"(shared_address(&full)),
            "h"(static_cast<uint16_t>((1u << kCluster) - 1))
            : "memory");
#else
    __trap();
#endif
}

}  // namespace qmoe::cuda
