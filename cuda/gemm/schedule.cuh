// Which expert's matrices are multiplied by which choices of tokens, for many tokens: made once, in global memory.
//
// As in experts/schedule.cuh, choices are sorted by expert, those of one expert in their order, and cut into products of at
// most as many as one product takes.
#pragma once

#include "experts/schedule.cuh"
#include "launch.cuh"

namespace qmoe::cuda {

class GemmSchedule {
  public:
    // So many products can there be.
    static uint32_t most_products(uint64_t choices, uint64_t experts, uint32_t tile) noexcept {
        return static_cast<uint32_t>((choices < experts ? choices : experts) + choices / tile);
    }
    static uint64_t bytes(uint64_t choices, uint32_t most_products) noexcept {
        return ceil_div(4 + 4 * uint64_t{most_products} + 2 + 2 * choices, uint64_t{16}) * 16;
    }

    GemmSchedule() = default;
    GemmSchedule(void* room, uint32_t most_products) noexcept
        : products_(static_cast<uint32_t*>(room)),
          experts_(reinterpret_cast<uint16_t*>(products_ + 1)),
          first_rows_(experts_ + most_products),
          order_(first_rows_ + most_products + 1) {}

    // A block of threads makes it; `shared` has counting_bytes().
    __device__ inline void make(const Choices& choices, uint32_t tile, uint8_t* shared) const;
    static uint32_t counting_bytes(uint32_t experts, uint32_t warps) noexcept {
        return (experts + 1) * 4 + experts * warps * 2;
    }

    __device__ __forceinline__ uint32_t products() const { return *products_; }
    __device__ __forceinline__ uint32_t expert(uint32_t product) const { return experts_[product]; }
    // Of a product's rows first_row(product) .. first_row(product + 1) - 1 of the order.
    __device__ __forceinline__ uint32_t first_row(uint32_t product) const { return first_rows_[product]; }
    __device__ __forceinline__ uint32_t choice(uint32_t row) const { return order_[row]; }

  private:
    uint32_t* products_ = nullptr;
    uint16_t *experts_ = nullptr, *first_rows_ = nullptr, *order_ = nullptr;
};

__device__ inline void GemmSchedule::make(const Choices& choices, uint32_t tile, uint8_t* shared) const {
    const uint32_t experts = choices.experts, count = choices.tokens * choices.top_k.by;
    const uint32_t warps = blockDim.x / kLanes, warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    uint32_t* const starts = reinterpret_cast<uint32_t*>(shared);  // by expert: products in the upper half, rows below
    uint16_t* const counts = reinterpret_cast<uint16_t*>(starts + experts + 1);  // by warp and expert
    for (uint32_t i = threadIdx.x; i < warps * experts; i += blockDim.x) counts[i] = 0;
    __syncthreads();
    // Each warp has a part of the choices, and goes through them in order. of_lane(choice, expert, how many of the warp's
    // choices before are of this expert).
    uint16_t* const own_counts = counts + warp * experts;
    const auto go_through = [&](const auto& of_choice) {
        const uint32_t part = (count + warps - 1) / warps, end = min(count, (warp + 1) * part);
        for (uint32_t first = warp * part; first < end; first += kLanes) {
            const uint32_t i = first + lane;
            const int64_t id = i < end ? choices.ids[i] : -1;
            const uint32_t expert = id >= 0 && id < experts ? static_cast<uint32_t>(id) : ~0u;
            const uint32_t alike = __match_any_sync(~0u, expert), before = __popc(alike & ((1u << lane) - 1));
            if (expert != ~0u) of_choice(i, expert, own_counts[expert] + before);
            __syncwarp();
            if (expert != ~0u && before == 0)
                own_counts[expert] = static_cast<uint16_t>(own_counts[expert] + __popc(alike));
            __syncwarp();
        }
    };
    go_through([](uint32_t, uint32_t, uint32_t) {});
    __syncthreads();
    for (uint32_t e = threadIdx.x; e < experts; e += blockDim.x) {
        uint32_t rows = 0;
        for (uint32_t w = 0; w < warps; ++w) {
            const uint32_t own = counts[w * experts + e];
            counts[w * experts + e] = static_cast<uint16_t>(rows);
            rows += own;
        }
        starts[e] = (rows + tile - 1) / tile << 16 | rows;
    }
    if (threadIdx.x == 0) starts[experts] = 0;
    __syncthreads();
    if (warp == 0) {
        uint32_t before = 0;
        for (uint32_t first = 0; first <= experts; first += kLanes) {
            const uint32_t e = first + lane, own = e <= experts ? starts[e] : 0;
            uint32_t sum = own;
#pragma unroll
            for (uint32_t d = 1; d < kLanes; d *= 2) {
                const uint32_t below = __shfl_up_sync(~0u, sum, d);
                if (lane >= d) sum += below;
            }
            if (e <= experts) starts[e] = before + sum - own;
            before += __shfl_sync(~0u, sum, kLanes - 1);
        }
    }
    __syncthreads();
    go_through([&](uint32_t i, uint32_t expert, uint32_t rank) {
        const uint32_t start = starts[expert], row = (start & 0xffff) + rank;
        order_[row] = static_cast<uint16_t>(i);
        if (rank % tile != 0) return;
        const uint32_t product = (start >> 16) + rank / tile;
        first_rows_[product] = static_cast<uint16_t>(row);
        experts_[product] = static_cast<uint16_t>(expert);
    });
    if (threadIdx.x == 0) {
        *products_ = starts[experts] >> 16;
        first_rows_[*products_] = static_cast<uint16_t>(starts[experts] & 0xffff);
    }
}

inline constexpr uint32_t kScheduleThreads = 1024;

static __global__ __launch_bounds__(kScheduleThreads) void make_schedule(const __grid_constant__ Choices choices,
                                                                         uint32_t tile, const GemmSchedule schedule) {
    QMOE_SHARED_MEMORY(counting, 16);
    wait_for_previous();
    let_next_begin();
    schedule.make(choices, tile, counting);
}

// E_NO_KERNEL for more experts than a block of threads can count.
inline Status launch_schedule(const Choices& choices, uint32_t tile, const GemmSchedule& schedule, const Device& device,
                              cudaStream_t stream) noexcept {
    uint32_t threads = kScheduleThreads;
    while (threads > kLanes && GemmSchedule::counting_bytes(choices.experts, threads / kLanes) > device.shared)
        threads /= 2;
    const uint32_t bytes = GemmSchedule::counting_bytes(choices.experts, threads / kLanes);
    if (bytes > device.shared)
        return Status::mismatch(Code::kNoKernel, "cuda: shared memory to count experts in", 0, device.shared, bytes);
    QMOE_TRY(runtime_status(cudaFuncSetAttribute(make_schedule, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(device.shared))));
    return launch(make_schedule, 1, threads, bytes, false, device, stream, choices, tile, schedule);
}

}  // namespace qmoe::cuda
