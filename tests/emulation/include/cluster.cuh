// cuda/cluster.cuh, emulated.
#pragma once

#include <cstdint>

namespace qmoe::cuda {

template <typename Kernel>
bool has_clusters(Kernel*) {
    return true;
}

inline void cluster_barrier() {
    emulation::Grid::current().wait(emulation::State::kAtClusterBarrier);
}

inline float4 load_of_cluster(const float4* own, uint32_t rank) {
    float4 value;
    std::memcpy(&value, emulation::Grid::current().shared_of_cluster(own, rank), sizeof value);
    return value;
}

}  // namespace qmoe::cuda
