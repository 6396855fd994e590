// The warps that multiply, and what follows the sums: see gemm.cuh.
#pragma once

#include "gemm/call.cuh"
#include "int/mma.cuh"

namespace qmoe::cuda {

// Matrices (8, 8) of 16-bit numbers to shared memory, transposed: of the one (n, r) a lane has, in words[n * kAcross + r], of
// row lane / 4 the columns 2 (lane % 4) and the next one; column c of it goes to `to` + (8 n + c) * pitch + 16 r.
template <uint32_t kAcross>
__device__ __forceinline__ void store_transposed(uint8_t* to, uint32_t pitch, const uint32_t (&words)[2 * kAcross],
                                                 uint32_t lane) {
#if __CUDA_ARCH__ >= 900
    const uint32_t matrix = lane / 8 % (2 * kAcross);
    const uint32_t address = shared_address(to + (matrix / kAcross * 8 + lane % 8) * pitch + matrix % kAcross * 16);
    if constexpr (kAcross == 2)
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                     "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                     : "memory");
    else
        asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(words[0]),
                     "r"(words[1])
                     : "memory");
#else
    for (uint32_t i = 0; i < 2 * kAcross; ++i)
        for (uint32_t j = 0; j < 2; ++j)
            *reinterpret_cast<uint16_t*>(to + (i / kAcross * 8 + lane % 4 * 2 + j) * pitch + i % kAcross * 16 +
                                         lane / 4 * 2) = static_cast<uint16_t>(words[i] >> (16 * j));
#endif
}

template <typename T>
__device__ __forceinline__ uint32_t pair_from_floats(float first, float second) {
    const T both[2] = {from_float<T>(first), from_float<T>(second)};
    return uint32_t{*reinterpret_cast<const uint16_t*>(both + 1)} << 16 | *reinterpret_cast<const uint16_t*>(both);
}

template <typename T, class Codes, class Tile>
class GemmMultiplier {
  public:
    __device__ __forceinline__ GemmMultiplier(const Gemm& call, uint8_t* shared, const GemmRoom<Tile>& room)
        : call_(call),
          x_(GemmRing::of_x(call, shared, room)),
          codes_(GemmRing::of_codes(call, shared, room)),
          thread_(kept((threadIdx.x - Tile::kCopiers) % Tile::kGroupThreads)),
          lane_(kept(threadIdx.x % kLanes)),
          group_(kept((threadIdx.x - Tile::kCopiers) / Tile::kGroupThreads)),
          leaving_(shared + room.leaving + group_ * Tile::kLeaving * Tile::kPitch),
          to_rows_(reinterpret_cast<uint2*>(shared + room.choices) + group_ * Tile::kMostTokens) {}

    __device__ __forceinline__ void run(const GemmProjection& p, const GemmWork<Tile>& work,
                                        const GemmProducts<Tile::kExperts>& products) {
        GemmPiece piece;
        for (typename GemmWork<Tile>::Pieces pieces(work); pieces.next(piece);) {
            const GemmProduct product = products.at(piece.product);
            multiply_piece(p, work, piece, product);
        }
    }

  private:
    static constexpr uint32_t kN = Tile::kMostTokens, kNone = ~0u;

    // Where the tile of 16 rows that this warp has is in the panel.
    __device__ __forceinline__ uint32_t own_tile() const { return group_ * Tile::kGroupTiles + thread_ / kLanes; }
    __device__ __forceinline__ void sync_group() const { sync_threads<Tile::kGroupThreads>(1 + group_); }

    __device__ __forceinline__ void multiply_piece(const GemmProjection& p, const GemmWork<Tile>& work,
                                                   const GemmPiece& piece, const GemmProduct& product) {
        constexpr uint32_t kOwn = (kN + Tile::kGroupThreads - 1) / Tile::kGroupThreads;
        const bool is_last = Tile::kExperts && !p.is_first;
        uint2 to_rows[kOwn] = {};
        if (is_last && piece.begin == 0)
#pragma unroll
            for (uint32_t i = 0; i < kOwn; ++i) {
                const uint32_t row = thread_ + i * Tile::kGroupThreads;
                if (row >= product.rows) break;
                to_rows[i].x = call_.schedule.choice(product.row + row);
                to_rows[i].y = __float_as_uint(load_weight(call_.weights, to_rows[i].x, call_.weights_type));
            }
        const bool has_boxes = kept(p.has_boxes);
        const typename Codes::Shape shape(p);
        const uint32_t tile = min(piece.panel * Tile::kTiles + own_tile(), p.count.by - 1);
        const uint32_t codes_at = kept(own_tile() * p.block_bytes);  // in a stage
        Codes codes;
        codes.begin(shape, p,
                    p.tiles + uint64_t{product.expert - call_.first_expert} * p.expert_bytes + tile * p.tile_bytes,
                    lane_ / 4);
        float sums[kN / 8][4] = {};
        uint32_t to_release = kNone;  // the stage before
        codes_.wait_full();
        load_codes<true, true>(shape, codes, codes_at);
#pragma unroll 1
        for (uint32_t block = piece.begin; block < piece.end; ++block) {
            const bool more = block + 1 < piece.end;
            uint32_t operands[2][2][4];
            const uint8_t* stage = nullptr;
            // Begins the products of columns 32 kD .. 32 kD + 31 of the block; those before them are done then, and the
            // stage that they were the last of is given back.
            const auto multiply_32 = [&]<int kD>() {
                uint32_t(&own)[2][4] = operands[kD % 2];
                codes.template operand<2 * kD>(shape, own[0]);
                codes.template operand<2 * kD + 1>(shape, own[1]);
                if constexpr (kD % 2 == 0) {
                    x_.wait_full();
                    if (!has_boxes) publish_to_async();  // what other threads have copied
                    stage = x_.stage();
                }
                begin_products();
#pragma unroll
                for (uint32_t i = 0; i < 2; ++i) multiply_16(sums, own[i], stage, 2 * (kD % 2) + i);
                commit_products();
                // Codes of the next block take the place of those that are operands by now.
                if (kD == 1 && Codes::kHasHalves && more) {
                    codes_.wait_full();
                    load_codes<true, false>(shape, codes, codes_at);
                }
                if (kD == 3 && more) {
                    if (!Codes::kHasHalves) codes_.wait_full();
                    load_codes<!Codes::kHasHalves, true>(shape, codes, codes_at);
                }
                if constexpr (kHasWarpgroups)
                    wait_for_products<1>();
                else
                    __syncwarp();
                if constexpr (kD % 2 == 0) {
                    release_x(to_release);
                    to_release = x_.index;
                    x_.advance();
                }
            };
            multiply_32.template operator()<0>();
            multiply_32.template operator()<1>();
            multiply_32.template operator()<2>();
            multiply_32.template operator()<3>();
        }
        wait_for_products<0>();
        __syncwarp();
        release_x(to_release);
        if constexpr (!Tile::kExperts) wait_for_previous();
        if (piece.begin != 0) return leave_partial(work, sums);
        if (piece.end != work.blocks) add_partials(work, piece, sums);
        sync_group();  // what left before is read
        if (is_last)
#pragma unroll
            for (uint32_t i = 0; i < kOwn; ++i)
                if (thread_ + i * Tile::kGroupThreads < kN) to_rows_[thread_ + i * Tile::kGroupThreads] = to_rows[i];
        if (is_last) sync_group();
        write(p, piece, product, codes, sums);
    }

    // Of a stage of activations that the products are done with. All blocks of threads of a cluster fill it.
    __device__ __forceinline__ void release_x(uint32_t stage) const {
        if (stage == kNone) return;
        if constexpr (Tile::kCluster == 1) {
            if (lane_ == 0) x_.empty[stage].arrive();
        } else {
            if (lane_ < Tile::kCluster) x_.empty[stage].arrive_at(lane_);
        }
    }

    // Of the codes' present stage one half, or both; that is given back, then, behind the second one.
    template <bool kFirst, bool kSecond>
    __device__ __forceinline__ void load_codes(const typename Codes::Shape& shape, Codes& codes, uint32_t codes_at) {
        if constexpr (kFirst) codes.template load<0>(shape, codes_.stage() + codes_at, lane_);
        if constexpr (kSecond) {
            codes.template load<1>(shape, codes_.stage() + codes_at, lane_);
            __syncwarp();
            if (lane_ == 0) codes_.empty[codes_.index].arrive();
            codes_.advance();
        }
    }

    // Columns 16 at .. 16 at + 15 of a stage.
    __device__ __forceinline__ void multiply_16(float (&sums)[kN / 8][4], const uint32_t (&operand)[4],
                                                const uint8_t* stage, uint32_t at) const {
        if constexpr (kHasWarpgroups) {
            multiply<T, kN>(sums, operand, swizzled_operand(stage) + 2 * at);
        } else {
#pragma unroll
            for (uint32_t n = 0; n < kN / 16; ++n) {
                const uint32_t row = 16 * n + lane_ / 16 * 8 + lane_ % 8, piece = 2 * at + lane_ / 8 % 2;
                const uint4 x = load_matrices(stage + row * 128 + (piece ^ row % 8) * 16);
                mma<T>(sums[2 * n], operand, x.x, x.y);
                mma<T>(sums[2 * n + 1], operand, x.z, x.w);
            }
        }
    }

    // Partial sums of a team's block of threads and a group, in the order of its registers.
    __device__ __forceinline__ uint32_t partial_of(const GemmWork<Tile>& work, uint32_t team) const {
        return (team * Tile::kCluster + work.own_rank()) * Tile::kGroups + group_;
    }
    __device__ __forceinline__ float4* partials(uint32_t partial) const {
        return reinterpret_cast<float4*>(call_.partials) + uint64_t{partial} * call_.most * (Tile::kGroupRows / 4) +
               thread_;
    }
    __device__ __forceinline__ void leave_partial(const GemmWork<Tile>& work, const float (&sums)[kN / 8][4]) const {
        const uint32_t own = partial_of(work, work.own_team());
        float4* const to = partials(own);
#pragma unroll
        for (uint32_t n = 0; n < kN / 8; ++n)
            __stcg(to + n * Tile::kGroupThreads, float4{sums[n][0], sums[n][1], sums[n][2], sums[n][3]});
        sync_group();
        if (thread_ == 0) raise_flag(call_.flags + own, call_.nonce);
    }
    __device__ __forceinline__ void add_partials(const GemmWork<Tile>& work, const GemmPiece& piece,
                                                 float (&sums)[kN / 8][4]) const {
        const uint32_t first = work.own_team() + 1;
        const uint32_t unit = work.before(first) - piece.end;  // blocks of columns before this unit
        uint32_t last = first;                                 // the team behind those that have parts
        while (work.before(last) < unit + work.blocks) ++last;
        for (uint32_t other = first + thread_; other < last; other += Tile::kGroupThreads) {
            uint64_t* const flag = call_.flags + partial_of(work, other);
            wait_for_flag(flag, call_.nonce);
            *flag = 0;  // a graph's next launch has the same nonce
        }
        sync_group();
#pragma unroll 1
        for (uint32_t other = first; other < last; ++other) {
            const float4* const from = partials(partial_of(work, other));
#pragma unroll
            for (uint32_t n = 0; n < kN / 8; ++n) {
                const float4 partial = __ldcg(from + n * Tile::kGroupThreads);
                sums[n][0] += partial.x, sums[n][1] += partial.y;
                sums[n][2] += partial.z, sums[n][3] += partial.w;
            }
        }
    }

    // values = sums[2 * at], sums[2 * at + 1]: registers have no index, so there is code for each, but for this alone, as
    // the caches of instructions are small.
    template <uint32_t kFrom, uint32_t kTo>
    static __device__ __forceinline__ void take_sums(const float (&sums)[kN / 8][4], uint32_t at,
                                                     float (&values)[2][4]) {
        if constexpr (kTo - kFrom == 1) {
#pragma unroll
            for (uint32_t i = 0; i < 8; ++i) values[i / 4][i % 4] = sums[2 * kFrom + i / 4][i % 4];
        } else {
            constexpr uint32_t kMiddle = (kFrom + kTo) / 2;
            if (at < kMiddle)
                take_sums<kFrom, kMiddle>(sums, at, values);
            else
                take_sums<kMiddle, kTo>(sums, at, values);
        }
    }

    // Brings sums to where they belong, by way of shared memory, so that rows of y are written in long parts.
    __device__ __forceinline__ void write(const GemmProjection& p, const GemmPiece& piece, const GemmProduct& product,
                                          const Codes& codes, const float (&sums)[kN / 8][4]) const {
        const bool gates = Tile::kExperts && p.order != RowOrder::kPlain, is_last = Tile::kExperts && !p.is_first;
        const uint32_t tile = piece.panel * Tile::kTiles + own_tile(), g = lane_ / 4, t = lane_ % 4;
        float bias[2] = {};
        if (p.bias != nullptr) {
            const T* const biases = static_cast<const T*>(p.bias) + product.expert * p.rows;
#pragma unroll
            for (uint32_t r = 0; r < 2; ++r) {
                const uint32_t row = !gates                         ? tile * kTileRows + 8 * r + g
                                     : p.order == RowOrder::kHalves ? tile * 8 + g + r * (p.rows / 2)
                                                                    : 2 * (tile * 8 + g) + r;
                const bool there = gates ? tile * 8 + g < p.rows / 2 : row < p.rows;
                bias[r] = there ? to_float(biases[row]) : 0.0f;
            }
        }
        // A warp's columns of y: 16, or 8 behind a gate.
        uint8_t* const own = leaving_ + thread_ / kLanes * (gates ? 16 : 32);
#pragma unroll 1
        for (uint32_t first = 0; first < product.rows; first += Tile::kLeaving) {
            if (first > 0) sync_group();
            const uint32_t end = min(product.rows, first + Tile::kLeaving);
#pragma unroll 1
            for (uint32_t at = first; at < end; at += Tile::kAtOnce) {
                float values[2][4];
                take_sums<0, kN / 16>(sums, at / Tile::kAtOnce, values);
#pragma unroll
                for (uint32_t n = 0; n < 2; ++n)
#pragma unroll
                    for (uint32_t i = 0; i < 4; ++i) values[n][i] = fmaf(values[n][i], codes.scale(i / 2), bias[i / 2]);
                uint8_t* const to = own + (at - first) * Tile::kPitch;
                if (gates) {
                    gate(values);
                    const uint32_t words[2] = {pair_from_floats<T>(values[0][0], values[0][1]),
                                               pair_from_floats<T>(values[1][0], values[1][1])};
                    store_transposed<1>(to, Tile::kPitch, words, lane_);
                    continue;
                }
                if (is_last) {
#pragma unroll
                    for (uint32_t n = 0; n < 2; ++n)
#pragma unroll
                        for (uint32_t i = 0; i < 4; ++i)
                            values[n][i] *= __uint_as_float(to_rows_[at + 8 * n + 2 * t + i % 2].y);
                } else if (Tile::kExperts) {
                    activate(values);
                }
                const uint32_t words[4] = {
                    pair_from_floats<T>(values[0][0], values[0][1]), pair_from_floats<T>(values[0][2], values[0][3]),
                    pair_from_floats<T>(values[1][0], values[1][1]), pair_from_floats<T>(values[1][2], values[1][3])};
                store_transposed<2>(to, Tile::kPitch, words, lane_);
            }
            sync_group();
            leave(p, piece, product, first, end - first);
        }
    }

    // In turns of one number, so that there is code for one.
    __device__ __forceinline__ void activate(float (&values)[2][4]) const {
#pragma unroll 1
        for (uint32_t turn = 0; turn < 8; ++turn) {
            const float done = activated(values[0][0], call_.gate.activation);
#pragma unroll
            for (uint32_t i = 0; i < 7; ++i) values[i / 4][i % 4] = values[(i + 1) / 4][(i + 1) % 4];
            values[1][3] = done;
        }
    }

    // values[n][i] = gate of values[n][i] and values[n][i + 2], i < 2.
    __device__ __forceinline__ void gate(float (&values)[2][4]) const {
        Gate how = call_.gate;
        const auto all = [&] {
#pragma unroll
            for (uint32_t i = 0; i < 4; ++i)
                values[i / 2][i % 2] = gated(values[i / 2][i % 2], values[i / 2][i % 2 + 2], how);
        };
        if (how.clamped) {
            how.clamped = true;
            all();
        } else if (how.activation == Activation::kSilu) {
            how.clamped = false, how.activation = Activation::kSilu;
            all();
        } else {
            how.clamped = false;
            all();
        }
    }

    // From shared memory to y: `count` tokens, the first of which is `first` of the product.
    __device__ __forceinline__ void leave(const GemmProjection& p, const GemmPiece& piece, const GemmProduct& product,
                                          uint32_t first, uint32_t count) const {
        constexpr uint32_t kOut = 8;  // columns at once
        const bool gates = Tile::kExperts && p.order != RowOrder::kPlain, is_last = Tile::kExperts && !p.is_first;
        const uint32_t width = gates ? p.rows / 2 : p.rows;                              // of y
        const uint32_t each = (gates ? Tile::kGroupRows / 2 : Tile::kGroupRows) / kOut;  // parts of a token
        const uint32_t first_col = (piece.panel * Tile::kGroups + group_) * each * kOut;
        const bool aligned = width % kOut == 0 && reinterpret_cast<uintptr_t>(p.y) % 16 == 0;
        const uint32_t part = thread_ % each, col = first_col + part * kOut;
        if (col >= width) return;
#pragma unroll 2
        for (uint32_t token = thread_ / each; token < count; token += Tile::kGroupThreads / each) {
            const uint4 numbers = *reinterpret_cast<const uint4*>(leaving_ + token * Tile::kPitch + part * 16);
            const uint32_t row = is_last ? to_rows_[first + token].x : product.row + first + token;
            T* const to = static_cast<T*>(p.y) + uint64_t{row} * width + col;
            if (aligned) {
                *reinterpret_cast<uint4*>(to) = numbers;
            } else {
                const uint32_t words[4] = {numbers.x, numbers.y, numbers.z, numbers.w};
#pragma unroll
                for (uint32_t j = 0; j < kOut; ++j)
                    if (col + j < width)
                        *reinterpret_cast<uint16_t*>(to + j) = static_cast<uint16_t>(words[j / 2] >> (16 * (j % 2)));
            }
        }
    }

    const Gemm& call_;
    GemmRing x_, codes_;
    const uint32_t thread_, lane_, group_;
    uint8_t* const leaving_;
    uint2* const to_rows_;
};

}  // namespace qmoe::cuda
