// What the kernels share that multiply streams in one launch: a warp's work, what is between the projections of a layer of
// experts, and behind a product.
#pragma once

#include "experts/gates.cuh"
#include "experts/schedule.cuh"
#include "ternary/stack.cuh"

namespace qmoe::cuda {

// A warp's group of rows: what is known of this lane's row, and its quads, of which some are on their way.
struct TernaryTask {
    uint32_t info, levels, next, base;
    uint32_t k, k_end, step;
    const uint4* from;
    uint4 now, ahead, further;

    // Asks for what says where the quads are.
    __device__ __forceinline__ void look(const TernaryView& p, uint32_t expert, uint32_t group) {
        const uint32_t lane = threadIdx.x % kLanes, row = lane >> p.segment_bits, segment = lane & (p.segments - 1);
        const uint8_t* const matrix = p.matrix(expert);
        step = kLanes >> p.segment_bits;
        const uint32_t at = group * step + row;
        info = reinterpret_cast<const uint32_t*>(matrix)[at];
        levels = reinterpret_cast<const uint32_t*>(matrix + p.levels_at)[at];
        next = reinterpret_cast<const uint16_t*>(matrix + p.starts_at)[at * p.segments + segment];
        base = reinterpret_cast<const uint32_t*>(matrix + p.bases_at)[group];
        from = reinterpret_cast<const uint4*>(matrix + p.quads_at) + row;
    }
    // And for the first quads.
    __device__ __forceinline__ void fetch(const TernaryView& p) {
        const uint32_t segment = threadIdx.x % kLanes & (p.segments - 1), quads = info >> TernaryStreams::kRowBits;
        k = segment * quads >> p.segment_bits, k_end = (segment + 1) * quads >> p.segment_bits;
        from += base;
        now = quad(k), ahead = quad(k + 1), further = quad(k + 2);
    }
    __device__ __forceinline__ uint4 quad(uint32_t i) const { return i < k_end ? from[i * step] : uint4{}; }
    __device__ __forceinline__ uint32_t row() const { return info & ((1u << TernaryStreams::kRowBits) - 1); }
};

// What a first projection has left of a choice, for the second one's column.
template <typename Call>
__device__ __forceinline__ float second_input(const Call& call, uint32_t choice, uint32_t col) {
    const auto& first = call.projections[0];
    const float* const row = static_cast<const float*>(first.y) + uint64_t{choice} * first.rows;
    if (first.order == RowOrder::kPlain) return activated(row[col], call.gate.activation);
    const bool halves = first.order == RowOrder::kHalves;
    return gated(row[halves ? col : 2 * col], row[halves ? first.rows / 2 + col : 2 * col + 1], call.gate);
}

// The sum of a row of token m of a product: of a matrix its output, of experts what is to come next, float32 by choice.
template <typename T, bool kExperts, typename Call, typename Projection>
__device__ __forceinline__ void write_sum(const Call& call, const Projection& p, const Schedule& schedule,
                                          uint32_t product, uint32_t m, uint32_t row, float sum) {
    const T* const bias = static_cast<const T*>(p.bias);
    if constexpr (kExperts) {
        const uint32_t first_row = schedule.first_row(product);
        if (first_row + m >= schedule.first_row(product + 1)) return;
        const uint32_t choice = schedule.choice(first_row + m);
        if (bias != nullptr) sum += to_float(bias[uint64_t{schedule.expert(product)} * p.rows + row]);
        if (!p.is_first) sum *= load_weight(call.weights, choice, call.weights_type);
        static_cast<float*>(p.y)[uint64_t{choice} * p.rows + row] = sum;
    } else {
        if (m >= call.tokens) return;
        if (bias != nullptr) sum += to_float(bias[row]);
        static_cast<T*>(p.y)[uint64_t{m} * p.rows + row] = from_float<T>(sum);
    }
}

}  // namespace qmoe::cuda
