// `ternary` times many tokens, of one matrix or of a layer's experts: tensor cores, weights decoded once per tile.
//
// A tile is a window of 128 rows times kN tokens. Four warps decode, a lane a row: they go along its stream, quad by quad,
// and leave a byte for each nonzero in a ring of 1024 slots per row (slots of formats/ternary_streams.h, at which
// activations have been put beforehand, zeros at empty ones). Lanes need not keep step: one waits only where its next
// quad might end behind the ring. Eight warps multiply, 64 slots at a time: each of their threads takes bytes of two rows
// out of the ring, leaves zeros there, and has the operand of the tensor cores from them by one byte permutation per two
// weights, since a byte says which bytes of [0, high, low] a weight is made of. Activations lie in memory as the operand
// that they are, chunk by chunk, and come in stages.
//
// One launch, with barriers of all blocks of threads between its parts: activations are spread over slots; first
// projection; gates, spread again; second projection; sums over a token's choices. Tiles of a linear layer with few rows
// are cut along their rows as well, where segments begin, and summed up in a part of its own. Results depend on nothing but
// the shape and the tokens.
#pragma once

#include <cooperative_groups.h>

#include "barriers.cuh"
#include "experts/combine.cuh"
#include "experts/gates.cuh"
#include "experts/schedule.cuh"
#include "int/mma.cuh"
#include "launch.cuh"
#include "ternary/stack.cuh"
#include "warpgroup.cuh"

namespace qmoe::cuda {

struct TernaryTiles : TernaryView {
    const void* bias;
    uint8_t* x;   // as spread() leaves it
    float* sums;  // (choices, rows), or of a linear layer that is cut (splits, tokens, rows)
    uint32_t windows, chunks, splits;
};

struct TernaryManyTokens {
    TernaryTiles projections[2];
    uint32_t count;   // of them: 2 of experts
    uint32_t tokens;  // of x
    const void* x;
    void* y;
    // Of experts alone.
    Choices choices;
    uint8_t* schedule;
    const void* weights;
    OutputType weights_type;
    Gate gate;
};

struct TernaryTile {
    static constexpr uint32_t kRows = TernaryStreams::kWindow, kDecoders = kRows, kMultipliers = 256;
    static constexpr uint32_t kThreads = kDecoders + kMultipliers;
    static constexpr uint32_t kRing = 1024, kChunk = 64, kChunks = kRing / kChunk;
    static constexpr uint32_t kBarriersBytes = 1024, kRingBytes = kRows * kRing;
    // What bytes of the ring say: which two of the eight bytes [0 0 high high low low low low] a weight is.
    static constexpr uint32_t kZero = 0x10, kHigh = 0x32, kLow = 0x76;
};

// Chunks that are multiplied at once: a step takes hundreds of cycles, however short it is.
template <int kN>
inline constexpr uint32_t kTernaryChunksAtOnce = kN <= 32    ? 4
                                                 : kN <= 128 ? 2
                                                             : 1;
// Stages of activations: those of chunks that are multiplied, and of some that are on their way.
template <int kN>
inline constexpr uint32_t kTernaryStages = kN <= 32    ? 12
                                           : kN == 64  ? 8
                                           : kN == 128 ? 5
                                                       : 3;
template <int kN>
inline constexpr uint32_t kTernaryStageBytes = kN* TernaryTile::kChunk * 2;
template <int kN>
inline constexpr uint32_t kTernaryShared =
    TernaryTile::kBarriersBytes + TernaryTile::kRingBytes + kTernaryStages<kN>* kTernaryStageBytes<kN>;

// Where a chunk's slots lie in a row of the operand: so that a thread of the tensor cores has neighbours. Of positions
// 16 j + 8 h + 2 t + e, slot 16 t + 4 j + 2 h + e.
__device__ __forceinline__ uint32_t slot_at(uint32_t position) {
    const uint32_t j = position / 16, h = position / 8 % 2, t = position / 2 % 4, e = position % 2;
    return 16 * t + 4 * j + 2 * h + e;
}

// Tokens (of experts: choices) that are multiplied together, and where they are among all.
struct TernaryProduct {
    uint32_t expert, row, rows;
    uint64_t padded_row;  // where its rows begin in operands, each product's up to a multiple of eight

    __device__ __forceinline__ uint32_t padded_rows() const { return (rows + 7) / 8 * 8; }
    // Bytes that the rows of a chunk take.
    __device__ __forceinline__ uint32_t chunk_bytes() const { return padded_rows() * TernaryTile::kChunk * 2; }
};

// What is to be multiplied.
struct TernaryProducts {
    const Schedule* schedule;  // of experts
    uint32_t tokens, tile;

    // Rows of operands of so many products of so many rows.
    static uint64_t padded_rows(uint64_t rows, uint64_t products) noexcept { return rows + 7 * products; }
    __device__ __forceinline__ uint32_t count() const {
        return schedule != nullptr ? schedule->products() : (tokens + tile - 1) / tile;
    }
    __device__ __forceinline__ uint32_t rows() const {
        return schedule != nullptr ? schedule->first_row(schedule->products()) : tokens;
    }
    __device__ __forceinline__ TernaryProduct at(uint32_t i) const {
        TernaryProduct out{};
        if (schedule != nullptr) {
            out.expert = schedule->expert(i), out.row = schedule->first_row(i);
            out.rows = schedule->first_row(i + 1) - out.row;
        } else {
            out.row = i * tile, out.rows = min(tile, tokens - out.row);
        }
        out.padded_row = out.row + 7 * i;
        return out;
    }
    // The one that a row is of.
    __device__ __forceinline__ uint32_t of_row(uint32_t row) const {
        if (schedule == nullptr) return row / tile;
        uint32_t first = 0, last = schedule->products();  // it is one of first .. last - 1
        while (last - first > 1) {
            const uint32_t middle = (first + last) / 2;
            (schedule->first_row(middle) <= row ? first : last) = middle;
        }
        return first;
    }
};

// Makes operands: values(row, col) of all products' rows. By product and chunk (rows, 64) 16-bit numbers at the places of
// their slots, swizzled as the tensor cores want them. All threads of all blocks share the work.
template <typename T, typename Values>
__device__ __forceinline__ void spread(const TernaryTiles& p, const TernaryProducts& products, const Values& values) {
    constexpr uint32_t kPairs = TernaryTile::kChunk / 2;
    const uint32_t pairs = p.chunks * kPairs, step = 1u << p.gap_bits;
    for (uint32_t row = blockIdx.x; row < products.rows(); row += gridDim.x) {
        const TernaryProduct product = products.at(products.of_row(row));
        const uint32_t own = row - product.row;
        uint8_t* const to =
            p.x + product.padded_row * p.chunks * TernaryTile::kChunk * 2 + own * TernaryTile::kChunk * 2;
#pragma unroll 4
        for (uint32_t i = threadIdx.x; i < pairs; i += blockDim.x) {
            T pair[2];
            const uint32_t chunk = i / kPairs, place = i % kPairs;
#pragma unroll
            for (uint32_t e = 0; e < 2; ++e) {
                const uint32_t slot = chunk * TernaryTile::kChunk + slot_at(2 * place + e);
                const bool empty = slot >= p.slots || (slot & (step - 1)) == step - 1;
                pair[e] = from_float<T>(empty ? 0.0f : values(row, slot - (slot >> p.gap_bits)));
            }
            *reinterpret_cast<uint32_t*>(to + chunk * product.chunk_bytes() + (place / 4 ^ own % 8) * 16 +
                                         place % 4 * 4) = *reinterpret_cast<const uint32_t*>(pair);
        }
    }
    publish_to_copies();
}

// A part of the work: a window of rows, of the segments first .. last - 1, times some tokens.
struct TernaryUnit {
    const uint8_t* matrix;
    TernaryProduct product;
    uint32_t window, split, first_segment, last_segment;
    uint32_t begin, end;  // slots that there may be nonzeros at; begin is a multiple of a chunk

    __device__ __forceinline__ uint32_t chunks() const {
        return (end - begin + TernaryTile::kChunk - 1) / TernaryTile::kChunk;
    }
};

// Units of a projection, and what they are.
struct TernaryUnits {
    const TernaryTiles& p;
    const TernaryProducts products;
    const uint32_t count;

    __device__ __forceinline__ TernaryUnits(const TernaryTiles& p, const TernaryProducts& products)
        : p(p), products(products), count(products.count() * p.splits * p.windows) {}

    // Whole warps call.
    __device__ __forceinline__ TernaryUnit at(uint32_t i) const {
        TernaryUnit unit{};
        const uint32_t product = i / (p.windows * p.splits), part = i - product * (p.windows * p.splits);
        unit.split = part / p.windows, unit.window = part - unit.split * p.windows;
        unit.first_segment = unit.split * p.segments / p.splits;
        unit.last_segment = (unit.split + 1) * p.segments / p.splits;
        unit.product = products.at(product);
        unit.matrix = p.matrix(unit.product.expert);
        unit.begin = 0, unit.end = p.all_slots;
        if (p.splits > 1) find_ends(unit);
        return unit;
    }

  private:
    __device__ __forceinline__ void find_ends(TernaryUnit& unit) const {
        uint32_t begin = ~0u, end = 0;
        for (uint32_t r = threadIdx.x % kLanes; r < TernaryTile::kRows; r += kLanes) {
            const uint32_t at = unit.window * TernaryTile::kRows + r;
            if (at >= p.rows) continue;
            const uint32_t quads = reinterpret_cast<const uint32_t*>(unit.matrix)[at] >> TernaryStreams::kRowBits;
            const uint32_t first = unit.first_segment * quads >> p.segment_bits,
                           last = unit.last_segment * quads >> p.segment_bits;
            if (first == last) continue;
            const uint16_t* const starts =
                reinterpret_cast<const uint16_t*>(unit.matrix + p.starts_at) + at * p.segments;
            begin = min(begin, uint32_t{starts[unit.first_segment]});
            const uint32_t until = last == quads ? p.all_slots : starts[unit.last_segment];
            end = end > until ? end : until;
        }
        begin = __reduce_min_sync(~0u, begin), end = __reduce_max_sync(~0u, end);
        unit.begin = end == 0 ? 0 : begin / TernaryTile::kChunk * TernaryTile::kChunk, unit.end = end;
    }
};

// The ring's bytes, and what they wait for. Chunks are counted through all units of a block. Rows are in two halves, each
// of which two warps fill and four empty, with barriers of their own.
struct TernaryRing {
    uint8_t* bytes;
    Barrier *full, *empty;  // of one half, by place in the ring

    __device__ __forceinline__ TernaryRing(uint8_t* shared, uint32_t half)
        : bytes(shared + TernaryTile::kBarriersBytes),
          full(reinterpret_cast<Barrier*>(shared) + 2 * half * TernaryTile::kChunks),
          empty(full + TernaryTile::kChunks) {}
    // One of the threads.
    __device__ __forceinline__ void init() const {
        for (uint32_t i = 0; i < TernaryTile::kChunks; ++i) full[i].init(2), empty[i].init(4);
    }
    static __device__ __forceinline__ uint32_t place(uint32_t chunk) { return chunk % TernaryTile::kChunks; }
    static __device__ __forceinline__ uint32_t parity(uint32_t chunk) { return chunk / TernaryTile::kChunks % 2; }
    // Every other row is a chunk ahead, so that those which are read together lie in different banks.
    static __device__ __forceinline__ uint32_t shift(uint32_t row) { return row % 2 * TernaryTile::kChunk; }
};

// Goes through a quad's symbols from position `at` of a row on, and leaves there what they say; with kGuarded, only at the
// `span` positions from `from` on. Returns the position behind the last one.
template <int kGap, bool kGuarded>
__device__ __forceinline__ uint32_t put(const uint4& quad, uint8_t* row, uint32_t at, uint32_t from, uint32_t span) {
    using Symbols = TernarySymbols<kGap>;
    const Symbols symbols(quad);
#pragma unroll
    for (int i = 0; i < Symbols::kCount; ++i) {
        const uint32_t symbol = symbols[i];
        at += Symbols::gap(symbol) + (i > 0 ? 1 : 0);
        const auto byte = static_cast<uint8_t>(TernaryTile::kHigh +
                                               Symbols::minus(symbol) * (TernaryTile::kLow - TernaryTile::kHigh));
        if (!kGuarded || at - from < span) row[at & (TernaryTile::kRing - 1)] = byte;
    }
    return at + 1;
}

// Decodes a unit: `chunk` is its first one, and then the next unit's.
template <int kGap>
__device__ __forceinline__ void decode(const TernaryTiles& p, const TernaryUnit& unit, const TernaryRing& ring,
                                       uint32_t& chunk, uint32_t& emptied) {
    constexpr uint32_t kFarthest = TernarySymbols<kGap>::kCount << kGap;  // that a quad goes
    constexpr bool kGuarded = kFarthest > TernaryTile::kRing / 4 * 3;
    constexpr uint32_t kNeeded = kGuarded ? TernaryTile::kChunk : kFarthest;
    const uint32_t own = threadIdx.x, at = unit.window * TernaryTile::kRows + own, shift = TernaryRing::shift(own);
    const uint32_t chunks = unit.chunks();
    const uint32_t last = (chunk + chunks) * TernaryTile::kChunk;  // positions, as chunks, are counted through
    uint8_t* const row = ring.bytes + own * TernaryTile::kRing;
    uint32_t k = 0, k_end = 0, next = last;
    const uint4* from = nullptr;
    if (at < p.rows) {
        const uint32_t quads = reinterpret_cast<const uint32_t*>(unit.matrix)[at] >> TernaryStreams::kRowBits;
        k = unit.first_segment * quads >> p.segment_bits, k_end = unit.last_segment * quads >> p.segment_bits;
        const uint32_t group = at / p.group_rows;
        const uint32_t start =
            reinterpret_cast<const uint16_t*>(unit.matrix + p.starts_at)[at * p.segments + unit.first_segment];
        from = reinterpret_cast<const uint4*>(unit.matrix + p.quads_at) +
               reinterpret_cast<const uint32_t*>(unit.matrix + p.bases_at)[group] + at % p.group_rows;
        if (k < k_end) next = start - unit.begin + chunk * TernaryTile::kChunk;
    }
    // Quads come from the second-level cache while others are walked, and there long before: no more than four warps wait
    // for memory here.
    constexpr uint32_t kAhead = 8;
    const auto quad = [&](uint32_t i) { return i < k_end ? from[i * p.group_rows] : uint4{}; };
    const auto soon = [&](uint32_t i) {
        if (i < k_end) bring_near(from + i * p.group_rows);
    };
    uint4 now = quad(k), ahead = quad(k + 1), further = quad(k + 2);
    for (uint32_t i = 3; i < kAhead; ++i) soon(k + i);
    uint32_t done = next;  // what lies before this position is there
    uint32_t filled = chunk;
    while (true) {
        // All lanes must know the same.
        while (emptied < filled &&
               __all_sync(~0u, ring.empty[TernaryRing::place(emptied)].is_over(TernaryRing::parity(emptied))))
            ++emptied;
        const uint32_t room = (emptied + TernaryTile::kChunks) * TernaryTile::kChunk;
        // Rows that are through do not hurry on: a barrier is of one chunk at a time.
        const uint32_t least = min(__reduce_min_sync(~0u, done), room);
        __syncwarp();
        for (; (filled + 1) * TernaryTile::kChunk <= least; ++filled)
            if (threadIdx.x % kLanes == 0) ring.full[TernaryRing::place(filled)].arrive();
        const bool ready = k < k_end && done + kNeeded <= room;
        if (!__any_sync(~0u, ready)) {
            if (!__any_sync(~0u, k < k_end)) break;
            ring.empty[TernaryRing::place(emptied)].wait(TernaryRing::parity(emptied));
            ++emptied;
            continue;
        }
        if (ready) {
            const uint32_t behind = put<kGap, kGuarded>(now, row, next + shift, done + shift, room - done) - shift;
            if (!kGuarded || behind <= room) {
                next = done = ++k < k_end ? behind : last;
                now = ahead, ahead = further, further = quad(k + 2);
                soon(k + kAhead - 1);
            } else {
                done = room;  // the rest of the quad's symbols come when there is room for them
            }
        }
    }
    for (; filled < chunk + chunks; ++filled) {
        while (filled - emptied >= TernaryTile::kChunks) {
            ring.empty[TernaryRing::place(emptied)].wait(TernaryRing::parity(emptied));
            ++emptied;
        }
        if (threadIdx.x % kLanes == 0) ring.full[TernaryRing::place(filled)].arrive();
    }
    chunk += chunks;
}

__device__ __forceinline__ void decode_unit(const TernaryTiles& p, const TernaryUnit& unit, const TernaryRing& ring,
                                            uint32_t& chunk, uint32_t& emptied) {
    switch (p.gap_bits) {
        case 3: return decode<3>(p, unit, ring, chunk, emptied);
        case 4: return decode<4>(p, unit, ring, chunk, emptied);
        case 5: return decode<5>(p, unit, ring, chunk, emptied);
        case 6: return decode<6>(p, unit, ring, chunk, emptied);
        default: return decode<7>(p, unit, ring, chunk, emptied);
    }
}

// The two levels of a row, as the eight bytes that bytes of the ring choose from, and what sums are to be multiplied by.
struct TernaryLevels {
    uint32_t zero_high = 0, low_low = 0;
    float scale = 1.0f;

    TernaryLevels() = default;
    template <typename T>
    static __device__ __forceinline__ TernaryLevels of(uint32_t levels) {
        TernaryLevels out;
        if constexpr (std::is_same_v<T, __nv_bfloat16>) {
            out.zero_high = levels << 16;
            out.low_low = __byte_perm(levels, 0, 0x3232);
        } else {
            // float16 has more digits than bfloat16 and fewer exponents: the larger one becomes 1 to 2.
            const uint32_t high = levels & 0x7f80, low = levels >> 16 & 0x7f80, exponent = high > low ? high : low;
            const uint32_t most = exponent > 0x7f00 - 0x80 ? 0x7f00 - 0x80 : exponent < 0x80 ? 0x80 : exponent;
            out.scale = __uint_as_float(most << 16);  // 2^(e - 127)
            const float inverse = __uint_as_float((0x7f00 - most) << 16);
            const __half two[2] = {__float2half_rn(__uint_as_float(levels << 16) * inverse),
                                   __float2half_rn(__uint_as_float(levels & 0xffff0000u) * inverse)};
            const uint32_t pair = *reinterpret_cast<const uint32_t*>(two);
            out.zero_high = pair << 16;
            out.low_low = __byte_perm(pair, 0, 0x3232);
        }
        return out;
    }
    __device__ __forceinline__ uint32_t pair(uint32_t bytes) const { return permuted(zero_high, low_low, bytes); }
};

template <typename T, int kN>
class TernaryMultiplier {
  public:
    __device__ __forceinline__ TernaryMultiplier(const TernaryManyTokens& call, uint8_t* shared)
        : call_(call),
          stages_(shared + TernaryTile::kBarriersBytes + TernaryTile::kRingBytes),
          stage_full_(reinterpret_cast<Barrier*>(shared) + 4 * TernaryTile::kChunks),
          stage_empty_(stage_full_ + kStages),
          thread_(threadIdx.x - TernaryTile::kDecoders),
          lane_(threadIdx.x % kLanes),
          ring_(shared, thread_ / 128) {}

    // Zeros all over the ring; and the barriers of stages.
    __device__ __forceinline__ void init() const {
        if (thread_ == 0)
            for (uint32_t i = 0; i < kStages; ++i)
                stage_full_[i].init(CopyTo::kArrivals), stage_empty_[i].init(TernaryTile::kMultipliers / kLanes);
        for (uint32_t i = thread_; i < TernaryTile::kRingBytes / 16; i += TernaryTile::kMultipliers)
            reinterpret_cast<uint4*>(ring_.bytes)[i] = zeros();
    }

    __device__ __forceinline__ void run(const TernaryTiles& p, const TernaryUnit& unit, const Schedule* schedule,
                                        bool is_first) {
        const uint32_t row = thread_ / kLanes * 16 + lane_ / 4;
        const TernaryLevels levels[2] = {levels_of(p, unit, row), levels_of(p, unit, row + 8)};
        const uint32_t first = chunk_, last = chunk_ + unit.chunks(), nbytes = unit.product.chunk_bytes();
        const uint8_t* const x = p.x + unit.product.padded_row * p.chunks * TernaryTile::kChunk * 2 +
                                 uint64_t{unit.begin / TernaryTile::kChunk} * nbytes;
        const auto bring = [&](uint32_t chunk) {
            if (chunk >= last) return;
            const uint32_t place = chunk % kStages;
            if (CopyTo::takes_part(thread_)) {
                stage_empty_[place].wait(chunk / kStages % 2 ^ 1);
                CopyTo::begin(stage_full_[place], stage(place), x + uint64_t{chunk - first} * nbytes, nbytes, thread_);
            }
            __syncwarp();
        };
        float sums[kN / 8][4] = {};
        for (uint32_t i = 0; i < kStages - kPerStep; ++i) bring(chunk_ + i);
        uint32_t before = 0;  // chunks of the step before
#pragma unroll 1
        for (; chunk_ + kPerStep <= last; chunk_ += kPerStep) {
            step<kPerStep>(row, levels, sums, before, bring);
            before = kPerStep;
        }
        if constexpr (kPerStep > 1) {
#pragma unroll 1
            for (; chunk_ < last; ++chunk_) {
                step<1>(row, levels, sums, before, bring);
                before = 1;
            }
        }
        end_products(before);
        leave(p, unit, schedule, is_first, levels, sums);
    }

  private:
    static constexpr uint32_t kStages = kTernaryStages<kN>, kPerStep = kTernaryChunksAtOnce<kN>;
    using CopyTo = SharedCopy<TernaryTile::kMultipliers>;

    static __device__ __forceinline__ uint4 zeros() {
        constexpr uint32_t kWord = TernaryTile::kZero * 0x01010101u;
        return {kWord, kWord, kWord, kWord};
    }
    __device__ __forceinline__ uint8_t* stage(uint32_t place) const {
        return stages_ + place * kTernaryStageBytes<kN>;
    }
    static __device__ __forceinline__ TernaryLevels levels_of(const TernaryTiles& p, const TernaryUnit& unit,
                                                              uint32_t row) {
        const uint32_t at = unit.window * TernaryTile::kRows + row;
        return TernaryLevels::of<T>(at < p.rows ? reinterpret_cast<const uint32_t*>(unit.matrix + p.levels_at)[at] : 0);
    }

    // The products of the `before` chunks before are done, and their activations not needed any more.
    __device__ __forceinline__ void end_products(uint32_t before) const {
        wait_for_products<0>();
        __syncwarp();
        if (lane_ < before) stage_empty_[(chunk_ - 1 - lane_) % kStages].arrive();
    }

    // Begins the products of some chunks.
    template <uint32_t kChunks, typename Bring>
    __device__ __forceinline__ void step(uint32_t row, const TernaryLevels (&levels)[2], float (&sums)[kN / 8][4],
                                         uint32_t before, const Bring& bring) const {
        uint4 bytes[kChunks][2];
#pragma unroll
        for (uint32_t c = 0; c < kChunks; ++c) {
            const uint32_t place = TernaryRing::place(chunk_ + c);
            ring_.full[place].wait(TernaryRing::parity(chunk_ + c));
#pragma unroll
            for (uint32_t i = 0; i < 2; ++i) {
                const uint32_t r = row + 8 * i;  // as odd as row
                const uint32_t at = (place * TernaryTile::kChunk + TernaryRing::shift(r)) % TernaryTile::kRing;
                uint4* const there =
                    reinterpret_cast<uint4*>(ring_.bytes + r * TernaryTile::kRing + at + lane_ % 4 * 16);
                bytes[c][i] = *there;
                *there = zeros();
            }
        }
        __syncwarp();
        if (lane_ < kChunks) ring_.empty[TernaryRing::place(chunk_ + lane_)].arrive();
        end_products(before);
        uint32_t operand[kChunks][4][4];
#pragma unroll
        for (uint32_t c = 0; c < kChunks; ++c)
#pragma unroll
            for (uint32_t i = 0; i < 2; ++i) {
                const uint32_t words[4] = {bytes[c][i].x, bytes[c][i].y, bytes[c][i].z, bytes[c][i].w};
#pragma unroll
                for (uint32_t j = 0; j < 4; ++j) {
                    operand[c][j][i] = levels[i].pair(words[j]);
                    operand[c][j][i + 2] = levels[i].pair(words[j] >> 16);
                }
            }
#pragma unroll
        for (uint32_t c = 0; c < kChunks; ++c) {
            const uint32_t there = chunk_ + c;
            stage_full_[there % kStages].wait(there / kStages % 2);
        }
        if constexpr (kHasWarpgroups) {
            begin_products();
#pragma unroll
            for (uint32_t c = 0; c < kChunks; ++c) {
                const uint64_t x = swizzled_operand(stage((chunk_ + c) % kStages));
#pragma unroll
                for (uint32_t j = 0; j < 4; ++j) multiply<T, kN>(sums, operand[c][j], x + 2 * j);
            }
            commit_products();
        } else {
#pragma unroll
            for (uint32_t c = 0; c < kChunks; ++c)
#pragma unroll
                for (uint32_t n = 0; n < kN / 8; ++n)
#pragma unroll
                    for (uint32_t j = 0; j < 4; ++j) {
                        const auto at = [&](uint32_t half) {
                            return *reinterpret_cast<const uint32_t*>(
                                stage((chunk_ + c) % kStages) + (8 * n + lane_ / 4) * 128 +
                                ((2 * j + half) ^ lane_ / 4) * 16 + lane_ % 4 * 4);
                        };
                        mma<T>(sums[n], operand[c][j], at(0), at(1));
                    }
        }
        for (uint32_t c = 0; c < kChunks; ++c) bring(chunk_ + c + kStages - kPerStep);
    }

    // Brings sums to where they belong, sixteen tokens at a time, by way of shared memory.
    __device__ __forceinline__ void leave(const TernaryTiles& p, const TernaryUnit& unit, const Schedule* schedule,
                                          bool is_first, const TernaryLevels (&levels)[2], float (&sums)[kN / 8][4]) {
        constexpr uint32_t kAtOnce = 16, kPitch = TernaryTile::kRows + 4;
        static_assert(kAtOnce * kPitch * 4 <= kStages * kTernaryStageBytes<kN>);
        float* const room = reinterpret_cast<float*>(stages_);
        const uint32_t first_row = unit.window * TernaryTile::kRows;
        uint32_t to[2];
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
            const uint32_t own = first_row + thread_ / kLanes * 16 + lane_ / 4 + 8 * i;
            const uint32_t info = own < p.rows ? reinterpret_cast<const uint32_t*>(unit.matrix)[own] : ~0u;
            to[i] = own < p.rows ? (info & ((1u << TernaryStreams::kRowBits) - 1)) - first_row : ~0u;
        }
#pragma unroll
        for (uint32_t first = 0; first < kN; first += kAtOnce) {
            if (first >= unit.product.rows) break;
            sync_threads<1, TernaryTile::kMultipliers>();
#pragma unroll
            for (uint32_t n = 0; n < kAtOnce / 8; ++n)
#pragma unroll
                for (uint32_t i = 0; i < 4; ++i)
                    if (to[i / 2] < TernaryTile::kRows)
                        room[(8 * n + 2 * (lane_ % 4) + i % 2) * kPitch + to[i / 2]] =
                            sums[first / 8 + n][i] * levels[i / 2].scale;
            sync_threads<1, TernaryTile::kMultipliers>();
#pragma unroll
            for (uint32_t i = thread_; i < kAtOnce * TernaryTile::kRows / 4; i += TernaryTile::kMultipliers) {
                const uint32_t token = i / (TernaryTile::kRows / 4), row = i % (TernaryTile::kRows / 4) * 4;
                if (first + token >= unit.product.rows || first_row + row >= p.rows) continue;
                const float4 four = *reinterpret_cast<const float4*>(room + token * kPitch + row);
                store(p, unit, schedule, is_first, unit.product.row + first + token, first_row + row, four);
            }
        }
        publish_to_copies();  // before activations come there again
        sync_threads<1, TernaryTile::kMultipliers>();
    }

    __device__ __forceinline__ void store(const TernaryTiles& p, const TernaryUnit& unit, const Schedule* schedule,
                                          bool is_first, uint32_t own, uint32_t row, const float4& four) const {
        float values[4] = {four.x, four.y, four.z, four.w};
        const uint32_t count = min(p.rows - row, 4u);
        const T* const bias = p.splits > 1 || p.bias == nullptr
                                  ? nullptr
                                  : static_cast<const T*>(p.bias) + uint64_t{unit.product.expert} * p.rows + row;
        uint32_t to = own;  // a first projection's sums stay in the schedule's order
        float weight = 1.0f;
        if (schedule != nullptr && !is_first) {
            to = schedule->choice(own);
            weight = load_weight(call_.weights, to, call_.weights_type);
        }
        for (uint32_t i = 0; i < count; ++i)
            values[i] = (values[i] + (bias != nullptr ? to_float(bias[i]) : 0.0f)) * weight;
        if (schedule == nullptr && p.splits == 1) {
            T* const y = static_cast<T*>(call_.y) + uint64_t{to} * p.rows + row;
            T rounded[4];
            for (uint32_t i = 0; i < 4; ++i) rounded[i] = from_float<T>(values[i]);
            if (p.rows % 4 == 0 && reinterpret_cast<uintptr_t>(call_.y) % 8 == 0)
                *reinterpret_cast<uint2*>(y) = *reinterpret_cast<const uint2*>(rounded);
            else
                for (uint32_t i = 0; i < count; ++i) y[i] = rounded[i];
            return;
        }
        float* const y = p.sums + (uint64_t{unit.split} * call_.tokens + to) * p.rows + row;
        if (p.rows % 4 == 0)
            *reinterpret_cast<float4*>(y) = {values[0], values[1], values[2], values[3]};
        else
            for (uint32_t i = 0; i < count; ++i) y[i] = values[i];
    }

    const TernaryManyTokens& call_;
    uint8_t* const stages_;
    Barrier *const stage_full_, *const stage_empty_;  // by stage
    const uint32_t thread_, lane_;
    const TernaryRing ring_;
    uint32_t chunk_ = 0;  // counted through all units, as the ring's
};

// What is left to do behind a projection, by all threads.
template <typename T>
__device__ __forceinline__ void finish_projection(const TernaryManyTokens& call, uint32_t projection,
                                                  const TernaryProducts& products) {
    const TernaryTiles& p = call.projections[projection];
    if (call.count == 1) {
        if (p.splits == 1) return;
        cooperative_groups::this_grid().sync();
        const T* const bias = static_cast<const T*>(p.bias);
        const uint32_t all = call.tokens * p.rows;
        for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < all; i += gridDim.x * blockDim.x) {
            float sum = bias != nullptr ? to_float(bias[i % p.rows]) : 0.0f;
            for (uint32_t split = 0; split < p.splits; ++split) sum += p.sums[uint64_t{split} * all + i];
            static_cast<T*>(call.y)[i] = from_float<T>(sum);
        }
        return;
    }
    cooperative_groups::this_grid().sync();
    if (projection == 0) {
        const bool plain = p.order == RowOrder::kPlain, halves = p.order == RowOrder::kHalves;
        spread<T>(call.projections[1], products, [&](uint32_t own, uint32_t col) {
            const float* const row = p.sums + uint64_t{own} * p.rows;
            if (plain) return activated(row[col], call.gate.activation);
            return gated(row[halves ? col : 2 * col], row[halves ? p.rows / 2 + col : 2 * col + 1], call.gate);
        });
        cooperative_groups::this_grid().sync();
    } else {
        const uint32_t pieces = (p.rows + 3) / 4;
        for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < call.tokens * pieces; i += gridDim.x * blockDim.x)
            combine(call.choices, p.sums, static_cast<T*>(call.y), i / pieces, i % pieces * 4, p.rows);
    }
}

template <typename T, int kN>
__global__ __launch_bounds__(TernaryTile::kThreads,
                             1) void ternary_many_tokens(const __grid_constant__ TernaryManyTokens call) {
    constexpr bool kMoves = kN == 256;  // registers, from those that decode
    QMOE_SHARED_MEMORY(swizzled, 1024);
    wait_for_previous();
    let_next_begin();
    const bool experts = call.count == 2;
    const uint32_t choices = call.tokens * call.choices.top_k.by;
    const auto spread_x = [&](const Schedule* schedule) {
        spread<T>(call.projections[0], {schedule, call.tokens, kN}, [&](uint32_t own, uint32_t col) {
            const uint32_t token = schedule != nullptr ? call.choices.top_k.divide(schedule->choice(own)) : own;
            return to_float(static_cast<const T*>(call.x)[uint64_t{token} * call.projections[0].cols + col]);
        });
    };
    if (experts) {  // every block makes the schedule, and one leaves it for later
        Schedule made(swizzled, choices, call.choices.experts);
        made.make(call.choices, kN);
        const uint32_t words = blockIdx.x == 0 ? (Schedule::bytes(choices, call.choices.experts) + 3) / 4 : 0;
        for (uint32_t i = threadIdx.x; i < words; i += blockDim.x)
            reinterpret_cast<uint32_t*>(call.schedule)[i] = reinterpret_cast<const uint32_t*>(swizzled)[i];
        spread_x(&made);
        __syncthreads();
    } else {
        spread_x(nullptr);
    }
    if (threadIdx.x == 0) TernaryRing(swizzled, 0).init(), TernaryRing(swizzled, 1).init();
    if (threadIdx.x >= TernaryTile::kDecoders) TernaryMultiplier<T, kN>(call, swizzled).init();
    __syncthreads();
    cooperative_groups::this_grid().sync();
    const Schedule of_experts(call.schedule, choices, call.choices.experts);
    const TernaryProducts products{experts ? &of_experts : nullptr, call.tokens, kN};
    if (threadIdx.x < TernaryTile::kDecoders) {
        if constexpr (kMoves) give_registers<64>();
        const TernaryRing ring(swizzled, threadIdx.x / 64);
        uint32_t chunk = 0, emptied = 0;
        for (uint32_t i = 0; i < call.count; ++i) {
            const TernaryUnits units(call.projections[i], products);
            for (uint32_t u = blockIdx.x; u < units.count; u += gridDim.x)
                decode_unit(units.p, units.at(u), ring, chunk, emptied);
            finish_projection<T>(call, i, products);
        }
    } else {
        if constexpr (kMoves) take_registers<216>();
        TernaryMultiplier<T, kN> multiplier(call, swizzled);
        for (uint32_t i = 0; i < call.count; ++i) {
            const TernaryUnits units(call.projections[i], products);
            for (uint32_t u = blockIdx.x; u < units.count; u += gridDim.x)
                multiplier.run(units.p, units.at(u), products.schedule, i == 0);
            finish_projection<T>(call, i, products);
        }
    }
}

template <typename T, int kN>
Status launch_ternary_tiles(const TernaryManyTokens& call, const Device& device, cudaStream_t stream) noexcept {
    const auto kernel = ternary_many_tokens<T, kN>;
    const uint32_t schedule =
        call.count == 2 ? Schedule::bytes(call.tokens * call.choices.top_k.by, call.choices.experts) : 0;
    const uint32_t shared = schedule > kTernaryShared<kN> ? (schedule + 15) / 16 * 16 : kTernaryShared<kN>;
    QMOE_TRY(runtime_status(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared))));
    return launch(kernel, device.multiprocessors, TernaryTile::kThreads, shared, true, device, stream, call);
}

// What many_tokens_<n>.cu compile.
#define QMOE_TERNARY_MANY_TOKENS(what, n)                                                                \
    what template Status launch_ternary_tiles<__half, n>(const TernaryManyTokens&, const Device&,        \
                                                         cudaStream_t) noexcept;                         \
    what template Status launch_ternary_tiles<__nv_bfloat16, n>(const TernaryManyTokens&, const Device&, \
                                                                cudaStream_t) noexcept;

}  // namespace qmoe::cuda
