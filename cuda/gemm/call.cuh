// What a launch for many tokens is told, and how its work is divided: see gemm.cuh.
#pragma once

#include <utility>

#include "experts/gates.cuh"
#include "gemm/matrix.cuh"
#include "gemm/schedule.cuh"
#include "tensor_map.cuh"
#include "warpgroup.cuh"

namespace qmoe::cuda {

// What is the same for tall and for wide panels.
struct GemmShape {
    static constexpr uint32_t kGroupThreads = 128, kGroupRows = 64, kGroupTiles = kGroupRows / kTileRows;
    static constexpr uint32_t kCopiers = 128, kXWarps = 3;
    static constexpr uint32_t kStageColumns = 64;
    static constexpr uint32_t kMostStages = 8;  // of codes and of activations
    static constexpr uint32_t kAtOnce = 16;     // tokens whose sums are finished at once
    static constexpr uint32_t kFewestXStages = 3;
    static constexpr uint32_t kMostParts = 8;  // that the units of few panels are cut into
    static constexpr uint32_t kBarriersBytes = 4 * kMostStages * 8;
    static constexpr uint32_t kPitch = (kGroupRows + 8) * 2;  // of a token's numbers on their way out, bytes
};

// How units are shared by teams: `turns` whole ones for each, if there are as many, and the blocks of columns of the others
// evenly by the first `teams`, if they are cut.
struct GemmShares {
    uint32_t turns, teams;
    bool cut;
    uint32_t cycles;  // that this takes, about

    // `many`: tokens that a product is multiplied as. Host and device, which knows how many units there are of a layer of
    // experts.
    QMOE_INLINE static GemmShares of(uint32_t units, uint32_t blocks, uint32_t all, uint32_t many,
                                     uint32_t groups) noexcept {
        const auto parts_of = [](uint32_t a, uint32_t b) { return (a + b - 1) / b; };
        // Cycles, about: of a block (of the tensor cores, or to make operands), to put a unit's parts together, and of
        // each part more.
        const uint32_t tensor = many * groups * 4, making = 110 + 480 * groups;
        const uint32_t of_block = tensor > making ? tensor : making, to_cut = 2500, of_part = 600 + many * 8;
        const uint32_t whole_turns = units / all;
        GemmShares shares{parts_of(units, all), units < all ? units : all, false, 0};
        uint32_t& least = shares.cycles;
        least = shares.turns * blocks * of_block;
        if (units == whole_turns * all) return shares;
        const uint32_t turns = whole_turns > 0 ? whole_turns - 1 : 0, rest = units - turns * all;
        for (uint32_t parts = 2; parts <= GemmShape::kMostParts; ++parts) {
            const uint32_t some = rest * parts < all ? rest * parts : all;
            const uint32_t time =
                (turns * blocks + parts_of(rest * blocks, some)) * of_block + to_cut + parts_of(some, rest) * of_part;
            if (time < least) shares = {turns, some, true, time};
            if (some == all) break;
        }
        return shares;
    }
};

struct GemmProjection : TiledMatrix {
    const void *x, *bias;
    void* y;
    uint32_t panels;  // of each product, for a team
    bool is_first;    // of experts: a gate follows
    bool by_choice;   // x has a row per token of the call; else one per row of the schedule's order, or of the product
    bool has_boxes;   // x is brought in boxes of x_boxes
    TensorMap x_boxes;
};

struct Gemm {
    GemmProjection projections[2];
    uint32_t begin, end;          // of them
    bool experts, codes_are_new;  // codes_are_new: made by the kernel before this one
    bool wide;                    // panels
    bool has_boxes;               // activations can be brought in boxes
    uint32_t tokens;              // of x
    uint32_t most;                // tokens that a product can have, and that it is multiplied as
    uint32_t codes_bytes, codes_stages, x_stages;
    uint32_t neighbours;  // products that are neighbours for a panel: their activations stay in the second-level cache
    float* partials;      // by team, block of threads and group
    uint64_t* flags;      // by the same: `nonce` where partial sums are there
    uint64_t nonce;
    GemmShares shares;  // of a linear layer
    // Of experts alone.
    void* y;
    Choices choices;
    GemmSchedule schedule;
    uint32_t most_products;
    uint32_t first_expert,
        last_expert;  // products of first_expert .. last_expert - 1 are made, the former's tiles are first
    const void* weights;
    OutputType weights_type;
    Gate gate;
};

// (rows, tokens) of a unit are (256, up to 64)
struct GemmTall : GemmShape {
    static constexpr uint32_t kGroups = 4, kCluster = 1, kMostTokens = 64;
    static constexpr int kGiven = 64, kTaken = 104;  // registers of a thread: 64 + 4 x 104 = 5 x 96, what there is
};
// (128, up to 256)
struct GemmWide : GemmShape {
    static constexpr uint32_t kGroups = 2, kCluster = 2;
    static constexpr int kGiven = 56, kTaken = 224;  // 56 + 2 x 224 = 3 x 168
};
// kMany: tokens that products are multiplied as. There is a kernel for each: where one has several loops, all are slower.
template <class Shape, bool kIsOfExperts, uint32_t kMany>
struct GemmTile : Shape {
    static constexpr bool kExperts = kIsOfExperts;
    static constexpr uint32_t kMostTokens = kMany;
    static constexpr uint32_t kTiles = Shape::kGroups * Shape::kGroupTiles, kRows = kTiles * kTileRows;
    static constexpr uint32_t kMultipliers = Shape::kGroups * Shape::kGroupThreads;
    static constexpr uint32_t kThreads = Shape::kCopiers + kMultipliers;
    static constexpr uint32_t kWarps = kMultipliers / kLanes;   // that multiply
    static constexpr uint32_t kLeaving = 256 / Shape::kGroups;  // tokens that leave at once
    static constexpr uint32_t kLeavingBytes = Shape::kGroups * kLeaving * Shape::kPitch;
    static constexpr uint32_t kChoicesBytes = Shape::kGroups * kMany * 8;  // choice and weight by token
};

// What is where in shared memory.
template <class Tile>
struct GemmRoom {
    uint32_t x, codes, barriers, leaving, choices, products, bytes;

    QMOE_INLINE explicit GemmRoom(const Gemm& call) noexcept {
        x = 0;  // at a multiple of 1024, as all of its stages
        codes = x + call.x_stages * call.most * Tile::kStageColumns * 2;
        barriers = codes + call.codes_stages * call.codes_bytes;
        leaving = barriers + Tile::kBarriersBytes;
        choices = leaving + Tile::kLeavingBytes;
        products = choices + (Tile::kExperts ? Tile::kChoicesBytes : 0);
        bytes = products + (Tile::kExperts ? (call.most_products + 3) * 4 : 0);
    }
};

// A team's part of a unit: of its blocks of columns begin .. end - 1.
struct GemmPiece {
    uint32_t product, panel, begin, end;
};

// The work of a projection, and what of it a block of threads has.
template <class Tile>
class GemmWork {
  public:
    __device__ __forceinline__ GemmWork(const Gemm& call, const GemmProjection& p, uint32_t products)
        : blocks(p.blocks.by),
          products_(products),
          panels_(p.panels),
          own_(gridDim.x / Tile::kCluster - 1 - blockIdx.x / Tile::kCluster),
          all_(gridDim.x / Tile::kCluster),
          units_(products_ * panels_),
          neighbours_(call.neighbours),
          shares_(Tile::kExperts ? GemmShares::of(units_, blocks, all_, call.most, Tile::kGroups) : call.shares) {}
    // Which of the teams this block of threads is of; which one of it.
    __device__ __forceinline__ uint32_t own_team() const { return own_; }
    static __device__ __forceinline__ uint32_t own_rank() {
        return Tile::kCluster == 1 ? 0 : blockIdx.x % Tile::kCluster;
    }

    // Blocks of columns, of the units that are cut, one after the other, that are before a team's own.
    __device__ __forceinline__ uint32_t before(uint32_t team) const {
        const uint32_t all = (units_ - shares_.turns * all_) * blocks;
        return team >= shares_.teams ? all : static_cast<uint32_t>(uint64_t{team} * all / shares_.teams);
    }
    // The pieces that this block of threads has, one after the other.
    class Pieces {
      public:
        __device__ __forceinline__ explicit Pieces(const GemmWork& work) : work_(work) {
            if (work.shares_.cut) at_ = work.before(work.own_), end_ = work.before(work.own_ + 1);
        }
        __device__ __forceinline__ bool next(GemmPiece& piece) {
            if (turn_ < work_.shares_.turns) {
                const uint32_t unit = turn_ * work_.all_ + work_.own_;
                ++turn_;
                if (unit >= work_.units_) return false;
                piece.begin = 0, piece.end = work_.blocks;
                work_.place(unit, piece);
                return true;
            }
            if (at_ == end_) return false;
            const uint32_t unit = at_ / work_.blocks;
            piece.begin = at_ - unit * work_.blocks;
            piece.end = min(work_.blocks, piece.begin + end_ - at_);
            at_ += piece.end - piece.begin;
            work_.place(work_.shares_.turns * work_.all_ + unit, piece);
            return true;
        }

      private:
        const GemmWork& work_;
        uint32_t turn_ = 0, at_ = 0, end_ = 0;
    };

    const uint32_t blocks;

  private:
    __device__ __forceinline__ void place(uint32_t unit, GemmPiece& piece) const {
        uint32_t panel;
        if (neighbours_ == 1) {
            piece.product = unit / panels_, panel = unit - piece.product * panels_;
        } else {
            const uint32_t first = unit / (neighbours_ * panels_) * neighbours_;
            const uint32_t count = min(neighbours_, products_ - first), rest = unit - first * panels_;
            panel = rest / count, piece.product = first + rest - panel * count;
        }
        piece.panel = panel * Tile::kCluster + own_rank();
    }

    const uint32_t products_, panels_, own_, all_, units_, neighbours_;
    const GemmShares shares_;
};

// A product's tokens: rows of the schedule's order, or of x.
struct GemmProduct {
    uint32_t expert, row, rows;
};

template <bool kExperts>
class GemmProducts {
  public:
    __device__ __forceinline__ GemmProducts(const Gemm& call, const uint32_t* table)
        : table_(table), tokens_(call.tokens), most_(call.most) {}
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
        return kExperts ? table_[1] - table_[0] : (tokens_ + most_ - 1) / most_;
    }
    __device__ __forceinline__ GemmProduct at(uint32_t i) const {
        if (!kExperts) return {0, i * most_, min(most_, tokens_ - i * most_)};
        const uint32_t* const own = table_ + table_[0] + i + 2;
        const uint32_t row = own[0] & 0xffff;
        return {own[0] >> 16, row, (own[1] & 0xffff) - row};
    }

  private:
    const uint32_t* const table_;
    const uint32_t tokens_, most_;
};

// Stages of shared memory that some fill and others empty, in turns.
struct GemmRing {
    uint8_t* bytes;
    Barrier *full, *empty;
    uint32_t stages, stage_bytes, index = 0, at = 0, parity = 0;  // at: bytes before the present stage

    // Whole warps call.
    __device__ __forceinline__ GemmRing(uint8_t* bytes, uint8_t* barriers, uint32_t stages, uint32_t stage_bytes)
        : bytes(bytes),
          full(reinterpret_cast<Barrier*>(barriers)),
          empty(full + GemmShape::kMostStages),
          stages(kept(stages)),
          stage_bytes(kept(stage_bytes)) {}
    template <class Room>
    static __device__ __forceinline__ GemmRing of_x(const Gemm& call, uint8_t* shared, const Room& room) {
        return {shared + room.x, shared + room.barriers, call.x_stages, call.most * GemmShape::kStageColumns * 2};
    }
    template <class Room>
    static __device__ __forceinline__ GemmRing of_codes(const Gemm& call, uint8_t* shared, const Room& room) {
        return {shared + room.codes, shared + room.barriers + GemmShape::kBarriersBytes / 2, call.codes_stages,
                call.codes_bytes};
    }
    // A warp calls, and publishes what this does.
    __device__ __forceinline__ void init(uint32_t fillers, uint32_t emptiers) const {
        static_assert(GemmShape::kMostStages <= kLanes);
        const uint32_t i = threadIdx.x % kLanes;
        if (i < stages) full[i].init(fillers), empty[i].init(emptiers);
    }
    __device__ __forceinline__ uint8_t* stage() const { return bytes + at; }
    __device__ __forceinline__ void wait_full() const { full[index].wait(parity); }
    __device__ __forceinline__ void wait_empty() const { empty[index].wait(parity ^ 1); }
    __device__ __forceinline__ void advance() {
        at += stage_bytes;
        if (++index == stages) index = 0, at = 0, parity ^= 1;
    }
};

}  // namespace qmoe::cuda
