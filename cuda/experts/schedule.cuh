// Which expert's matrices are multiplied by which choices of tokens, made by every block of threads for itself.
//
// A *choice* is one of a token's top_k experts, number token * top_k + j. Choices are sorted by expert, and cut into
// *products* of at most as many as one product takes; a product's rows are neighbours in that order.
#pragma once

#include "experts/divisor.cuh"
#include "int/tiles.h"

namespace qmoe::cuda {

// Units of work begin .. end - 1 of all, counted through products.
struct Range {
    uint32_t begin, end;
    // A block of threads' share.
    static __device__ __forceinline__ Range share(uint32_t all, const Divisor& grid) {
        const uint32_t each = grid.divide(all), rest = all - each * grid.by;
        const uint32_t begin = each * blockIdx.x + min(blockIdx.x, rest);
        return {begin, begin + each + (blockIdx.x < rest ? 1 : 0)};
    }
};

struct Choices {
    const int64_t* ids;  // (tokens, top_k)
    uint32_t tokens, experts;
    Divisor top_k;
};

class Schedule {
  public:
    QMOE_INLINE static uint32_t bytes(uint32_t choices, uint32_t experts) noexcept {
        return (quads_of(experts) * 4 + 1) * 4 + choices * 4 + 2 * (3 * choices + 2);
    }
    // At `room`, 16-byte aligned.
    __device__ __forceinline__ Schedule(uint8_t* room, uint32_t choices, uint32_t experts)
        : starts_(reinterpret_cast<uint32_t*>(room)),
          ranks_(starts_ + quads_of(experts) * 4 + 1),
          order_(reinterpret_cast<uint16_t*>(ranks_ + choices)),
          first_rows_(order_ + choices),
          experts_(first_rows_ + choices + 1),
          all_(starts_ + quads_of(experts) * 4) {}

    // All threads call. `most` is what one product takes. Ids outside [0, experts) are left out. Choices of an expert keep
    // their order: all blocks of threads must cut them into the same products. Calls meanwhile() once, when the first ids
    // are on their way.
    template <typename Most, typename Meanwhile>
    __device__ __forceinline__ void make(const Choices& choices, const Most& most, const Meanwhile& meanwhile) {
        const uint32_t count = choices.tokens * choices.top_k.by, experts = choices.experts, quads = quads_of(experts),
                       lane = threadIdx.x % kLanes;
        const auto id_of = [&](uint32_t i) { return i < count ? choices.ids[i] : -1; };
        uint32_t i = threadIdx.x;
        int64_t id = id_of(i);
        auto* const starts = reinterpret_cast<uint4*>(starts_);
        for (uint32_t e = threadIdx.x; e < quads; e += blockDim.x) starts[e] = {};
        meanwhile();
#pragma unroll 1
        for (; i < count; i += blockDim.x, id = id_of(i))
            ranks_[i] = id >= 0 && id < experts ? static_cast<uint32_t>(id) << 16 : kNobody;
        __syncthreads();
        if (threadIdx.x < kLanes) {
            for (uint32_t first = 0; first < count; first += kLanes) {
                const uint32_t i = first + lane, own = i < count ? ranks_[i] : kNobody;
                const uint32_t alike = __match_any_sync(~0u, own), before = __popc(alike & ((1u << lane) - 1));
                if (own != kNobody) ranks_[i] = own | (starts_[own >> 16] + before);
                __syncwarp();
                if (own != kNobody && before == 0) starts_[own >> 16] += __popc(alike);
                __syncwarp();
            }
            // What comes before each expert: products in the upper half, rows in the lower one.
            const auto counted = [&](uint32_t rows) { return most.divide(rows + most.by - 1) << 16 | rows; };
            uint32_t before = 0;
            for (uint32_t first = 0; first < quads; first += kLanes) {
                const uint32_t q = first + lane;
                const uint4 rows = q < quads ? starts[q] : uint4{};
                const uint32_t x = counted(rows.x), y = x + counted(rows.y), z = y + counted(rows.z),
                               own = z + counted(rows.w);
                uint32_t sum = own;
#pragma unroll
                for (uint32_t d = 1; d < kLanes; d *= 2) {
                    const uint32_t below = __shfl_up_sync(~0u, sum, d);
                    if (lane >= d) sum += below;
                }
                const uint32_t here = before + sum - own;
                if (q < quads) starts[q] = {here, here + x, here + y, here + z};
                before += __shfl_sync(~0u, sum, kLanes - 1);
            }
            if (lane == 0) *all_ = before;
        }
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
            if (ranks_[i] == kNobody) continue;
            const uint32_t expert = ranks_[i] >> 16, rank = ranks_[i] & 0xffff, start = starts_[expert];
            const uint32_t row = (start & 0xffff) + rank;
            order_[row] = static_cast<uint16_t>(i);
            const uint32_t part = most.divide(rank);
            if (rank != part * most.by) continue;
            const uint32_t product = (start >> 16) + part;
            first_rows_[product] = static_cast<uint16_t>(row);
            experts_[product] = static_cast<uint16_t>(expert);
        }
        if (threadIdx.x == 0) first_rows_[products()] = static_cast<uint16_t>(*all_ & 0xffff);
        __syncthreads();
    }

    __device__ __forceinline__ uint32_t products() const {
        return *all_ >> 16;
    }
    __device__ __forceinline__ uint32_t expert(uint32_t product) const {
        return experts_[product];
    }
    // Of a product's rows first_row(product) .. first_row(product + 1) - 1 of the order.
    __device__ __forceinline__ uint32_t first_row(uint32_t product) const {
        return first_rows_[product];
    }
    __device__ __forceinline__ uint32_t choice(uint32_t row) const {
        return order_[row];
    }

  private:
    static constexpr uint32_t kNobody = ~0u;
    QMOE_INLINE static uint32_t quads_of(uint32_t experts) noexcept {
        return (experts + 3) / 4;
    }

    uint32_t *const starts_, *const ranks_;
    uint16_t *const order_, *const first_rows_, *const experts_;
    uint32_t* const all_;
};

}  // namespace qmoe::cuda
