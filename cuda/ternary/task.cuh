// A warp's work on streams, of those kernels that read them directly.
#pragma once

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

}  // namespace qmoe::cuda
