// Activations of tokens in the order of a schedule: row i is that of the token whose choice is i-th.
#pragma once

#include "gemm/schedule.cuh"

namespace qmoe::cuda {

inline constexpr uint32_t kGatherThreads = 256;

// `to` (choices, cols), 16-byte aligned; numbers have two bytes. Rows behind the schedule's last one stay as they are.
static __global__ __launch_bounds__(kGatherThreads) void gather_rows(const __grid_constant__ Choices choices,
                                                                     const GemmSchedule schedule, const uint16_t* x,
                                                                     uint16_t* to, uint32_t cols) {
    wait_for_previous();
    let_next_begin();
    const uint32_t rows = schedule.first_row(schedule.products());
    const bool aligned = cols % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
    for (uint32_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const uint16_t* const from = x + uint64_t{choices.top_k.divide(schedule.choice(row))} * cols;
        uint16_t* const out = to + uint64_t{row} * cols;
        if (aligned)
            for (uint32_t i = threadIdx.x; i < cols / 8; i += kGatherThreads)
                reinterpret_cast<uint4*>(out)[i] = reinterpret_cast<const uint4*>(from)[i];
        else
            for (uint32_t i = threadIdx.x; i < cols; i += kGatherThreads) out[i] = from[i];
    }
}

inline uint64_t gathered_bytes(uint64_t choices, uint64_t cols) noexcept {
    return choices * cols * 2;
}
inline Status launch_gather(const Choices& choices, const GemmSchedule& schedule, const void* x, void* to,
                            uint32_t cols, const Device& device, cudaStream_t stream) noexcept {
    const uint32_t rows = choices.tokens * choices.top_k.by;
    return launch(gather_rows, std::min(rows, 8 * device.multiprocessors), kGatherThreads, 0, false, device, stream,
                  choices, schedule, static_cast<const uint16_t*>(x), static_cast<uint16_t*>(to), cols);
}

}  // namespace qmoe::cuda
