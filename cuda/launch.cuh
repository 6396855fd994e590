// What a launch asks of the device, and how it is made.
#pragma once

#include "common.cuh"

namespace qmoe::cuda {

// Lets kernels that a stream has behind this one begin where there is room, before this one has ended. They must not
// touch what it writes, nor write what it reads, before wait_for_previous().
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// Returns when all that came before in the stream is done and can be seen.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

struct Device {
    uint32_t multiprocessors, shared;  // shared: bytes that a block may have
    bool overlaps;                     // kernels can begin before the one before them has ended

    static Status current(Device& out) noexcept {
        int index = 0, multiprocessors = 0, shared = 0, major = 0;
        cudaError_t error = cudaGetDevice(&index);
        const auto get = [&](int& value, cudaDeviceAttr attribute) {
            if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, index);
        };
        get(multiprocessors, cudaDevAttrMultiProcessorCount);
        get(shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
        get(major, cudaDevAttrComputeCapabilityMajor);
        out = {static_cast<uint32_t>(multiprocessors), static_cast<uint32_t>(shared), major >= 9};
        return runtime_status(error);
    }
};

// Threads that a block of `kernel` may have, as its code for this device was compiled.
template <typename... Arguments>
Status most_threads(void (*kernel)(Arguments...), uint32_t& threads) noexcept {
    cudaFuncAttributes attributes{};
    QMOE_TRY(runtime_status(cudaFuncGetAttributes(&attributes, kernel)));
    threads = static_cast<uint32_t>(attributes.maxThreadsPerBlock);
    return {};
}

// Launches `kernel` so that it may begin before the one before it in the stream has ended, where the device can. together:
// all of its blocks of threads are there at the same time.
// `cluster` blocks of threads that are neighbours are a cluster.
template <typename... Arguments>
Status launch_clusters(void (*kernel)(Arguments...), dim3 grid, uint32_t threads, uint32_t shared, uint32_t cluster,
                       bool together, const Device& device, cudaStream_t stream,
                       std::type_identity_t<Arguments>... arguments) noexcept {
    cudaLaunchAttribute attributes[3]{};
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = threads;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = attributes;
    if (together) {
        attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
        attributes[config.numAttrs++].val.cooperative = 1;
    }
    if (device.overlaps) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs].val.clusterDim.x = cluster;
        attributes[config.numAttrs].val.clusterDim.y = 1;
        attributes[config.numAttrs++].val.clusterDim.z = 1;
    }
    return runtime_status(cudaLaunchKernelEx(&config, kernel, arguments...));
}
template <typename... Arguments>
Status launch(void (*kernel)(Arguments...), dim3 grid, uint32_t threads, uint32_t shared, bool together,
              const Device& device, cudaStream_t stream, std::type_identity_t<Arguments>... arguments) noexcept {
    return launch_clusters(kernel, grid, threads, shared, 1, together, device, stream, arguments...);
}

// Launches `kernel` behind all that is before it in the stream.
template <typename... Arguments>
Status launch_in_order(void (*kernel)(Arguments...), dim3 grid, uint32_t threads, uint32_t shared, cudaStream_t stream,
                       std::type_identity_t<Arguments>... arguments) noexcept {
    kernel<<<grid, threads, shared, stream>>>(arguments...);
    return launch_status();
}

}  // namespace qmoe::cuda
