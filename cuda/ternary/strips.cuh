// `ternary` times 5 to 16 tokens, where walking through the nonzeros for every four of them takes longer: streams become codes
// in shared memory once, which tensor cores multiply.
//
// A *strip* is the rows of one or of neighbouring groups of streams, in their order: 16, or 32 where a group has as many. It
// is two bits a column: 1 for a plus, 2 for a minus. The products with a code's lower bit and with its upper one have sums of
// their own, which a row's levels are multiplied by. A bit is an operand where it is (int/operands.cuh), up to the eighth
// one of each half of a word.
//
// Each block of threads has a share of neighbouring strips, and all activations. It takes as many strips at a time as there
// is room for beside these: warps first decode groups, while activations come, then divide the strips' columns. Results
// depend on nothing but the shape, the tokens and the number of multiprocessors.
#pragma once

#include <algorithm>

#include "experts/schedule.cuh"
#include "int/operands.cuh"
#include "launch.cuh"
#include "ternary/decode.cuh"

namespace qmoe::cuda {

struct StripTokens : TernaryView {
    const void *x, *bias;
    void* y;
    uint32_t tokens;        // at most 8 kN
    uint32_t strips;        // of the matrix
    uint32_t strip_groups;  // groups of a strip
    uint32_t batch;         // strips that there is room for at once
    uint32_t blocks;        // of a row's columns
    Divisor grid;

    QMOE_INLINE uint32_t strip_rows() const noexcept { return strip_groups * group_rows; }
};

struct Strips {
    static constexpr uint32_t kWarps = 16;
    static constexpr uint32_t kTile = 16;                            // rows of a product of the tensor cores
    static constexpr uint32_t kMostTiles = kWarps;                   // of a batch
    static constexpr uint32_t kOfBlock = 4 * TernaryCodes::kOfWord;  // columns
    static constexpr uint32_t kBlockBytes = kOfBlock * 2;            // of a token's activations

    // Words of a row of codes, and bytes of a row of activations: neighbouring rows' are in different banks.
    QMOE_INLINE static uint32_t pitch(uint32_t blocks) noexcept { return 4 * (blocks | 1); }
    QMOE_INLINE static uint32_t row_bytes(uint32_t blocks) noexcept { return blocks * kBlockBytes + 16; }
};

// What is where in shared memory.
template <int kN>
struct StripRoom {
    // First of all the rows of two batches, their number and levels. cut: [warp][n][lane]
    static constexpr uint32_t cut = 2 * Strips::kMostTiles * Strips::kTile * 8;
    uint32_t x, strips;

    QMOE_INLINE explicit StripRoom(const StripTokens& call) noexcept {
        x = cut + Strips::kWarps * kN * kLanes * 16;
        strips = x + 8 * kN * Strips::row_bytes(call.blocks);
    }
};

// Bits 2 q of both halves of a word, as an operand of the tensor cores, and bits 2 q + 1, which count twice. In bfloat16 those
// of four q have factors 1, 4, 16 and 64, which activations are divided by.
template <typename T, int kQ>
__device__ __forceinline__ uint32_t strip_operand(uint32_t word, bool minus) {
    constexpr bool kIsHalf = std::is_same_v<T, __half>;
    constexpr int kBy = kIsHalf ? 2 * kQ : kQ / 4 * 8, kAt = kIsHalf ? 0 : kQ % 4 * 2;
    return word >> kBy & (minus ? 0x00020002u : 0x00010001u) << kAt;
}
template <typename T>
__device__ __forceinline__ float strip_scale(uint32_t q) {
    return std::is_same_v<T, __half> ? 1.0f : __uint_as_float((127 + 64 - 2 * (q % 4)) << 23);
}

// Sixteen activations of a token, from column 16 t of a block on, as they are in memory. Column 8 h + q of them becomes number
// 8 q + 2 t + h of the block: what one product takes lies together.
template <typename T>
struct StripInputs {
    uint4 halves[2];

    // Of columns q and 8 + q.
    __device__ __forceinline__ uint32_t pair(uint32_t q) const {
        const auto word = [&](const uint4& v) { return q / 2 == 0 ? v.x : q / 2 == 1 ? v.y : q / 2 == 2 ? v.z : v.w; };
        const uint32_t two = __byte_perm(word(halves[0]), word(halves[1]), q % 2 == 0 ? 0x5410 : 0x7632);
        if constexpr (std::is_same_v<T, __half>) return two;
        const __nv_bfloat162 v =
            __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&two), __float2bfloat162_rn(strip_scale<T>(q)));
        return *reinterpret_cast<const uint32_t*>(&v);
    }
    // `block` is a token's in shared memory.
    __device__ __forceinline__ void put(uint8_t* block, uint32_t t) const {
#pragma unroll
        for (uint32_t q = 0; q < 8; ++q) *reinterpret_cast<uint32_t*>(block + q * 16 + t * 4) = pair(q);
    }
};

// All activations in shared memory. A warp takes eight tokens of a block at a time, a lane sixteen columns of one.
template <typename T>
struct StripActivations {
    const StripTokens& call;
    uint8_t* x;

    // Rows that are aligned to 16 bytes are copied as they are while something else is done, and then put in order.
    __device__ __forceinline__ bool are_copied() const {
        return call.cols % 8 == 0 && reinterpret_cast<uintptr_t>(call.x) % 16 == 0;
    }
    __device__ __forceinline__ void begin() const {
        if (!are_copied()) return;
        for_all([&](uint32_t m, uint32_t col, uint8_t* block) {
            const T* const from = row(min(m, call.tokens - 1)) + col;
            uint8_t* const to = block + threadIdx.x % kLanes / 8 * 32;
            copy_16_if(m < call.tokens, to, from, col < call.cols);
            copy_16_if(m < call.tokens, to + 16, from + 8, col + 8 < call.cols);
        });
    }
    __device__ __forceinline__ void finish() const {
        const uint32_t t = threadIdx.x % kLanes / 8;
        const bool copied = are_copied();
        wait_for_copies();
        __syncwarp();
        for_all([&](uint32_t m, uint32_t col, uint8_t* block) {
            StripInputs<T> inputs{};
            if (m < call.tokens && copied)
                for (uint32_t h = 0; h < 2; ++h)
                    inputs.halves[h] = *reinterpret_cast<const uint4*>(block + t * 32 + h * 16);
            else if (m < call.tokens)
                for (uint32_t i = 0; i < 16; ++i)
                    if (col + i < call.cols) reinterpret_cast<T*>(inputs.halves)[i] = row(m)[col + i];
            __syncwarp();
            if (m < call.tokens) inputs.put(block, t);
        });
    }

  private:
    __device__ __forceinline__ const T* row(uint32_t m) const {
        return static_cast<const T*>(call.x) + uint64_t{m} * call.cols;
    }
    // Calls with(m, column, its block in shared memory) for what this lane has; all lanes call.
    template <typename With>
    __device__ __forceinline__ void for_all(const With& with) const {
        const uint32_t eights = (call.tokens + 7) / 8;
#pragma unroll 2
        for (uint32_t at = threadIdx.x / kLanes; at < eights * call.blocks; at += Strips::kWarps) {
            const uint32_t block = eights == 1 ? at : at / 2, m = (eights == 1 ? 0 : at % 2 * 8) + threadIdx.x % 8;
            with(m, block * Strips::kOfBlock + threadIdx.x % kLanes / 8 * 16,
                 x + m * Strips::row_bytes(call.blocks) + block * Strips::kBlockBytes);
        }
    }
};

template <typename T, int kN>
__global__ __launch_bounds__(Strips::kWarps* kLanes, 1) void ternary_strips(const __grid_constant__ StripTokens call) {
    constexpr uint32_t kWarps = Strips::kWarps, kTile = Strips::kTile, kNone = ~0u;
    QMOE_SHARED_MEMORY(shared, 16);
    const StripRoom<kN> room(call);
    const uint32_t warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
    float4* const cut = reinterpret_cast<float4*>(shared + room.cut);
    uint32_t* const strips = reinterpret_cast<uint32_t*>(shared + room.strips);
    const uint32_t pitch = Strips::pitch(call.blocks), row_bytes = Strips::row_bytes(call.blocks);
    const uint32_t groups = (call.rows + call.group_rows - 1) >> (5 - call.segment_bits);
    const Range share = Range::share(call.strips, call.grid);
    const uint32_t end_group = min(share.end * call.strip_groups, groups);

    // A warp's groups are those of its number in each batch. The next one is asked for while one is decoded.
    const auto batch_end = [&](uint32_t begin) { return min((begin + call.batch) * call.strip_groups, end_group); };
    const auto group_behind = [&](uint32_t group, uint32_t begin) {
        if (group + kWarps < batch_end(begin)) return group + kWarps;
        const uint32_t next = begin + call.batch, first = next * call.strip_groups + warp;
        return next < share.end && first < batch_end(next) ? first : kNone;
    };
    TernaryTask task{};
    uint32_t group = share.begin * call.strip_groups + warp;
    if (group >= batch_end(share.begin)) group = kNone;
    if (group != kNone) task.look(call, 0, group), task.fetch(call);
    wait_for_previous();
    let_next_begin();
    const StripActivations<T> activations{call, shared + room.x};
    activations.begin();
#pragma unroll 1
    for (uint32_t begin = share.begin, turn = 0; begin < share.end; begin += call.batch, ++turn) {
        const uint32_t first_group = begin * call.strip_groups, last_group = batch_end(begin);
        const uint32_t tiles = min(call.batch, share.end - begin) * call.strip_rows() / kTile;
        uint2* const rows = reinterpret_cast<uint2*>(shared) + turn % 2 * Strips::kMostTiles * kTile;
        for (uint32_t i = (last_group - first_group) * call.group_rows + threadIdx.x; i < tiles * kTile;
             i += blockDim.x)
            rows[i] = {kNone, 0};
#pragma unroll 1
        while (group < last_group) {
            TernaryTask now = task;
            const uint32_t place = (group - first_group) * call.group_rows;
            group = group_behind(group, begin);
            if (group != kNone) task.look(call, 0, group);
            if ((lane & (call.segments - 1)) == 0) rows[place + (lane >> call.segment_bits)] = {now.row(), now.levels};
            decode_group(call, now, strips + place * pitch, pitch);
            if (group != kNone) task.fetch(call);
        }
        if (turn == 0) activations.finish();
        __syncthreads();
        const uint32_t team = kWarps / tiles, tile = warp / team, member = warp - tile * team;
        if (tile < tiles) {
            const uint32_t* const own_codes = strips + (tile * kTile + g) * pitch + t;
            const uint8_t* const own = shared + room.x + lane % 8 * row_bytes + lane / 8 * 16;
            const uint32_t end = (member + 1) * call.blocks / team;
            float plus[kN][4] = {}, minus[kN][4] = {};
#pragma unroll 2
            for (uint32_t b = member * call.blocks / team; b < end; ++b) {
                const uint32_t words[2] = {own_codes[4 * b], own_codes[8 * pitch + 4 * b]};
                uint32_t columns[kN][8];
#pragma unroll
                for (int n = 0; n < kN; ++n)
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const uint4 four = load_matrices(own + b * Strips::kBlockBytes + n * 8 * row_bytes + h * 64);
                        columns[n][4 * h] = four.x, columns[n][4 * h + 1] = four.y;
                        columns[n][4 * h + 2] = four.z, columns[n][4 * h + 3] = four.w;
                    }
                const auto step = [&]<int kQ>() {
                    uint32_t a[4];
#pragma unroll
                    for (int upper = 0; upper < 2; ++upper) {
#pragma unroll
                        for (int r = 0; r < 2; ++r) {
                            a[r] = strip_operand<T, kQ>(words[r], upper != 0);
                            a[2 + r] = strip_operand<T, kQ + 1>(words[r], upper != 0);
                        }
#pragma unroll
                        for (int n = 0; n < kN; ++n)
                            mma<T>(upper ? minus[n] : plus[n], a, columns[n][kQ], columns[n][kQ + 1]);
                    }
                };
                step.template operator()<0>();
                step.template operator()<2>();
                step.template operator()<4>();
                step.template operator()<6>();
            }
            const uint32_t levels[2] = {rows[tile * kTile + g].y, rows[tile * kTile + g + 8].y};
#pragma unroll
            for (int n = 0; n < kN; ++n) {
                float sums[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float high = __uint_as_float(levels[i / 2] << 16);
                    const float low = __uint_as_float(levels[i / 2] & 0xffff0000u);
                    sums[i] = fmaf(high, plus[n][i] * kBehind<T>, low * (minus[n][i] * (kBehind<T> / 2)));
                }
                cut[(warp * kN + n) * kLanes + lane] = {sums[0], sums[1], sums[2], sums[3]};
            }
        }
        __syncthreads();
        // What the members of a team have, in their order. Four numbers of a lane are of rows g and g + 8, tokens 2 t and
        // 2 t + 1 of each.
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < tiles * kN * kLanes * 4; i += blockDim.x) {
            const uint32_t at = i % (kN * kLanes * 4), of_tile = i / (kN * kLanes * 4);
            const uint32_t n = at / (kLanes * 4), from = at / 4 % kLanes, j = at % 4;
            const uint32_t m = 8 * n + 2 * (from % 4) + j % 2;
            const uint32_t row = rows[of_tile * kTile + from / 4 + 8 * (j / 2)].x;
            if (m >= call.tokens || row >= call.rows) continue;
            float sum = call.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(call.bias)[row]);
            for (uint32_t other = of_tile * team; other < (of_tile + 1) * team; ++other)
                sum += reinterpret_cast<const float*>(cut)[other * kN * kLanes * 4 + at];
            static_cast<T*>(call.y)[uint64_t{m} * call.rows + row] = from_float<T>(sum);
        }
    }
}

// Of the call the matrix, its operands and `tokens` are set. `launched`: whether there is room for two strips, or all of a
// share, beside the activations; nothing is done where there is not.
Status launch_strips(StripTokens call, OutputType type, const Device& device, cudaStream_t stream,
                     bool& launched) noexcept;

}  // namespace qmoe::cuda
