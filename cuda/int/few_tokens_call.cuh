// A launch of few_tokens.cuh's kernel, and what is where in the shared memory of its blocks of threads.
#pragma once

#include "experts/schedule.cuh"
#include "gemm/matrix.cuh"
#include "ring.cuh"

namespace qmoe::cuda {

// One product.
struct Projection : TiledMatrix {
    const void *x, *bias;
    void* y;
    uint32_t fit;        // rows of x that there is room for; 0 where it comes in slabs
    Divisor slab;        // blocks of a slab, of all columns where there is room
    uint32_t row_bytes;  // of shared memory, for a slab of a row of x and its sums
    bool is_first;  // of experts: x has a row per token, and a gate follows; else one per choice, and sums over them
    bool by_token;  // of a first one: all of x comes at once, before it is known who needs what
    // Of a second one behind its first one: blocks of threads share tiles, and have them of all experts, so that each makes
    // its rows' sums over a token's choices.
    bool all_experts;
};

// A launch: a linear layer's product, or one or both of a layer of experts.
struct FewTokens {
    Projection projections[2];
    uint32_t count;    // of them
    uint32_t slots;    // of a ring
    uint32_t chunk;    // blocks of a slot
    uint32_t ahead;    // of them, filled before activations are asked for
    uint32_t x_bytes;  // of shared memory, for activations
    uint32_t tokens;   // of x; of experts all, of a matrix at most 8 kN
    Divisor most;      // tokens that one product can have, at most 8 kN
    Divisor grid;
    // Of experts alone.
    Choices choices;
    const void* weights;
    OutputType weights_type;
    Gate gate;
    void* y;  // (tokens, rows of the second projection), where both are here
};

// Of a block of threads, the only one of its multiprocessor. 32 with 64 registers each, and two blocks of 8 with half of the
// shared memory each, were slower.
inline constexpr uint32_t kWarps = 16;

// What is where in shared memory.
template <int kBits, int kN>
struct Room {
    uint32_t barriers, cut, x, weights, schedule, bytes;

    QMOE_INLINE Room(const FewTokens& call, bool experts) noexcept {
        const uint32_t choices = experts ? call.tokens * call.choices.top_k.by : 0;
        barriers = kWarps * call.slots * call.chunk * call.projections[0].block_bytes;
        cut = barriers + kWarps * call.slots * kBarrierBytes;
        x = cut + kWarps * kN * kLanes * 16;                // cut: [warp][n][lane]
        weights = x + call.x_bytes;                         // x: [row][16-byte pieces, sums of groups]
        schedule = (weights + choices * 4 + 15) / 16 * 16;  // weights: of the rows of x
        bytes = schedule + (experts ? Schedule::bytes(choices, call.choices.experts) : 0);
    }
};

// Of a row of x: what a block takes, columns and their sums by group; and so that neighbouring rows are in different banks.
constexpr uint32_t x_bytes_of_block(uint32_t groups) noexcept {
    return kTileColumns * 2 + groups * sizeof(float2);
}
inline constexpr uint32_t kRowGap = 16, kRowMultiple = 128;
constexpr uint32_t x_bytes_of_row(uint32_t blocks, uint32_t groups) noexcept {
    return static_cast<uint32_t>(ceil_div(blocks * x_bytes_of_block(groups), kRowMultiple)) * kRowMultiple + kRowGap;
}

}  // namespace qmoe::cuda
