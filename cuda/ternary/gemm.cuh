// `ternary` times many tokens: streams become tiles of two bits a weight (weights.cuh) in the workspace, for as many experts
// at a time as have room there, and those are multiplied.
#pragma once

#include "gemm/gemm.cuh"
#include "ternary/stack.cuh"

namespace qmoe::cuda {

// What a stack's matrices are as tiles; `tiles` itself is not set.
TiledMatrix ternary_tiles(const TernaryView& stack) noexcept;

// A launch: of up to two stacks the experts first .. last - 1 become tiles, expert `first` at matrices[i].tiles; where there
// is a schedule, those of them that have products.
struct TernaryExpansion {
    TernaryView stacks[2];
    TiledMatrix matrices[2];
    uint32_t count;
    uint32_t first, last;
    bool scheduled;
    GemmSchedule schedule;
    uint32_t most_products;
};
Status launch_expansion(const TernaryExpansion& call, const Device& device, cudaStream_t stream) noexcept;

template <typename T>
Status launch_ternary_gemm(const Gemm& call, const Device& device, cudaStream_t stream) noexcept;

}  // namespace qmoe::cuda
