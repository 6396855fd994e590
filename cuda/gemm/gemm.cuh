// Matrices in tiles times many tokens, of one matrix or of a layer's experts: tensor cores, each weight made an operand
// once for up to 128 tokens.
//
// A *unit* of work is a panel of 256 rows times the tokens of a product, at most 128. Eight warps multiply, of two groups
// of four with 128 rows each: from Hopper on, weights are the operand in registers, made from codes while the products
// before run, and activations the one in shared memory. Four more warps bring both: one of them codes, block by block of
// 128 columns, as they are in memory, three activations, in stages of 64 columns.
//
// Blocks of threads share all blocks of columns of all units evenly, wherever a unit begins, unless whole units leave as
// few idle. Of a unit that is cut, the block of threads that has its beginning adds up what the others leave in memory, in
// their order; those come earlier in the grid, so that what is waited for runs or has run. Results depend on nothing but the
// shape, the tokens and the number of multiprocessors.
//
// A layer of experts is two launches: a schedule, and both projections and the sums over a token's choices, with barriers
// of all blocks of threads between these.
//
// `Codes` is what a format is to all this: see int/weights.cuh.
#pragma once

#include <cooperative_groups.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <utility>

#include "barriers.cuh"
#include "experts/combine.cuh"
#include "experts/gates.cuh"
#include "gemm/matrix.cuh"
#include "gemm/schedule.cuh"
#include "int/mma.cuh"
#include "launch.cuh"
#include "tensor_map.cuh"
#include "warpgroup.cuh"

namespace qmoe::cuda {

struct GemmProjection : TiledMatrix {
    const void *x, *bias;
    void* y;
    uint32_t panels;
    bool is_first;  // of experts: x has a row per token, and a gate follows; else one per row of the schedule's order
    bool has_boxes;  // x is brought in boxes of x_boxes
    TensorMap x_boxes;
};

struct Gemm {
    GemmProjection projections[2];
    uint32_t begin, end;          // of them
    bool experts, codes_are_new;  // codes_are_new: made by the kernel before this one
    bool has_boxes;               // activations can be brought in boxes
    uint32_t tokens;              // of x
    uint32_t most;                // tokens that a product can have
    uint32_t codes_bytes, codes_stages, x_stages;
    float* partials;  // by team
    uint64_t* flags;  // by team and warpgroup: `nonce` where partial sums are there
    uint64_t nonce;
    void* y;
    // Of experts alone.
    Choices choices;
    GemmSchedule schedule;
    uint32_t most_products;
    uint32_t first_expert,
        last_expert;  // products of first_expert .. last_expert - 1 are made, the former's tiles are first
    const void* weights;
    OutputType weights_type;
    Gate gate;
};

struct GemmTile {
    static constexpr uint32_t kTiles = 16, kRows = kTiles * kTileRows;  // of a panel
    static constexpr uint32_t kMostTokens = kHasWarpgroups ? 128 : 64;
    static constexpr uint32_t kGroups = 2, kGroupThreads = 128, kGroupRows = kRows / kGroups;
    static constexpr uint32_t kCopiers = 128, kThreads = kCopiers + kGroups * kGroupThreads, kXWarps = 3;
    static constexpr uint32_t kStageColumns = 64;
    static constexpr uint32_t kMostStages = 8;          // of codes and of activations
    static constexpr uint32_t kAtOnce = 16;             // tokens that leave at once
    static constexpr uint32_t kPitch = kGroupRows + 4;  // of a token's sums on their way
    static constexpr uint32_t kFewestXStages = 3;
    static constexpr uint32_t kMostParts = 8;  // that the units of few panels are cut into
    static constexpr uint32_t kBarriersBytes = 4 * kMostStages * 8;
    static constexpr uint32_t kLeavingBytes = kGroups * kAtOnce * kPitch * 4;
    static constexpr uint32_t kChoicesBytes = kGroups * 128 * 8;  // choice and weight by token
};

// What is where in shared memory.
struct GemmRoom {
    uint32_t x, codes, barriers, leaving, choices, products, bytes;

    QMOE_INLINE explicit GemmRoom(const Gemm& call) noexcept {
        x = 0;  // at a multiple of 1024, as all of its stages
        codes = x + call.x_stages * call.most * GemmTile::kStageColumns * 2;
        barriers = codes + call.codes_stages * call.codes_bytes;
        leaving = barriers + GemmTile::kBarriersBytes;
        choices = leaving + GemmTile::kLeavingBytes;
        products = choices + (call.experts ? GemmTile::kChoicesBytes : 0);
        bytes = products + (call.experts ? (call.most_products + 3) * 4 : 0);
    }
};

// A block of threads' part of a unit: of its blocks of columns begin .. end - 1.
struct GemmPiece {
    uint32_t product, panel, begin, end;
};

// What a block of threads has of a projection's work.
struct GemmWork {
    uint32_t products, panels, blocks, units;
    bool by_panel;   // products of a panel are neighbours, not panels of a product
    bool whole;      // units are not cut
    uint32_t teams;  // blocks of threads that have work, the last ones

    __device__ __forceinline__ GemmWork(const GemmProjection& p, uint32_t products, bool by_panel, uint32_t most)
        : products(products), panels(p.panels), blocks(p.blocks.by), units(products * p.panels), by_panel(by_panel) {
        // Cycles, about: of a block, to put a unit's parts together, and of each part more.
        const uint32_t of_block = 512 + 12 * most, to_cut = 2000, of_part = 100 + 8 * most;
        whole = true, teams = min(units, gridDim.x);
        if (units == 0) return;
        uint32_t least = (units + gridDim.x - 1) / gridDim.x * blocks * of_block;
        for (uint32_t parts = 2; parts <= GemmTile::kMostParts; ++parts) {
            const uint32_t some = min(units * parts, gridDim.x);
            const uint32_t time = (units * blocks + some - 1) / some * of_block + to_cut + (parts - 1) * of_part;
            if (time < least) whole = false, teams = some, least = time;
            if (some == gridDim.x) break;
        }
    }
    // Blocks of columns, of all units one after the other, that are before a block of threads' own.
    __device__ __forceinline__ uint32_t before(uint32_t team) const {
        if (team >= teams) return units * blocks;
        return whole ? static_cast<uint32_t>(uint64_t{team} * units / teams) * blocks
                     : static_cast<uint32_t>(uint64_t{team} * units * blocks / teams);
    }
};

// Which of the teams a block of threads is.
__device__ __forceinline__ uint32_t own_team() {
    return gridDim.x - 1 - blockIdx.x;
}

// The pieces that this block of threads has of that, one after the other.
class GemmPieces {
  public:
    __device__ __forceinline__ explicit GemmPieces(const GemmWork& work)
        : work_(work), at_(work.before(own_team())), end_(work.before(own_team() + 1)) {}
    __device__ __forceinline__ bool next(GemmPiece& piece) {
        if (at_ == end_) return false;
        const uint32_t unit = at_ / work_.blocks;
        piece.begin = at_ - unit * work_.blocks;
        piece.end = min(work_.blocks, piece.begin + end_ - at_);
        piece.product = work_.by_panel ? unit % work_.products : unit / work_.panels;
        piece.panel = work_.by_panel ? unit / work_.products : unit - piece.product * work_.panels;
        at_ += piece.end - piece.begin;
        return true;
    }

  private:
    const GemmWork& work_;
    uint32_t at_;
    const uint32_t end_;
};

// A product's tokens: rows of the schedule's order, or of x.
struct GemmProduct {
    uint32_t expert, row, rows;
};

class GemmProducts {
  public:
    __device__ __forceinline__ GemmProducts(const Gemm& call, const uint32_t* table)
        : table_(table), tokens_(call.tokens), most_(call.most), experts_(call.experts) {}
    // All threads call: the schedule's products, to shared memory, behind the first one that is made and the one behind the
    // last one.
    static __device__ __forceinline__ void load(const Gemm& call, uint32_t* table) {
        const uint32_t products = call.schedule.products();
        for (uint32_t i = threadIdx.x; i <= products; i += blockDim.x) {
            const uint32_t expert = i < products ? call.schedule.expert(i) : call.choices.experts;
            const uint32_t before = i > 0 ? call.schedule.expert(i - 1) + 1 : 0;  // experts that products before are of
            table[i + 2] = expert << 16 | call.schedule.first_row(i);
            if (before <= call.first_expert && expert >= call.first_expert) table[0] = i;
            if (before <= call.last_expert && expert >= call.last_expert) table[1] = i;
        }
    }
    __device__ __forceinline__ uint32_t count() const {
        return experts_ ? table_[1] - table_[0] : (tokens_ + most_ - 1) / most_;
    }
    __device__ __forceinline__ GemmProduct at(uint32_t i) const {
        if (!experts_) return {0, i * most_, min(most_, tokens_ - i * most_)};
        const uint32_t* const own = table_ + table_[0] + i + 2;
        const uint32_t row = own[0] & 0xffff;
        return {own[0] >> 16, row, (own[1] & 0xffff) - row};
    }

  private:
    const uint32_t* const table_;
    const uint32_t tokens_, most_;
    const bool experts_;
};

// Stages of shared memory that some fill and others empty, in turns.
struct GemmRing {
    uint8_t* bytes;
    Barrier *full, *empty;
    uint32_t stages, stage_bytes, index = 0, parity = 0;

    __device__ __forceinline__ GemmRing(uint8_t* bytes, uint8_t* barriers, uint32_t stages, uint32_t stage_bytes)
        : bytes(bytes),
          full(reinterpret_cast<Barrier*>(barriers)),
          empty(full + GemmTile::kMostStages),
          stages(stages),
          stage_bytes(stage_bytes) {}
    static __device__ __forceinline__ GemmRing of_x(const Gemm& call, uint8_t* shared, const GemmRoom& room) {
        return {shared + room.x, shared + room.barriers, call.x_stages, call.most * GemmTile::kStageColumns * 2};
    }
    static __device__ __forceinline__ GemmRing of_codes(const Gemm& call, uint8_t* shared, const GemmRoom& room) {
        return {shared + room.codes, shared + room.barriers + GemmTile::kBarriersBytes / 2, call.codes_stages,
                call.codes_bytes};
    }
    __device__ __forceinline__ void init(uint32_t fillers, uint32_t emptiers) const {
        for (uint32_t i = 0; i < stages; ++i) full[i].init(fillers), empty[i].init(emptiers);
    }
    __device__ __forceinline__ uint8_t* stage() const { return bytes + index * stage_bytes; }
    __device__ __forceinline__ void wait_full() const { full[index].wait(parity); }
    __device__ __forceinline__ void wait_empty() const { empty[index].wait(parity ^ 1); }
    __device__ __forceinline__ void advance() {
        if (++index == stages) index = 0, parity ^= 1;
    }
};

// Warp 0: brings codes.
__device__ __forceinline__ void bring_codes(const GemmProjection& p, const GemmWork& work, const GemmProducts& products,
                                            uint32_t first_expert, GemmRing& ring) {
    GemmPiece piece;
    for (GemmPieces pieces(work); pieces.next(piece);) {
        const uint32_t first = piece.panel * GemmTile::kTiles, tiles = min(GemmTile::kTiles, p.count.by - first);
        const uint64_t expert = products.at(piece.product).expert - first_expert;
        const uint8_t* from =
            p.tiles + expert * p.expert_bytes + first * p.tile_bytes + uint64_t{piece.begin} * p.block_bytes;
        for (uint32_t block = piece.begin; block < piece.end; ++block, from += p.block_bytes) {
            ring.wait_empty();
            copy_pieces(ring.full[ring.index], ring.stage(), from, p.tile_bytes, p.block_bytes, tiles);
            ring.advance();
        }
    }
}

// Warps 1 to 3: bring activations, rows of 128 bytes of which those of 16 bytes at i lie at i ^ row % 8.
template <typename T>
class GemmActivations {
  public:
    __device__ __forceinline__ GemmActivations(const Gemm& call, const GemmRing& ring) : call_(call), ring_(ring) {}

    __device__ __forceinline__ void bring(const GemmProjection& p, const GemmWork& work, const GemmProducts& products) {
        if (p.has_boxes)
            bring_boxes(p, work, products);
        else
            bring_rows(p, work, products);
    }

  private:
    static constexpr uint32_t kPieceColumns = 8, kRowLanes = GemmTile::kStageColumns / kPieceColumns;
    static constexpr uint32_t kRowsAtOnce = GemmTile::kXWarps * kLanes / kRowLanes;
    static constexpr uint32_t kMostRows = (GemmTile::kMostTokens + kRowsAtOnce - 1) / kRowsAtOnce;

    // The copy engine does it, asked by one of the warps.
    __device__ __forceinline__ void bring_boxes(const GemmProjection& p, const GemmWork& work,
                                                const GemmProducts& products) {
        const uint32_t lane = threadIdx.x % kLanes, box_rows = p.x_boxes.box_rows;
        const bool is_first = threadIdx.x < 2 * kLanes;
        GemmPiece piece;
        for (GemmPieces pieces(work); pieces.next(piece);) {
            const GemmProduct product = products.at(piece.product);
            const uint32_t boxes = (product.rows + box_rows - 1) / box_rows;
            uint32_t col = piece.begin * kTileColumns;
            for (uint32_t left = 2 * (piece.end - piece.begin); left > 0; --left, col += GemmTile::kStageColumns) {
                if (is_first) {
                    ring_.wait_empty();
                    Barrier& full = ring_.full[ring_.index];
                    if (lane == 0) full.arrive_expecting(GemmTile::kXWarps * kLanes, boxes * box_rows * 128);
                    __syncwarp();
                    if (lane < boxes)
                        copy_box(full, ring_.stage() + lane * box_rows * 128, p.x_boxes, col,
                                 product.row + lane * box_rows);
                }
                ring_.advance();
            }
        }
    }

    __device__ __forceinline__ void bring_rows(const GemmProjection& p, const GemmWork& work,
                                               const GemmProducts& products) {
        const bool aligned = p.cols % kPieceColumns == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
        const uint32_t row = (threadIdx.x - kLanes) / kRowLanes, piece_of_row = threadIdx.x % kRowLanes;
        const bool by_choice = call_.experts && p.is_first;
        static_assert(kRowsAtOnce % 8 == 4);  // every other row of a thread's is swizzled alike
        const uint32_t even = row * 128 + (piece_of_row ^ row % 8) * 16, odd = even ^ 64;
        GemmPiece piece;
        for (GemmPieces pieces(work); pieces.next(piece);) {
            const GemmProduct product = products.at(piece.product);
            const T* const x = static_cast<const T*>(p.x) + (by_choice ? 0 : uint64_t{product.row} * p.cols);
            uint32_t offsets[kMostRows];  // of rows
#pragma unroll
            for (uint32_t i = 0; i < kMostRows; ++i) {
                const uint32_t own = min(row + i * kRowsAtOnce, product.rows - 1);
                offsets[i] =
                    (by_choice ? call_.choices.top_k.divide(call_.schedule.choice(product.row + own)) : own) * p.cols;
            }
            const uint32_t count = row < product.rows ? (product.rows - row + kRowsAtOnce - 1) / kRowsAtOnce : 0;
            uint32_t col = piece.begin * kTileColumns + piece_of_row * kPieceColumns;
            for (uint32_t left = 2 * (piece.end - piece.begin); left > 0; --left, col += GemmTile::kStageColumns) {
                ring_.wait_empty();
                Barrier& full = ring_.full[ring_.index];
                if (aligned) {
                    copy_rows(x + col, offsets, count, col < p.cols, ring_.stage() + even, ring_.stage() + odd);
                    arrive_with_copies(full);
                } else {
                    write_rows(x, offsets, count, col, p.cols, ring_.stage() + even, ring_.stage() + odd);
                    full.arrive();
                }
                ring_.advance();
            }
        }
    }

    // Few instructions, and no branch: these warps are in the way of the tensor cores else.
    static __device__ __forceinline__ void copy_rows(const T* from, const uint32_t (&offsets)[kMostRows],
                                                     uint32_t count, bool there, uint8_t* even, uint8_t* odd) {
#pragma unroll
        for (uint32_t i = 0; i < kMostRows; ++i)
            copy_16_if(i < count, (i % 2 == 0 ? even : odd) + i * (kRowsAtOnce * 128), from + offsets[i], there);
    }
    // Where rows begin anywhere.
    static __device__ __forceinline__ void write_rows(const T* x, const uint32_t (&offsets)[kMostRows], uint32_t count,
                                                      uint32_t col, uint32_t cols, uint8_t* even, uint8_t* odd) {
#pragma unroll
        for (uint32_t i = 0; i < kMostRows; ++i)
            if (i < count)
                *reinterpret_cast<uint4*>((i % 2 == 0 ? even : odd) + i * (kRowsAtOnce * 128)) =
                    by_number(x + offsets[i], col, cols);
    }
    static __device__ __forceinline__ uint4 by_number(const T* row, uint32_t col, uint32_t cols) {
        uint32_t words[4] = {};
#pragma unroll
        for (uint32_t i = 0; i < kPieceColumns; ++i)
            if (col + i < cols)
                words[i / 2] |= uint32_t{*reinterpret_cast<const uint16_t*>(row + col + i)} << (16 * (i % 2));
        return {words[0], words[1], words[2], words[3]};
    }

    const Gemm& call_;
    GemmRing ring_;
};

// One of the warps that multiply.
template <typename T, class Codes>
class GemmMultiplier {
  public:
    __device__ __forceinline__ GemmMultiplier(const Gemm& call, uint8_t* shared, const GemmRoom& room)
        : call_(call),
          x_(GemmRing::of_x(call, shared, room)),
          codes_(GemmRing::of_codes(call, shared, room)),
          thread_(kept((threadIdx.x - GemmTile::kCopiers) % GemmTile::kGroupThreads)),
          lane_(kept(threadIdx.x % kLanes)),
          group_((threadIdx.x - GemmTile::kCopiers) / GemmTile::kGroupThreads),
          leaving_(reinterpret_cast<float*>(shared + room.leaving) + group_ * GemmTile::kAtOnce * GemmTile::kPitch),
          to_rows_(reinterpret_cast<uint2*>(shared + room.choices) + group_ * 128) {}

    __device__ __forceinline__ void run(const GemmProjection& p, const GemmWork& work, const GemmProducts& products) {
        GemmPiece piece;
        for (GemmPieces pieces(work); pieces.next(piece);) {
            const GemmProduct product = products.at(piece.product);
            if (product.rows <= 16)
                multiply_piece<16>(p, work, piece, product);
            else if (product.rows <= 32)
                multiply_piece<32>(p, work, piece, product);
            else if (product.rows <= 64)
                multiply_piece<64>(p, work, piece, product);
            else if constexpr (GemmTile::kMostTokens > 64)
                multiply_piece<128>(p, work, piece, product);
        }
    }

  private:
    static constexpr uint32_t kBlocks = 2;  // of 64 rows, of a group of four warps

    // Where the tile of 16 rows that this warp has of block m is in the panel.
    __device__ __forceinline__ uint32_t tile_of(uint32_t m) const {
        return (group_ * kBlocks + m) * 4 + thread_ / kLanes;
    }

    template <int kN>
    __device__ __forceinline__ void multiply_piece(const GemmProjection& p, const GemmWork& work,
                                                   const GemmPiece& piece, const GemmProduct& product) {
        const bool is_last = call_.experts && !p.is_first;
        uint2 to_row{};
        if (is_last && thread_ < product.rows && piece.begin == 0) {
            to_row.x = call_.schedule.choice(product.row + thread_);
            to_row.y = __float_as_uint(load_weight(call_.weights, to_row.x, call_.weights_type));
        }
        has_boxes_ = p.has_boxes;
        const typename Codes::Shape shape(p);
        Codes codes[kBlocks];
        uint32_t codes_at[kBlocks];  // in a stage
#pragma unroll
        for (uint32_t m = 0; m < kBlocks; ++m) {
            const uint32_t tile = min(piece.panel * GemmTile::kTiles + tile_of(m), p.count.by - 1);
            const uint64_t expert = product.expert - call_.first_expert;
            codes[m].begin(shape, p, p.tiles + expert * p.expert_bytes + tile * p.tile_bytes, lane_ / 4);
            codes_at[m] = tile_of(m) * p.block_bytes;
        }
        float sums[kBlocks][kN / 8][4] = {};
        Barrier* to_release = nullptr;  // of the stage before
        codes_.wait_full();
        load_codes<true, true>(shape, codes, codes_at);
#pragma unroll 1
        for (uint32_t block = piece.begin; block < piece.end; ++block) {
            const bool more = block + 1 < piece.end;
            uint32_t operands[2][kBlocks][4];
            const uint8_t* stage = nullptr;
            const auto multiply = [&]<int kQ>() {
                multiply_16<kN, kQ>(shape, codes, operands, stage, sums);
                // Codes of the next block take the place of those that are operands by now.
                if (kQ == 3 && Codes::kHasHalves && more) {
                    codes_.wait_full();
                    load_codes<true, false>(shape, codes, codes_at);
                }
                if (kQ == 7 && more) {
                    if (!Codes::kHasHalves) codes_.wait_full();
                    load_codes<!Codes::kHasHalves, true>(shape, codes, codes_at);
                }
                wait_for_products<1>();
                if (kQ % 4 == 0) {
                    if (lane_ == 0 && to_release != nullptr) to_release->arrive();
                    to_release = x_.empty + x_.index;
                    x_.advance();
                }
            };
            multiply.template operator()<0>();
            multiply.template operator()<1>();
            multiply.template operator()<2>();
            multiply.template operator()<3>();
            multiply.template operator()<4>();
            multiply.template operator()<5>();
            multiply.template operator()<6>();
            multiply.template operator()<7>();
        }
        wait_for_products<0>();
        __syncwarp();
        if (lane_ == 0) to_release->arrive();
        if (piece.begin != 0) return leave_partial<kN>(sums);
        if (piece.end != work.blocks) add_partials<kN>(work, piece, sums);
        if (is_last) to_rows_[thread_] = to_row;  // others see it behind the first barrier of write()
        write<kN>(p, piece, product, codes, sums);
    }

    // Of the codes' present stage one half, or both; that is given back, then, behind the second one.
    template <bool kFirst, bool kSecond>
    __device__ __forceinline__ void load_codes(const typename Codes::Shape& shape, Codes (&codes)[kBlocks],
                                               const uint32_t (&codes_at)[kBlocks]) {
#pragma unroll
        for (uint32_t m = 0; m < kBlocks; ++m) {
            if constexpr (kFirst) codes[m].template load<0>(shape, codes_.stage() + codes_at[m], lane_);
            if constexpr (kSecond) codes[m].template load<1>(shape, codes_.stage() + codes_at[m], lane_);
        }
        if constexpr (!kSecond) return;
        __syncwarp();
        if (lane_ == 0) codes_.empty[codes_.index].arrive();
        codes_.advance();
    }

    // Begins the products of columns 16 kQ .. 16 kQ + 15 of a block.
    template <int kN, int kQ>
    __device__ __forceinline__ void multiply_16(const typename Codes::Shape& shape, Codes (&codes)[kBlocks],
                                                uint32_t (&operands)[2][kBlocks][4], const uint8_t*& stage,
                                                float (&sums)[kBlocks][kN / 8][4]) {
#pragma unroll
        for (uint32_t m = 0; m < kBlocks; ++m) codes[m].template operand<kQ>(shape, operands[kQ % 2][m]);
        if constexpr (kQ % 4 == 0) {
            x_.wait_full();
            if (!has_boxes_) publish_to_async();  // what other threads have copied
            stage = x_.stage();
        }
        if constexpr (kHasWarpgroups) {
            begin_products();
            const uint64_t x = swizzled_operand(stage) + 2 * (kQ % 4);
#pragma unroll
            for (uint32_t m = 0; m < kBlocks; ++m) multiply<T, kN>(sums[m], operands[kQ % 2][m], x);
            commit_products();
        } else {
#pragma unroll
            for (uint32_t n = 0; n < kN / 16; ++n) {
                const uint32_t row = 16 * n + lane_ / 16 * 8 + lane_ % 8, at = 2 * (kQ % 4) + lane_ / 8 % 2;
                const uint4 x = load_matrices(stage + row * 128 + (at ^ row % 8) * 16);
#pragma unroll
                for (uint32_t m = 0; m < kBlocks; ++m) {
                    mma<T>(sums[m][2 * n], operands[kQ % 2][m], x.x, x.y);
                    mma<T>(sums[m][2 * n + 1], operands[kQ % 2][m], x.z, x.w);
                }
            }
            __syncwarp();
        }
    }

    // Partial sums of a block of threads and a group, in the order of its registers.
    template <int kN>
    __device__ __forceinline__ float4* partials_of(uint32_t team) const {
        const uint64_t each = uint64_t{call_.most} * GemmTile::kRows / 4;
        return reinterpret_cast<float4*>(call_.partials) + team * each + group_ * (each / 2) + thread_;
    }
    template <int kN>
    __device__ __forceinline__ void leave_partial(const float (&sums)[kBlocks][kN / 8][4]) const {
        float4* const to = partials_of<kN>(own_team());
#pragma unroll
        for (uint32_t m = 0; m < kBlocks; ++m)
#pragma unroll
            for (uint32_t n = 0; n < kN / 8; ++n)
                __stcg(to + (m * (kN / 8) + n) * GemmTile::kGroupThreads,
                       float4{sums[m][n][0], sums[m][n][1], sums[m][n][2], sums[m][n][3]});
        sync_threads<GemmTile::kGroupThreads>(1 + group_);
        if (thread_ == 0) raise_flag(call_.flags + own_team() * GemmTile::kGroups + group_, call_.nonce);
    }
    template <int kN>
    __device__ __forceinline__ void add_partials(const GemmWork& work, const GemmPiece& piece,
                                                 float (&sums)[kBlocks][kN / 8][4]) const {
        const uint32_t first = own_team() + 1, unit = work.before(first) - piece.end;  // blocks of columns before this unit
        uint32_t last = first;  // the team behind those that have parts
        while (work.before(last) < unit + work.blocks) ++last;
        for (uint32_t other = first + thread_; other < last; other += GemmTile::kGroupThreads) {
            uint64_t* const flag = call_.flags + other * GemmTile::kGroups + group_;
            wait_for_flag(flag, call_.nonce);
            *flag = 0;  // a graph's next launch has the same nonce
        }
        sync_threads<GemmTile::kGroupThreads>(1 + group_);
#pragma unroll 1
        for (uint32_t other = first; other < last; ++other) {
            const float4* const from = partials_of<kN>(other);
#pragma unroll
            for (uint32_t m = 0; m < kBlocks; ++m)
#pragma unroll
                for (uint32_t n = 0; n < kN / 8; ++n) {
                    const float4 partial = __ldcg(from + (m * (kN / 8) + n) * GemmTile::kGroupThreads);
                    sums[m][n][0] += partial.x, sums[m][n][1] += partial.y;
                    sums[m][n][2] += partial.z, sums[m][n][3] += partial.w;
                }
        }
    }

    // Brings sums to where they belong, by way of shared memory, so that rows of y are written in long parts.
    template <int kN>
    __device__ __forceinline__ void write(const GemmProjection& p, const GemmPiece& piece, const GemmProduct& product,
                                          const Codes (&codes)[kBlocks],
                                          const float (&sums)[kBlocks][kN / 8][4]) const {
#pragma unroll 1
        for (uint32_t done = 0; done < kN; done += GemmTile::kAtOnce) {
            if (done >= product.rows) break;
            sync_threads<GemmTile::kGroupThreads>(1 + group_);
            // Registers have no index: code for each, but for this alone, as the caches of instructions are small.
            static_assert(kN <= 8 * GemmTile::kAtOnce);
            const auto put = [&]<uint32_t kDone>() {
                if (kDone < kN && done == kDone) put_sums<kDone < kN ? kDone : 0, kN>(codes, sums);
            };
            [&]<size_t... kI>(std::index_sequence<kI...>) {
                (put.template operator()<kI * GemmTile::kAtOnce>(), ...);
            }(std::make_index_sequence<8>());
            sync_threads<GemmTile::kGroupThreads>(1 + group_);
            finish_tokens(p, piece, product, done);
        }
        if (call_.experts && !p.is_first) sync_threads<GemmTile::kGroupThreads>(1 + group_);  // to_rows_ is read
    }

    // The sums of tokens kDone and the next ones to shared memory.
    template <uint32_t kDone, int kN>
    __device__ __forceinline__ void put_sums(const Codes (&codes)[kBlocks],
                                             const float (&sums)[kBlocks][kN / 8][4]) const {
        const uint32_t g = lane_ / 4, t = lane_ % 4;
#pragma unroll
        for (uint32_t m = 0; m < kBlocks; ++m)
#pragma unroll
            for (uint32_t n = 0; n < GemmTile::kAtOnce / 8; ++n)
#pragma unroll
                for (uint32_t i = 0; i < 4; ++i)
                    leaving_[(8 * n + 2 * t + i % 2) * GemmTile::kPitch + (m * 4 + thread_ / kLanes) * kTileRows + g +
                             i / 2 * 8] = sums[m][kDone / 8 + n][i] * codes[m].scale(i / 2);
    }

    static __device__ __forceinline__ void load_eight(const float* from, float (&values)[8]) {
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
            const float4 four = reinterpret_cast<const float4*>(from)[i];
            values[4 * i] = four.x, values[4 * i + 1] = four.y, values[4 * i + 2] = four.z, values[4 * i + 3] = four.w;
        }
    }

    // What follows the sums of some tokens, the first of which is `done`.
    __device__ __forceinline__ void finish_tokens(const GemmProjection& p, const GemmPiece& piece,
                                                  const GemmProduct& product, uint32_t done) const {
        constexpr uint32_t kOut = 8;  // neighbouring columns of y that a thread makes
        const bool is_last = call_.experts && !p.is_first, gates = call_.experts && p.order != RowOrder::kPlain;
        const uint32_t width = gates ? p.rows / 2 : p.rows;                                      // of y
        const uint32_t each = (gates ? GemmTile::kGroupRows / 2 : GemmTile::kGroupRows) / kOut;  // threads of a token
        const uint32_t first = (piece.panel * GemmTile::kGroups + group_) * each * kOut;
        const T* const bias = static_cast<const T*>(p.bias) + product.expert * p.rows;
        const bool aligned = width % kOut == 0 && reinterpret_cast<uintptr_t>(p.y) % 16 == 0;
#pragma unroll 1
        for (uint32_t i = thread_; i < GemmTile::kAtOnce * each; i += GemmTile::kGroupThreads) {
            const uint32_t token = i / each, col = first + i % each * kOut;
            if (done + token >= product.rows || col >= width) continue;
            const float* const from = leaving_ + token * GemmTile::kPitch + i % each * (gates ? kTileRows : kOut);
            uint32_t row = product.row + done + token;
            float weight = 1.0f;
            if (is_last) {
                const uint2 to_row = to_rows_[done + token];
                row = to_row.x, weight = __uint_as_float(to_row.y);
            }
            alignas(16) T out[kOut];
            float values[kOut];
            load_eight(from, values);
            if (gates) {
                float ups[kOut];
                load_eight(from + kOut, ups);
                if (p.bias != nullptr) {
                    const bool halves = p.order == RowOrder::kHalves;
#pragma unroll
                    for (uint32_t j = 0; j < kOut; ++j)
                        if (col + j < width) {
                            values[j] += to_float(bias[halves ? col + j : 2 * (col + j)]);
                            ups[j] += to_float(bias[halves ? col + j + width : 2 * (col + j) + 1]);
                        }
                }
                // What models have most is unrolled; all of it would be more code than the caches of instructions hold.
                Gate gate = call_.gate;
                if (gate.clamped) {
                    gate.clamped = true;
#pragma unroll
                    for (uint32_t j = 0; j < kOut; ++j) values[j] = gated(values[j], ups[j], gate);
                } else if (gate.activation == Activation::kSilu) {
                    gate.clamped = false, gate.activation = Activation::kSilu;
#pragma unroll
                    for (uint32_t j = 0; j < kOut; ++j) values[j] = gated(values[j], ups[j], gate);
                } else {
#pragma unroll 1
                    for (uint32_t j = 0; j < kOut; ++j) values[j] = gated(values[j], ups[j], gate);
                }
            } else {
                if (p.bias != nullptr)
#pragma unroll
                    for (uint32_t j = 0; j < kOut; ++j)
                        if (col + j < width) values[j] += to_float(bias[col + j]);
                if (call_.experts && !is_last)
#pragma unroll 1
                    for (uint32_t j = 0; j < kOut; ++j) values[j] = activated(values[j], call_.gate.activation);
            }
#pragma unroll
            for (uint32_t j = 0; j < kOut; ++j) out[j] = from_float<T>(values[j] * weight);
            T* const to = static_cast<T*>(p.y) + uint64_t{row} * width + col;
            if (aligned) {
                *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(out);
            } else {
#pragma unroll
                for (uint32_t j = 0; j < kOut; ++j)
                    if (col + j < width) to[j] = out[j];
            }
        }
    }

    const Gemm& call_;
    GemmRing x_, codes_;
    const uint32_t thread_, lane_, group_;
    float* const leaving_;
    uint2* const to_rows_;
    bool has_boxes_ = false;
};

// What all threads do behind a projection of experts.
template <typename T>
__device__ __forceinline__ void finish_projection(const Gemm& call, uint32_t projection) {
    if (!call.experts || (projection == 0 && call.end == 1)) return;
    if (projection == 1 && call.last_expert < call.choices.experts) return;  // more launches follow
    cooperative_groups::this_grid().sync();
    if (projection == 0) return;
    const GemmProjection& p = call.projections[1];
    const uint32_t pieces = (p.rows + 3) / 4;
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < call.tokens * pieces; i += gridDim.x * blockDim.x)
        combine(call.choices, static_cast<const T*>(p.y), static_cast<T*>(call.y), i / pieces, i % pieces * 4, p.rows);
}

template <typename T, class Codes>
__global__ __launch_bounds__(GemmTile::kThreads, 1) void gemm(const __grid_constant__ Gemm call) {
    QMOE_SHARED_MEMORY(swizzled, 1024);
    uint8_t* const shared = swizzled;
    const GemmRoom room(call);
    if (threadIdx.x == 0) {
        GemmRing::of_x(call, shared, room).init(GemmTile::kXWarps * kLanes, 8);
        GemmRing::of_codes(call, shared, room).init(kCopyArrivals, 8);
        publish_to_async();
    }
    let_next_begin();
    __syncthreads();
    // Codes of a linear layer have been there for long.
    if (call.experts || call.codes_are_new || threadIdx.x >= kLanes) wait_for_previous();
    uint32_t* const table = reinterpret_cast<uint32_t*>(shared + room.products);
    if (call.experts) {
        GemmProducts::load(call, table);
        __syncthreads();
    }
    const GemmProducts products(call, table);
    if (threadIdx.x >= GemmTile::kCopiers) {
        take_registers<224>();  // 2 x 224 + 56 = 3 x 168, what there is
        GemmMultiplier<T, Codes> multiplier(call, shared, room);
        for (uint32_t i = call.begin; i < call.end; ++i) {
            const GemmProjection& p = call.projections[i];
            multiplier.run(p, GemmWork(p, products.count(), !call.experts, call.most), products);
            finish_projection<T>(call, i);
        }
        return;
    }
    give_registers<56>();
    if (threadIdx.x < kLanes) {
        GemmRing ring = GemmRing::of_codes(call, shared, room);
        for (uint32_t i = call.begin; i < call.end; ++i) {
            const GemmProjection& p = call.projections[i];
            bring_codes(p, GemmWork(p, products.count(), !call.experts, call.most), products, call.first_expert, ring);
            finish_projection<T>(call, i);
        }
    } else {
        GemmActivations<T> activations(call, GemmRing::of_x(call, shared, room));
        for (uint32_t i = call.begin; i < call.end; ++i) {
            const GemmProjection& p = call.projections[i];
            activations.bring(p, GemmWork(p, products.count(), !call.experts, call.most), products);
            finish_projection<T>(call, i);
        }
    }
}

// Tells the host, which asks how many threads a block of it may have, whether this device has the code for warpgroups.
inline constexpr uint32_t kWithWarpgroups = 64, kWithoutWarpgroups = 32;
static __global__ __launch_bounds__(kHasWarpgroups ? kWithWarpgroups : kWithoutWarpgroups) void which_code() {}

// A launch that is being prepared: tiles of tokens, and what the workspace holds.
struct GemmPlan {
    uint32_t most = 0;
    bool has_boxes = false;

    // For products that have `tokens` at most.
    Status make(uint64_t tokens) noexcept {
        uint32_t threads = 0;
        QMOE_TRY(most_threads(which_code, threads));
        most = threads == kWithWarpgroups ? 128 : 64;
        has_boxes = TensorMap::are_there(threads == kWithWarpgroups);
        while (most > 16 && tokens <= most / 2) most /= 2;
        return {};
    }
    uint64_t flags_bytes(const Device& device) const noexcept {
        return device.multiprocessors * GemmTile::kGroups * sizeof(uint64_t);
    }
    uint64_t sums_bytes(const Device& device) const noexcept {
        return flags_bytes(device) + uint64_t{device.multiprocessors} * most * GemmTile::kRows * sizeof(float);
    }
    // `room`: sums_bytes() of the workspace, 16-byte aligned.
    void put(Gemm& call, void* room, const Device& device) const noexcept {
        call.most = most;
        call.has_boxes = has_boxes;
        call.flags = static_cast<uint64_t*>(room);
        call.partials = reinterpret_cast<float*>(static_cast<uint8_t*>(room) + flags_bytes(device));
        static std::atomic<uint64_t> launches{
            static_cast<uint64_t>(std::chrono::system_clock::now().time_since_epoch().count())};
        call.nonce = (launches.fetch_add(1) * 2 + 1) * 0x9e3779b97f4a7c15;  // odd: never what flags are set back to
    }
};

// Divides shared memory between codes and activations. What keeps memory busy are codes on their way.
inline Status divide(Gemm& call, const Device& device) noexcept {
    call.codes_bytes = 0;
    for (uint32_t i = call.begin; i < call.end; ++i)
        call.codes_bytes = std::max(call.codes_bytes, GemmTile::kTiles * call.projections[i].block_bytes);
    for (call.x_stages = call.most > 64 ? 6 : GemmTile::kMostStages; call.x_stages >= GemmTile::kFewestXStages;
         --call.x_stages) {
        call.codes_stages = 0;
        const uint32_t fixed = GemmRoom(call).bytes;
        const uint32_t left = fixed < device.shared ? device.shared - fixed : 0;
        call.codes_stages = std::min(left / call.codes_bytes, GemmTile::kMostStages);
        if (call.codes_stages >= 2 || (call.codes_stages == 1 && call.x_stages == GemmTile::kFewestXStages)) return {};
    }
    return Status::error(Code::kNoKernel, "cuda: shared memory of a block is too small");
}

template <typename T, class Codes>
Status launch_gemm_as(Gemm call, const Device& device, cudaStream_t stream) noexcept {
    for (uint32_t i = call.begin; i < call.end; ++i) {
        GemmProjection& p = call.projections[i];
        p.panels = ceil_div(p.count.by, GemmTile::kTiles);
        // Rows of the first projection of experts are anywhere.
        p.has_boxes = call.has_boxes && !(call.experts && p.is_first) && TensorMap::fits(p.x, p.cols);
        if (!p.has_boxes) continue;
        const uint32_t rows = call.experts ? call.tokens * call.choices.top_k.by : call.tokens;
        QMOE_TRY(p.x_boxes.make(p.x, rows, p.cols, call.experts ? 16 : call.most));
    }
    QMOE_TRY(divide(call, device));
    const auto kernel = gemm<T, Codes>;
    QMOE_TRY(runtime_status(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(device.shared))));
    return launch(kernel, device.multiprocessors, GemmTile::kThreads, GemmRoom(call).bytes, call.experts, device, stream, call);
}

}  // namespace qmoe::cuda
