// What a launch of few_tokens.cuh is told, and how it divides a block's shared memory.
#pragma once

#include <algorithm>

#include "common.cuh"
#include "experts/schedule.cuh"
#include "int/tiles.h"
#include "launch.cuh"

namespace qmoe::cuda {

// One product.
struct Projection {
    const uint8_t* tiles;  // of expert 0
    uint64_t expert_bytes, scales_at;
    const void *x, *bias;
    void* y;
    uint32_t rows, cols;          // rows as stored
    Divisor count;                // tiles of an expert
    uint32_t all_blocks, blocks;  // of a tile; of a slice of it
    uint32_t parts;               // that a tile is divided into, of a warp each; its logarithm to the base of 2
    uint32_t batch, buffers;      // tiles of a batch; 2 where sums of two batches have room
    uint32_t fit;                 // rows of x that there is room for
    uint32_t slabs, slab;         // of a slice's columns, 1 where activations of all of them have room; blocks of one
    Divisor lines;                // of 512 bytes of a slab's row of x, what a warp loads at once
    float zero;
    bool is_first;  // of experts: x has a row per token, and a gate follows; else one per choice, and sums over them
    RowOrder order;
};

// A launch: a linear layer's product, or one or both of a layer of experts.
struct FewTokens {
    Projection projections[2];
    uint32_t count;  // of them
    // Of all their tiles.
    uint32_t groups, scale_bytes;  // groups of a block, 1 where a row is a group
    bool has_zeros, bf16_scales, row_groups;
    uint32_t slices;   // of the columns, each of another block of threads of a cluster; its logarithm to the base of 2
    uint32_t tokens;   // of x; of experts all, of a matrix at most 8 kN
    uint32_t most;     // tokens that one product can have, at most 8 kN
    uint32_t tiles;    // whose sums a warp has at a time; of as many a block each is a stage of its ring
    uint32_t columns;  // of partial sums, of two tokens each
    bool shared_partials;  // where activations have been, which come anew for every batch
    uint32_t slot_bytes, slot_scales, x_bytes, partial_bytes;  // of shared memory
    Divisor shares;
    // Of experts alone.
    Choices choices;
    const void* weights;
    OutputType weights_type;
    Gate gate;
    void* y;  // (tokens, rows of the second projection), where both are here
};

// Of a block of threads, the only one of its multiprocessor, with 128 registers a thread.
inline constexpr uint32_t kWarpsLog = 4, kWarps = 1u << kWarpsLog;

template <int kBits>
inline constexpr uint32_t kCodeBytes = 2 * kBits * 4 * kLanes;  // of a block

// Tiles whose sums a warp has at most, and stages of its ring, of a block of each: about 8 KiB.
template <int kBits, int kN, bool kWhole>
inline constexpr uint32_t kTilesOf = kBits == 8                        ? 2
                                     : kBits == 2 && kN == 1 && kWhole ? 8
                                                                       : 4;
template <int kBits, int kN, bool kWhole>
inline constexpr uint32_t kStagesOf = kWhole ? 8192 / (kTilesOf<kBits, kN, kWhole> * kCodeBytes<kBits>) : 2;

QMOE_INLINE uint32_t larger(uint32_t a, uint32_t b) noexcept {
    return a > b ? a : b;
}

// What is where in shared memory, from the rings on.
struct Room {
    uint32_t x, partials, weights, schedule, bytes;

    QMOE_INLINE Room(const FewTokens& call, uint32_t ring_bytes, bool experts) noexcept {
        const uint32_t choices = experts ? call.tokens * call.choices.top_k.by : 0;
        x = ring_bytes;  // x: [row][16-byte piece], with a gap of 64 bytes behind a row
        // partials: [buffer][tile][part][two tokens][g]
        partials = call.shared_partials ? x : x + call.x_bytes;
        weights = larger(x + call.x_bytes, partials + call.partial_bytes);
        schedule = weights + choices * 4;  // weights: of the rows of x
        bytes = schedule + (experts ? Schedule::bytes(choices, call.choices.experts) : 0);
    }
};

// Blocks of a warp's part of a slab: every so many, so that warps read what is beside each other at the same time.
struct Run {
    uint32_t first, count;  // in the slab
};
__device__ __forceinline__ Run run_of(const Projection& p, uint32_t warp, uint32_t slab) {
    const uint32_t parts = 1u << p.parts, part = warp & (parts - 1), blocks = min(p.slab, p.blocks - slab * p.slab);
    return {part, (blocks + parts - 1 - part) >> p.parts};
}

template <bool kExperts>
__device__ __forceinline__ Range share_of(const FewTokens& call, const Projection& p, const Schedule& schedule) {
    return Range::share((kExperts ? schedule.products() : 1) * p.count.by, call.shares,
                        kExperts ? blockIdx.x : blockIdx.x >> call.slices);
}

// Scales of rows that are one group each, with zeros 32 bytes behind.
template <bool kExperts>
__device__ __forceinline__ const uint8_t* row_scales(const FewTokens& call, const Projection& p,
                                                     const Schedule& schedule, uint32_t tile) {
    const uint32_t product = kExperts ? p.count.divide(tile) : 0;
    return p.tiles + (kExperts ? schedule.expert(product) * p.expert_bytes : 0) + p.scales_at +
           uint64_t{tile - product * p.count.by} * call.scale_bytes;
}

// How many shares there are, each for a block of threads or a cluster of them: as many as can be at the same time, or of
// one matrix as few as are done in the same time.
inline uint32_t shares_of(const FewTokens& call, bool experts, const Device& device) noexcept {
    const uint32_t most = device.multiprocessors >> call.slices;
    if (experts) return most;
    const auto count = uint64_t{call.projections[0].count.by};
    return static_cast<uint32_t>(ceil_div(count, ceil_div(count, most)));
}

// Divides a block's work and shared memory for products of at most call.most tokens. False where that has no room.
// slabs: activations may come slab by slab.
bool divide(FewTokens& call, uint32_t bits, uint32_t stages, bool experts, const Device& device, bool slabs) noexcept;

template <typename T, int kBits, bool kExperts>
Status launch_few_tokens(FewTokens call, const Device& device, cudaStream_t stream) noexcept;

}  // namespace qmoe::cuda
