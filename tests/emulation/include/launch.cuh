// cuda/launch.cuh, emulated: a device of few multiprocessors. Launches return when they are done.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace qmoe::cuda {

inline void let_next_begin() {}
inline void wait_for_previous() {}

struct Device {
    static inline uint32_t few = 3;  // tests may change this
    uint32_t multiprocessors = few, shared = 232448;
    bool overlaps = true;

    static Status current(Device& out) noexcept {
        out = {};
        return {};
    }
};

template <typename... Arguments>
Status most_threads(void (*)(Arguments...), uint32_t& threads) noexcept {
    threads = 1024;
    return {};
}

template <typename... Arguments>
Status launch(void (*kernel)(Arguments...), dim3 grid, uint32_t threads, uint32_t shared, bool, const Device&,
              cudaStream_t, std::type_identity_t<Arguments>... arguments) {
    emulation::Grid::run(grid, threads, shared, [=] { kernel(arguments...); });
    return {};
}

template <typename... Arguments>
Status launch_clusters(void (*kernel)(Arguments...), dim3 grid, uint32_t threads, uint32_t shared, uint32_t, bool,
                       const Device&, cudaStream_t, std::type_identity_t<Arguments>... arguments) {
    emulation::Grid::run(grid, threads, shared, [=] { kernel(arguments...); });
    return {};
}

template <typename... Arguments>
Status launch_in_order(void (*kernel)(Arguments...), dim3 grid, uint32_t threads, uint32_t shared, cudaStream_t,
                       std::type_identity_t<Arguments>... arguments) {
    emulation::Grid::run(grid, threads, shared, [=] { kernel(arguments...); });
    return {};
}

}  // namespace qmoe::cuda
