// `ternary` times up to 16 tokens of a product, of one matrix or of a layer's experts, where walking through the nonzeros
// for every token of them takes longer: streams become codes in shared memory once, which tensor cores multiply.
//
// A *strip* is the rows of one or of neighbouring groups of streams, in their order: 16, or 32 where a group has as many. It
// is two bits a column: 1 for a plus, 2 for a minus. The products with a
// code's lower bit and with its upper one have sums of their own, which a row's levels are multiplied by. A bit is an
// operand where it is (int/operands.cuh), up to the eighth one of each half of a word.
//
// Each block of threads has a share of neighbouring strips, of one matrix or across those of experts, and takes as many of
// one product at a time as there is room for beside its activations: warps first decode groups, then divide the strips'
// columns. Activations that have no room come slab by slab. Both projections of a layer of experts and the sums over a
// token's choices are one launch, with barriers of all blocks of threads between them. Results depend on nothing but the
// shape, the tokens and the number of multiprocessors.
#pragma once

#include <cooperative_groups.h>

#include <algorithm>

#include "experts/combine.cuh"
#include "int/operands.cuh"
#include "launch.cuh"
#include "ternary/decode.cuh"

namespace qmoe::cuda {

struct StripProjection : TernaryView {
    const void *x, *bias;
    void* y;
    Divisor strips;         // of a matrix
    uint32_t strip_groups;  // groups of a strip
    uint32_t batch;         // strips that there is room for at once
    uint32_t blocks;        // of a row's slots
    uint32_t slab;          // of those, that there is room for the activations of
    uint32_t x_at;          // in shared memory
    bool is_first;          // of experts: x has a row per token; else x is what the first one has left, by choice

    QMOE_INLINE uint32_t strip_rows() const noexcept { return strip_groups * group_rows; }
};

struct StripTokens {
    StripProjection projections[2];
    uint32_t count;   // of them
    uint32_t tokens;  // of x; of a matrix at most 8 kN
    Divisor grid;
    // Of experts alone.
    Choices choices;
    const void* weights;
    OutputType weights_type;
    Gate gate;
    void* y;
};

struct Strips {
    static constexpr uint32_t kWarps = 16;
    static constexpr uint32_t kTile = 16;                            // rows of a product of the tensor cores
    static constexpr uint32_t kMostTiles = kWarps;                   // of a batch
    static constexpr uint32_t kOfWord = 16, kOfBlock = 4 * kOfWord;  // columns
    static constexpr uint32_t kBlockBytes = kOfBlock * 2;            // of a token's activations
    static constexpr uint32_t kRowGap = 16;  // so that neighbouring rows of activations are in different banks

    // Words of a row: neighbouring rows' in different banks.
    QMOE_INLINE static uint32_t pitch(uint32_t blocks) noexcept { return 4 * (blocks | 1); }
    QMOE_INLINE static uint32_t row_bytes(uint32_t slab) noexcept { return slab * kBlockBytes + kRowGap; }
};

// What is where in shared memory, but for what differs by projection, which comes behind.
template <int kN>
struct StripRoom {
    uint32_t rows, cut, strips;  // rows: of two batches, their number and levels; cut: [warp][n][lane]

    QMOE_INLINE StripRoom(const StripTokens& call, bool experts) noexcept {
        rows =
            experts ? (Schedule::bytes(call.tokens * call.choices.top_k.by, call.choices.experts) + 15) / 16 * 16 : 0;
        cut = rows + 2 * Strips::kMostTiles * Strips::kTile * 8;
        strips = cut + Strips::kWarps * kN * kLanes * 16;
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

// A slab of the activations of a product's tokens, `count` blocks of columns from block `first` on. A warp takes eight
// tokens of a block at a time, a lane sixteen columns of one. `row_of(m)` is where token m's are in memory.
template <typename T>
struct StripSlab {
    uint8_t* x;
    uint32_t row_bytes, tokens, first, count, cols;

    // Calls with(m, block, its place in shared memory) for what this lane has; all lanes call.
    template <typename With>
    __device__ __forceinline__ void for_all(const With& with) const {
        const uint32_t rows = (tokens + 7) / 8;
#pragma unroll 2
        for (uint32_t at = threadIdx.x / kLanes; at < rows * count; at += Strips::kWarps) {
            const uint32_t block = rows == 1 ? at : at / 2, m = (rows == 1 ? 0 : at % 2 * 8) + threadIdx.x % 8;
            with(m, (first + block) * Strips::kOfBlock + threadIdx.x % kLanes / 8 * 16,
                 x + m * row_bytes + block * Strips::kBlockBytes);
        }
    }
    // Rows that are aligned to 16 bytes are copied as they are while something else is done, and then put in order.
    template <typename Row>
    __device__ __forceinline__ void begin(const Row& row_of) const {
        for_all([&](uint32_t m, uint32_t col, uint8_t* to) {
            const T* const from = row_of(min(m, tokens - 1)) + col;
            to += threadIdx.x % kLanes / 8 * 32;
            copy_16_if(m < tokens, to, from, col < cols);
            copy_16_if(m < tokens, to + 16, from + 8, col + 8 < cols);
        });
    }
    __device__ __forceinline__ void finish() const {
        const uint32_t t = threadIdx.x % kLanes / 8;
        wait_for_copies();
        __syncwarp();
        for_all([&](uint32_t m, uint32_t, uint8_t* block) {
            StripInputs<T> inputs{};
            if (m < tokens)
                for (uint32_t h = 0; h < 2; ++h)
                    inputs.halves[h] = *reinterpret_cast<const uint4*>(block + t * 32 + h * 16);
            __syncwarp();
            if (m < tokens) inputs.put(block, t);
        });
    }
    // Others come number by number: `load` gives a token's of a column.
    template <typename Load>
    __device__ __forceinline__ void bring(const Load& load) const {
        constexpr uint32_t kAtOnce = 4;
        const uint32_t q = threadIdx.x % 8, t = threadIdx.x % kLanes / 8;
#pragma unroll 1
        for (uint32_t block = threadIdx.x / kLanes; block < count; block += Strips::kWarps) {
            const uint32_t col = (first + block) * Strips::kOfBlock + 16 * t + q;
            uint8_t* to = x + block * Strips::kBlockBytes + q * 16 + t * 4;
#pragma unroll 1
            for (uint32_t m = 0; m < tokens; m += kAtOnce) {
                float values[kAtOnce][2];
#pragma unroll
                for (uint32_t j = 0; j < kAtOnce; ++j)
#pragma unroll
                    for (uint32_t h = 0; h < 2; ++h)
                        values[j][h] = m + j < tokens && col + 8 * h < cols ? load(m + j, col + 8 * h) : 0.0f;
#pragma unroll
                for (uint32_t j = 0; j < kAtOnce; ++j, to += row_bytes) {
                    if (m + j >= tokens) break;
                    const float scale = strip_scale<T>(q);
                    const T two[2] = {from_float<T>(values[j][0] * scale), from_float<T>(values[j][1] * scale)};
                    *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(two);
                }
            }
        }
    }
};

template <typename T, int kN, bool kExperts>
__global__ __launch_bounds__(Strips::kWarps* kLanes, 1) void ternary_strips(const __grid_constant__ StripTokens call) {
    constexpr uint32_t kWarps = Strips::kWarps, kTile = Strips::kTile, kNone = ~0u;
    QMOE_SHARED_MEMORY(shared, 16);
    const StripRoom<kN> room(call, kExperts);
    const uint32_t warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
    float4* const cut = reinterpret_cast<float4*>(shared + room.cut);
    uint32_t* const strips = reinterpret_cast<uint32_t*>(shared + room.strips);
    Schedule schedule(shared, kExperts ? call.tokens * call.choices.top_k.by : 0, call.choices.experts);

    // A batch: strips of one product.
    struct Batch {
        uint32_t product, strip, count, groups;  // the first strip of its matrix; and groups that there are
    };
    const auto batch_at = [&](const StripProjection& p, uint32_t begin, uint32_t end) {
        Batch batch{};
        batch.product = kExperts ? p.strips.divide(begin) : 0;
        batch.strip = begin - batch.product * p.strips.by;
        batch.count = min(min(end - begin, p.strips.by - batch.strip), p.batch);
        const uint32_t groups = (p.rows + p.group_rows - 1) >> (5 - p.segment_bits);
        batch.groups = min(batch.count * p.strip_groups, groups - batch.strip * p.strip_groups);
        return batch;
    };
    TernaryTask task{};
    const auto look = [&](const StripProjection& p, const Batch& batch, uint32_t group) {
        task.look(p, kExperts ? schedule.expert(batch.product) : 0, batch.strip * p.strip_groups + group);
    };
    const auto share_of = [&](const StripProjection& p) {
        return Range::share((kExperts ? schedule.products() : 1) * p.strips.by, call.grid);
    };
    // A warp's first group of a batch is asked for before the batch's turn comes.
    const auto open = [&](const StripProjection& p, uint32_t begin, uint32_t end) {
        if (begin >= end) return;
        const Batch batch = batch_at(p, begin, end);
        if (warp < batch.groups) look(p, batch, warp), task.fetch(p);
    };

    if constexpr (kExperts) {
        wait_for_previous();
        let_next_begin();
        schedule.make(call.choices, FixedDivisor<8 * kN>{}, [] {});
    }
    {
        const Range share = share_of(call.projections[0]);
        open(call.projections[0], share.begin, share.end);
    }
    if constexpr (!kExperts) {
        wait_for_previous();
        let_next_begin();
    }
    uint32_t turn = 0;
#pragma unroll 1
    for (uint32_t projection = 0; projection < call.count; ++projection) {
        if (projection > 0) cooperative_groups::this_grid().sync();
        const StripProjection& p = call.projections[projection];
        const uint32_t pitch = Strips::pitch(p.blocks), row_bytes = Strips::row_bytes(p.slab);
        uint8_t* const x = shared + p.x_at;
        const Range share = share_of(p);
        const bool copies = (!kExperts || p.is_first) && p.cols % 8 == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
        uint32_t brought = kNone;  // the product whose activations are there, all of them
#pragma unroll 1
        for (uint32_t begin = share.begin; begin < share.end; ++turn) {
            const Batch batch = batch_at(p, begin, share.end);
            begin += batch.count;
            const uint32_t tiles = batch.count * p.strip_rows() / kTile;
            uint2* const rows = reinterpret_cast<uint2*>(shared + room.rows) + turn % 2 * Strips::kMostTiles * kTile;
            for (uint32_t i = batch.groups * p.group_rows + threadIdx.x; i < tiles * kTile; i += blockDim.x)
                rows[i] = {kNone, 0};
            const uint32_t first_row = kExperts ? schedule.first_row(batch.product) : 0;
            const uint32_t tokens = kExperts ? schedule.first_row(batch.product + 1) - first_row : call.tokens;
            const bool brings = p.slab < p.blocks || brought != batch.product;
            StripSlab<T> slab{x, row_bytes, tokens, 0, min(p.slab, p.blocks), p.cols};
            const auto row_of = [&](uint32_t m) {
                const uint64_t row = kExperts ? call.choices.top_k.divide(schedule.choice(first_row + m)) : m;
                return static_cast<const T*>(p.x) + row * p.cols;
            };
            if (brings && copies) slab.begin(row_of);
            // The warp's next group, of this batch or of the next one.
            const auto look_behind = [&](uint32_t group) {
                if (group < batch.groups) {
                    look(p, batch, group);
                    return true;
                }
                if (begin >= share.end) return false;
                const Batch next = batch_at(p, begin, share.end);
                if (warp >= next.groups) return false;
                look(p, next, warp);
                return true;
            };
#pragma unroll 1
            for (uint32_t group = warp; group < batch.groups; group += kWarps) {
                TernaryTask now = task;
                const bool more = look_behind(group + kWarps);
                if ((lane & (p.segments - 1)) == 0)
                    rows[group * p.group_rows + (lane >> p.segment_bits)] = {now.row(), now.levels};
                decode_group(p, now, strips + group * p.group_rows * pitch, pitch);
                if (more) task.fetch(p);
            }
            if (warp >= batch.groups) open(p, begin, share.end);
            const uint32_t team = kWarps / tiles, tile = warp / team, member = warp - tile * team;
            const uint32_t* const own_codes = strips + (tile * kTile + g) * pitch + t;
            float plus[kN][4] = {}, minus[kN][4] = {};
#pragma unroll 1
            for (uint32_t first = 0; first < p.blocks; first += p.slab) {
                if (first > 0) {
                    __syncthreads();  // all are done with the slab before
                    slab.first = first, slab.count = min(p.slab, p.blocks - first);
                    if (copies) slab.begin(row_of);
                }
                if (brings && copies) {
                    slab.finish();
                } else if (brings && (!kExperts || p.is_first)) {
                    slab.bring([&](uint32_t m, uint32_t col) { return to_float(row_of(m)[col]); });
                } else if (brings) {
                    slab.bring([&](uint32_t m, uint32_t col) {
                        return second_input(call, schedule.choice(first_row + m), col);
                    });
                }
                __syncthreads();
                if (tile >= tiles) continue;
                const uint32_t end = (member + 1) * slab.count / team;
                const uint8_t* own = x + lane % 8 * row_bytes + lane / 8 * 16;
#pragma unroll 2
                for (uint32_t b = member * slab.count / team; b < end; ++b) {
                    const uint32_t words[2] = {own_codes[4 * (first + b)], own_codes[8 * pitch + 4 * (first + b)]};
                    uint32_t columns[kN][8];
#pragma unroll
                    for (int n = 0; n < kN; ++n)
#pragma unroll
                        for (int h = 0; h < 2; ++h) {
                            const uint4 four =
                                load_matrices(own + b * Strips::kBlockBytes + n * 8 * row_bytes + h * 64);
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
            }
            brought = batch.product;
            if (tile < tiles) {
                float4 sums[kN];
                const uint32_t levels[2] = {rows[tile * kTile + g].y, rows[tile * kTile + g + 8].y};
                float high[2], low[2];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    high[r] = __uint_as_float(levels[r] << 16) * kBehind<T>;
                    low[r] = __uint_as_float(levels[r] & 0xffff0000u) * (kBehind<T> / 2);
                }
#pragma unroll
                for (int n = 0; n < kN; ++n) {
                    sums[n] = {fmaf(high[0], plus[n][0], low[0] * minus[n][0]),
                               fmaf(high[0], plus[n][1], low[0] * minus[n][1]),
                               fmaf(high[1], plus[n][2], low[1] * minus[n][2]),
                               fmaf(high[1], plus[n][3], low[1] * minus[n][3])};
                    cut[(warp * kN + n) * kLanes + lane] = sums[n];
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
                if (m >= tokens || row >= p.rows) continue;
                float sum = 0.0f;
                for (uint32_t other = of_tile * team; other < (of_tile + 1) * team; ++other)
                    sum += reinterpret_cast<const float*>(cut)[other * kN * kLanes * 4 + at];
                write_sum<T, kExperts>(call, p, schedule, batch.product, m, row, sum);
            }
        }
        if (kExperts && projection + 1 < call.count) {
            const Range next = share_of(call.projections[projection + 1]);
            open(call.projections[projection + 1], next.begin, next.end);
        }
    }
    if (!kExperts) return;
    cooperative_groups::this_grid().sync();
    combine_all<8>(call.choices, static_cast<const float*>(call.projections[1].y), static_cast<T*>(call.y),
                   call.projections[1].rows);
}

// Divides shared memory: strips for every warp, if activations can have room beside them, else fewer, and activations in slabs.
// Returns how much a block takes of it; 0 where there is no room.
template <int kN>
uint32_t divide_strips(StripTokens& call, bool experts, const Device& device) noexcept {
    const uint32_t fixed = StripRoom<kN>(call, experts).strips;
    if (fixed >= device.shared) return 0;
    const uint32_t room = device.shared - fixed;
    uint32_t most = 0;
    for (uint32_t i = 0; i < call.count; ++i) {
        StripProjection& p = call.projections[i];
        p.blocks = static_cast<uint32_t>(ceil_div(TernaryCodes::all_columns(p), Strips::kOfBlock));
        const uint32_t strip_bytes = p.strip_rows() * Strips::pitch(p.blocks) * 4;
        uint32_t wanted = Strips::kMostTiles * Strips::kTile / p.strip_rows();
        if (!experts)
            wanted = std::min(wanted, static_cast<uint32_t>(ceil_div(p.strips.by, uint64_t{device.multiprocessors})));
        p.slab = p.blocks;
        const uint32_t all = 8 * kN * Strips::row_bytes(p.slab);
        p.batch = std::min(wanted, all < room ? (room - all) / strip_bytes : 0);
        if (p.batch < std::min(wanted, 2u)) {
            p.batch = std::min(wanted, 2u);
            while (p.batch > 1 && 2 * p.batch * strip_bytes > room) --p.batch;
            if (p.batch * strip_bytes >= room) return 0;
            const uint32_t left = (room - p.batch * strip_bytes) / (8 * kN);
            const uint32_t fit = left > Strips::kRowGap ? (left - Strips::kRowGap) / Strips::kBlockBytes : 0;
            if (fit < Strips::kWarps) return 0;
            p.slab = static_cast<uint32_t>(ceil_div(p.blocks, ceil_div(p.blocks, uint64_t{fit})));
        }
        p.x_at = fixed + p.batch * strip_bytes;
        most = std::max(most, p.x_at + 8 * kN * Strips::row_bytes(p.slab));
    }
    return most;
}

// Launches it, if there is room for it: kN = 2 decodes weights once for up to 16 tokens.
Status launch_strips(StripTokens call, bool experts, OutputType type, const Device& device, cudaStream_t stream,
                     bool& launched) noexcept;

}  // namespace qmoe::cuda
