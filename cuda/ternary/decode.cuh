// Streams become codes of two bits, in shared memory: a warp decodes a group of rows, a lane a segment of one.
//
// Codes are 0, 1 for a plus, 2 for a minus, sixteen columns a word, a lower column at lower bits. A lane collects a word in a
// register and writes it when a symbol comes that belongs to another one: nobody else has columns of the words between its
// first and its last one. The first one may be the last one of the lane before, which is why lanes leave their last words
// when all others are written, by an atomic operation. One for every symbol took longer.
#pragma once

#include "gemm/matrix.cuh"
#include "launch.cuh"
#include "ternary/stack.cuh"

namespace qmoe::cuda {

struct TernaryCodes {
    static constexpr uint32_t kPlus = 1, kMinus = 2, kOfWord = 16;

    // Words of a row: whole blocks of a tile's columns.
    QMOE_INLINE static uint32_t words_of(uint32_t cols) noexcept {
        return (cols + kTileColumns - 1) / kTileColumns * (kTileColumns / kOfWord);
    }
    // Of shared memory that a warp needs.
    QMOE_INLINE static uint32_t bytes_of_warp(const TernaryView& stack) noexcept {
        return stack.group_rows * words_of(stack.cols) * 4;
    }
};

// Warps of a block of threads, of which each decodes one of `groups`: as many as share what a block may have without asking
// for more, at least one and at most 8, but fewer where multiprocessors would have nothing to do.
inline constexpr uint32_t kMostDecodingWarps = 8;
inline uint32_t decoding_warps(uint32_t bytes_of_warp, uint64_t groups, const Device& device) noexcept {
    const uint32_t fit = (48 << 10) / bytes_of_warp;
    uint32_t warps = fit > kMostDecodingWarps ? kMostDecodingWarps : fit > 0 ? fit : 1;
    while (warps > 1 && groups < uint64_t{2} * warps * device.multiprocessors) warps /= 2;
    return warps;
}

// What a lane has of a row's codes.
struct TernaryMarker {
    uint32_t* row;
    uint32_t next;      // slot
    uint32_t word = 0;  // where `codes` belongs
    uint32_t codes = 0;

    // All symbols of a quad; columns from slot `slots` on are none.
    template <int kGap>
    __device__ __forceinline__ void mark(const uint4& quad, uint32_t slots) {
        using Symbols = TernarySymbols<kGap>;
        constexpr uint32_t kStep = 1u << kGap;
        const Symbols symbols(quad);
#pragma unroll
        for (int i = 0; i < Symbols::kCount; ++i) {
            const uint32_t symbol = symbols[i];
            next += Symbols::gap(symbol) + (i > 0 ? 1 : 0);
            const uint32_t col = next - (next >> kGap), at = col / TernaryCodes::kOfWord;
            const bool is_column = next < slots && (~next & (kStep - 1)) != 0, moves = is_column && at != word;
            if (moves) row[word] = codes;
            codes = moves ? 0 : codes, word = moves ? at : word;
            const uint32_t code = (TernaryCodes::kPlus + Symbols::minus(symbol)) << (2 * col & 31);
            codes |= is_column ? code : 0;
        }
        ++next;
    }
    template <int kGap>
    __device__ __forceinline__ void mark_all(const uint4* from, uint32_t step, uint32_t k, uint32_t k_end,
                                             uint32_t slots) {
        word = (next - (next >> kGap)) / TernaryCodes::kOfWord;
        uint4 now = k < k_end ? from[k * step] : uint4{}, ahead = k + 1 < k_end ? from[(k + 1) * step] : uint4{};
#pragma unroll 1
        for (; k < k_end; ++k) {
            const uint4 fetched = k + 2 < k_end ? from[(k + 2) * step] : uint4{};
            mark<kGap>(now, slots);
            now = ahead, ahead = fetched;
        }
    }
};

// What is known of a group's rows, each by the lanes that decode it.
struct TernaryRows {
    uint32_t info, levels, segment_bits;

    // Of row r of the group: whole warps call.
    __device__ __forceinline__ uint32_t number(uint32_t r) const {
        return of_row(info, r) & ((1u << TernaryStreams::kRowBits) - 1);
    }
    // bfloat16 of a plus | of a minus << 16.
    __device__ __forceinline__ uint32_t levels_of(uint32_t r) const { return of_row(levels, r); }

  private:
    __device__ __forceinline__ uint32_t of_row(uint32_t value, uint32_t r) const {
        return __shfl_sync(~0u, value, static_cast<int>(r << segment_bits));
    }
};

// Leaves the codes of a group of an expert's rows at `codes` (group_rows, words_of(cols)), 16-byte aligned, which all lanes
// can then read.
__device__ __forceinline__ TernaryRows decode_group(const TernaryView& stack, const uint8_t* matrix, uint32_t group,
                                                    uint32_t* codes) {
    const uint32_t lane = threadIdx.x % kLanes, words = TernaryCodes::words_of(stack.cols);
    const uint32_t own = lane >> stack.segment_bits, segment = lane & (stack.segments - 1);
    const uint32_t at = group * stack.group_rows + own;
    const TernaryRows rows{.info = reinterpret_cast<const uint32_t*>(matrix)[at],
                           .levels = reinterpret_cast<const uint32_t*>(matrix + stack.levels_at)[at],
                           .segment_bits = stack.segment_bits};
    const uint4* const from = reinterpret_cast<const uint4*>(matrix + stack.quads_at) +
                              reinterpret_cast<const uint32_t*>(matrix + stack.bases_at)[group] + own;
    TernaryMarker marker{
        .row = codes + own * words,
        .next = reinterpret_cast<const uint16_t*>(matrix + stack.starts_at)[at * stack.segments + segment]};
    for (uint32_t i = lane; i < stack.group_rows * words / 4; i += kLanes) reinterpret_cast<uint4*>(codes)[i] = {};
    __syncwarp();
    const uint32_t quads = rows.info >> TernaryStreams::kRowBits;
    const uint32_t k = segment * quads >> stack.segment_bits, k_end = (segment + 1) * quads >> stack.segment_bits;
    switch (stack.gap_bits) {
        case 3: marker.mark_all<3>(from, stack.group_rows, k, k_end, stack.slots); break;
        case 4: marker.mark_all<4>(from, stack.group_rows, k, k_end, stack.slots); break;
        case 5: marker.mark_all<5>(from, stack.group_rows, k, k_end, stack.slots); break;
        case 6: marker.mark_all<6>(from, stack.group_rows, k, k_end, stack.slots); break;
        default: marker.mark_all<7>(from, stack.group_rows, k, k_end, stack.slots);
    }
    __syncwarp();
    if (marker.codes != 0) atomicOr(marker.row + marker.word, marker.codes);
    __syncwarp();
    return rows;
}

}  // namespace qmoe::cuda
