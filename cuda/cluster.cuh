// Blocks of threads that are on the multiprocessors of one cluster: barriers of all of them, and each other's shared memory.
// Compute capability 9.0 and later; before, a cluster is one block. tests/emulation has its own.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace qmoe::cuda {

// Whether `kernel` was compiled for devices that have clusters. Elsewhere what follows does nothing.
template <typename Kernel>
bool has_clusters(Kernel* kernel) noexcept {
    cudaFuncAttributes attributes{};
    return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
}

// All threads of the cluster wait for each other, and see what was written before.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;" ::
            : "memory");
#endif
}

// What block `rank` of the cluster has where this one has `own` in shared memory.
__device__ __forceinline__ float4 load_of_cluster(const float4* own, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
    float4 value;
    asm volatile(
        "{\n"
        ".reg .u32 there;\n"
        "mapa.shared::cluster.u32 there, %4, %5;\n"
        "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n"
        "}\n"
        : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
        : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(own))), "r"(rank)
        : "memory");
    return value;
#else
    return *own;
#endif
}

}  // namespace qmoe::cuda
