// `int` times a few tokens, of one matrix or of a layer's experts: as fast as memory gives the codes.
//
// Each block of threads, the only one of its multiprocessor, has a share of neighbouring tiles, of one matrix or across
// those of experts, and takes them in batches. The warps are divided into parts, which have every so many blocks of
// columns each, and parts into warps that have every so many tiles. What a warp has of the columns of a block it holds in
// registers, sums for all of its tiles too: per block of codes there remain masks, products and a scale, which is what is
// needed to keep up with memory at 2 bits. Sums of parts meet in shared memory, where they are added in their order.
// Results depend on nothing but the shape, the tokens and the number of multiprocessors.
//
// Weights come through a ring of a warp's own, of stages with a block of each of its tiles, that is filled across batches,
// experts and projections, and of a matrix even before the kernel before this one has ended. No more than one stage is
// asked for before activations are: they come from the second-level cache, but behind all that has been asked for. Lanes
// copy for themselves, which takes as many bytes per second as the copy engine does and less code: code matters, since
// there are few instructions that a warp comes across more than a few times.
//
// Of more than a few tokens, activations of all columns would be as many bytes for each multiprocessor as its weights are:
// there a cluster of two blocks divides the columns. (Clusters of four do not fill all multiprocessors.) Where activations
// have no room even so, columns come slab by slab.
//
// Both projections of a layer of experts and the sums over a token's choices are one launch, with a barrier of all blocks
// of threads between them; where they differ in format, three.
#pragma once

#include <cooperative_groups.h>

#include <algorithm>

#include "async_copy.cuh"
#include "cluster.cuh"
#include "experts/combine.cuh"
#include "experts/gates.cuh"
#include "int/activations.cuh"
#include "int/few_tokens.h"
#include "int/operands.cuh"

namespace qmoe::cuda {

// Writes what a lane has of a tile, of rows g and g + 8. `row_of_y` is of the token, or of its choice.
template <typename T, bool kExperts>
__device__ __forceinline__ void write(const FewTokens& call, const Projection& p, uint32_t expert, uint32_t tile,
                                      uint32_t g, uint32_t row_of_y, float weight, float lower, float upper) {
    const T* const bias = p.bias == nullptr ? nullptr : static_cast<const T*>(p.bias) + uint64_t{expert} * p.rows;
    if (kExperts && p.order != RowOrder::kPlain) {
        const uint32_t unit = tile * (kTileRows / 2) + g, half = p.rows / 2;
        if (unit >= half) return;
        if (bias != nullptr) {
            const bool halves = p.order == RowOrder::kHalves;
            lower += static_cast<float>(bias[halves ? unit : 2 * unit]);
            upper += static_cast<float>(bias[halves ? half + unit : 2 * unit + 1]);
        }
        static_cast<T*>(p.y)[uint64_t{row_of_y} * half + unit] = from_float<T>(gated(lower, upper, call.gate));
        return;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const uint32_t row = tile * kTileRows + g + 8 * r;
        if (row >= p.rows) continue;
        const uint64_t at = uint64_t{row_of_y} * p.rows + row;
        float value = r == 0 ? lower : upper;
        if (bias != nullptr) value += static_cast<float>(bias[row]);
        if (kExperts && !p.is_first)
            static_cast<float*>(p.y)[at] = value * weight;
        else
            static_cast<T*>(p.y)[at] = from_float<T>(kExperts ? activated(value, call.gate.activation) : value);
    }
}

// Tiles begin .. end - 1, of one product, of which warps have room for the sums.
template <bool kExperts>
__device__ __forceinline__ Range batch_at(const Projection& p, const Schedule& schedule, uint32_t begin, uint32_t end) {
    end = min(end, begin + p.batch);
    if constexpr (kExperts) end = min(end, (p.count.divide(begin) + 1) * p.count.by);
    return {begin, end};
}

// Where a warp's next blocks come from: of every batch its blocks of columns, slab by slab, and of each its tiles.
template <int kBits, bool kExperts>
class Source {
  public:
    __device__ __forceinline__ Source(const FewTokens& call, const Schedule& schedule, uint32_t slice)
        : call_(call), schedule_(schedule), slice_(slice) {
        open(0);
    }
    // Asks for the next blocks, of a column of this warp's tiles, if there are any. Ends a group of copies.
    __device__ __forceinline__ void copy_column(uint8_t* to) {
        if (columns_left_ != 0) {
            const uint32_t lane = threadIdx.x % kLanes;
            const uint8_t *codes = codes_, *scales = scales_;
#pragma unroll 2
            for (uint32_t j = 0; j < tiles_; ++j) {
#pragma unroll
                for (uint32_t i = 0; i < kBits / 2; ++i)
                    copy_async<16>(to + i * 16 * kLanes + lane * 16, codes + i * 16 * kLanes);
                if constexpr (kBits == 3) copy_async<8>(to + 16 * kLanes + lane * 8, codes + 16 * kLanes - lane * 8);
                if (lane * 16 < call_.slot_scales) copy_async<16>(to + kCodeBytes<kBits> + lane * 16, scales);
                codes += code_step_, scales += scale_step_, to += call_.slot_bytes;
            }
            next_column();
        }
        end_copies();
    }

    __device__ __forceinline__ uint32_t projection() const {
        return projection_;
    }

  private:
    __device__ __forceinline__ void open(uint32_t projection) {
        for (projection_ = projection; projection_ < call_.count; ++projection_) {
            const Projection& p = call_.projections[kExperts ? projection_ : 0];
            share_ = share_of<kExperts>(call_, p, schedule_);
            if (share_.begin == share_.end) continue;
            open_batch(p, share_.begin);
            if (columns_left_ != 0) return;
        }
    }
    // From there on the first batch that has something for this warp, in this projection.
    __device__ __forceinline__ void open_batch(const Projection& p, uint32_t begin) {
        for (; begin < share_.end; begin = batch_.end) {
            batch_ = batch_at<kExperts>(p, schedule_, begin, share_.end);
            const uint32_t tile = batch_.begin + (threadIdx.x / kLanes >> p.parts), step = kWarps >> p.parts;
            if (tile >= batch_.end) continue;
            tiles_ = (batch_.end - tile + step - 1) >> kWarpsLog - p.parts;
            for (slab_ = 0; slab_ < p.slabs; ++slab_)
                if (open_slab(p, tile)) return;
        }
    }
    __device__ __forceinline__ bool open_slab(const Projection& p, uint32_t tile) {
        const Run run = run_of(p, threadIdx.x / kLanes, slab_);
        columns_left_ = run.count;
        if (columns_left_ == 0) return false;
        const uint32_t product = kExperts ? p.count.divide(tile) : 0, step = (kWarps >> p.parts) * p.all_blocks;
        const uint32_t block =
            (tile - product * p.count.by) * p.all_blocks + slice_ * p.blocks + slab_ * p.slab + run.first;
        const uint8_t* const matrix = p.tiles + (kExperts ? schedule_.expert(product) * p.expert_bytes : 0);
        const uint32_t lane = threadIdx.x % kLanes;
        codes_ = matrix + uint64_t{block} * kCodeBytes<kBits> + lane * 16;
        scales_ = matrix + p.scales_at + uint64_t{block} * call_.scale_bytes + lane * 16;
        code_step_ = step * kCodeBytes<kBits>, scale_step_ = step * call_.scale_bytes;
        return true;
    }
    __device__ __forceinline__ void next_column() {
        const Projection& p = call_.projections[kExperts ? projection_ : 0];
        if (--columns_left_ != 0) {
            codes_ += kCodeBytes<kBits> << p.parts, scales_ += call_.scale_bytes << p.parts;
            return;
        }
        while (++slab_ < p.slabs)
            if (open_slab(p, batch_.begin + (threadIdx.x / kLanes >> p.parts))) return;
        open_batch(p, batch_.end);
        if (columns_left_ == 0) open(projection_ + 1);
    }

    const FewTokens& call_;
    const Schedule& schedule_;
    const uint32_t slice_;
    const uint8_t *codes_ = nullptr, *scales_ = nullptr;  // of this lane
    uint32_t code_step_ = 0, scale_step_ = 0, tiles_ = 0, columns_left_ = 0, slab_ = 0, projection_ = 0;
    Range share_{0, 0}, batch_{0, 0};
};

// kWhole: a block is one group (or a row is), which spares branches and lets loads of all steps begin together.
template <typename T, int kBits, int kN, bool kExperts, bool kWhole>
__global__ __launch_bounds__(kWarps* kLanes, 1) void few_tokens(const __grid_constant__ FewTokens call) {
    constexpr float kUp = 1.0f / kUpper<kBits>;
    constexpr uint32_t kTiles = kTilesOf<kBits, kN, kWhole>, kStages = kStagesOf<kBits, kN, kWhole>;
    QMOE_SHARED_MEMORY(shared, 128);
    const Room room(call, kWarps * kStages * call.tiles * call.slot_bytes, kExperts);
    const uint32_t warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
    const uint32_t stage_bytes = call.tiles * call.slot_bytes;
    uint8_t* const ring = shared + warp * kStages * stage_bytes;
    float4* const partials = reinterpret_cast<float4*>(shared + room.partials);
    float* const weights = reinterpret_cast<float*>(shared + room.weights);
    Schedule schedule(shared + room.schedule, kExperts ? call.tokens * call.choices.top_k.by : 0, call.choices.experts);
    if constexpr (kExperts) {
        // Ids are from before the kernel before this one where that was the first projection, which waited for them.
        if (call.projections[0].is_first) wait_for_previous();
        schedule.make(call.choices, call.most);
    }
    // Of the blocks of threads of a cluster each has another slice of the same tiles.
    const uint32_t slice = kExperts ? 0 : blockIdx.x & ((1u << call.slices) - 1);
    Source<kBits, kExperts> source(call, schedule, slice);
    // Stages from there on have not been asked for. Before activations are asked for, one is: they would wait behind more.
    uint8_t* owed_from = ring;
    uint32_t owed = kStages;
    const auto ask_for = [&](uint32_t stages) {
#pragma unroll 1
        for (; owed != 0 && stages != 0; --owed, --stages) {
            source.copy_column(owed_from);
            owed_from += stage_bytes;
            if (owed_from == ring + kStages * stage_bytes) owed_from = ring;
        }
    };
    ask_for(1);
    if (!kExperts || !call.projections[0].is_first) wait_for_previous();
    let_next_begin();

    uint8_t* stage = ring;
    uint32_t buffer = 0;  // of partial sums
#pragma unroll 1
    for (uint32_t projection = 0; projection < (kExperts ? call.count : 1); ++projection) {
        const Projection& p = call.projections[kExperts ? projection : 0];
        const uint32_t groups = kWhole ? 1 : call.groups, group_steps = kTileSteps / groups;
        if (projection != 0) cooperative_groups::this_grid().sync();
        const Range share = share_of<kExperts>(call, p, schedule);
        // Activations are there of products before `loaded`: `rows` rows, from first_row on.
        uint32_t first_row = 0, rows = call.tokens, loaded = 0, row = 0, tokens = call.tokens;
#pragma unroll 1
        for (uint32_t begin = share.begin; begin < share.end;) {
            const Range batch = batch_at<kExperts>(p, schedule, begin, share.end);
            const uint32_t product = kExperts ? p.count.divide(begin) : 0;
            if constexpr (kExperts) row = schedule.first_row(product), tokens = schedule.first_row(product + 1) - row;
            float sums[kTiles][kN][4];
#pragma unroll
            for (uint32_t j = 0; j < kTiles; ++j)
#pragma unroll
                for (int n = 0; n < kN; ++n) sums[j][n][0] = sums[j][n][1] = sums[j][n][2] = sums[j][n][3] = 0.0f;
            if (call.shared_partials) loaded = 0;
            float2 all_sum[kN] = {};  // of this warp's columns
            // Of this batch, every so many tiles from the first one of this warp on.
            const uint32_t step = kWarps >> p.parts, own_first = batch.begin + (warp >> p.parts);
            const uint32_t tiles =
                own_first < batch.end ? (batch.end - own_first + step - 1) >> kWarpsLog - p.parts : 0;
#pragma unroll 1
            for (uint32_t slab = 0; slab < p.slabs; ++slab) {
                if (p.slabs > 1 || product >= loaded) {
                    if (begin != share.begin || slab != 0) __syncthreads();  // what is there has been used
                    if (slab == 0) {
                        loaded = product + 1;
                        if constexpr (kExperts) {
                            const uint32_t end = p.count.divide(share.end - 1) + 1;
                            first_row = row;
                            while (loaded < end && schedule.first_row(loaded + 1) - first_row <= p.fit) ++loaded;
                            rows = schedule.first_row(loaded) - first_row;
                            if (!p.is_first)
                                for (uint32_t i = threadIdx.x; i < rows; i += blockDim.x)
                                    weights[i] =
                                        load_weight(call.weights, schedule.choice(first_row + i), call.weights_type);
                        }
                    }
                    load_activations<T>(
                        {p.x, p.cols, slice * p.blocks + slab * p.slab, p.slab, p.lines}, shared + room.x, rows,
                        [&](uint32_t i) {
                            if constexpr (!kExperts) return i;
                            const uint32_t choice = schedule.choice(first_row + i);
                            return p.is_first ? call.choices.top_k.divide(choice) : choice;
                        },
                        [&] { ask_for(kStages); });
                    __syncthreads();
                }
                const Run run = run_of(p, warp, slab);
                if (tiles == 0) continue;
#pragma unroll 1
                for (uint32_t i = 0, block = run.first; i < run.count; ++i, block += 1u << p.parts) {
                    // The activations of these columns; tokens that are not there may be any: columns of products do not
                    // mix. Of more tokens there are no registers for all tiles at once.
                    constexpr bool kHeld = kN == 1;
                    const uint8_t* own[kN];
                    uint4 held[kHeld ? kN : 1][kTileSteps];
#pragma unroll
                    for (int n = 0; n < kN; ++n) {
                        own[n] = shared + room.x + (row - first_row + min(8 * n + g, tokens - 1)) * row_bytes(p.slab) +
                                 t * 16 + block * (kTileColumns * 2);
                        if constexpr (kHeld)
#pragma unroll
                            for (uint32_t i = 0; i < kTileSteps; ++i)
                                held[n][i] = *reinterpret_cast<const uint4*>(own[n] + i * 64);
                    }
                    const auto columns = [&](int n, uint32_t step) {
                        if constexpr (kHeld) return held[n][step];
                        return *reinterpret_cast<const uint4*>(own[n] + step * 64);
                    };
                    // What zeros take off, where all are the same; else what they are multiplied by.
                    float2 x_sum[kN];
                    const auto sum_up = [&](uint32_t first, uint32_t steps) {
                        constexpr uint32_t kOnes[4] = {kOne, kOne, kOne, kOne};
#pragma unroll
                        for (int n = 0; n < kN; ++n) {
                            float even[4] = {}, odd[4] = {};
#pragma unroll
                            for (uint32_t i = 0; i < kTileSteps; ++i)
                                if (i >= first && i < first + steps) {
                                    const uint4 x = columns(n, i);
                                    mma<T>(even, kOnes, x.x, x.y);
                                    mma<T>(odd, kOnes, x.z, x.w);
                                }
                            const float factor = call.has_zeros ? 1.0f : -p.zero;
                            x_sum[n] = {(even[0] + odd[0]) * factor, (even[1] + odd[1]) * factor};
                        }
                    };
                    if (kWhole) {
                        sum_up(0, kTileSteps);
#pragma unroll
                        for (int n = 0; n < kN; ++n) all_sum[n].x += x_sum[n].x, all_sum[n].y += x_sum[n].y;
                    }
                    wait_for_copies<kStages - 1>();
                    __syncwarp();  // scales are what other lanes have copied
#pragma unroll
                    for (uint32_t j = 0; j < kTiles; ++j) {
                        if (j >= tiles) break;
                        if constexpr (!kHeld) asm volatile("" ::: "memory");  // or the compiler holds them all the same
                        const uint8_t* const slot = stage + j * call.slot_bytes;
                        uint32_t words[2 * kBits];
                        load_words<kBits>(slot, lane, words);
                        const auto* const scales =
                            reinterpret_cast<const uint32_t*>(slot + kCodeBytes<kBits>) + g * groups;
                        uint32_t of_rows = 0, zeros_of_rows = 0;  // of the one group
                        if (kWhole && !call.row_groups) {
                            of_rows = scales[0];
                            if (call.has_zeros) zeros_of_rows = scales[kTileRows / 2];
                        }
                        float products[2][kN][4];  // of even and odd products
                        const auto products_of = [&]<int kStep>() {
                            const uint32_t group = kWhole ? 0 : kStep / group_steps;
                            if (kStep == 0 || (!kWhole && (kStep & (group_steps - 1)) == 0)) {
                                if (!kWhole) sum_up(kStep, group_steps);
#pragma unroll
                                for (int n = 0; n < kN; ++n) {
                                    // What zeros take off, where all are the same.
                                    products[0][n][0] = call.has_zeros ? 0.0f : x_sum[n].x;
                                    products[0][n][1] = call.has_zeros ? 0.0f : x_sum[n].y;
                                    products[0][n][2] = call.has_zeros ? 0.0f : x_sum[n].x * kUp;
                                    products[0][n][3] = call.has_zeros ? 0.0f : x_sum[n].y * kUp;
                                    products[1][n][0] = products[1][n][1] = products[1][n][2] = products[1][n][3] =
                                        0.0f;
                                }
                            }
                            uint4 x[kN];
#pragma unroll
                            for (int n = 0; n < kN; ++n) x[n] = columns(n, kStep);
                            uint32_t a[4];
                            operands<kBits, 2 * kStep>(words, a);
#pragma unroll
                            for (int n = 0; n < kN; ++n) mma<T>(products[0][n], a, x[n].x, x[n].y);
                            operands<kBits, 2 * kStep + 1>(words, a);
#pragma unroll
                            for (int n = 0; n < kN; ++n) mma<T>(products[1][n], a, x[n].z, x[n].w);
                            if (kStep < kTileSteps - 1 && (kWhole || ((kStep + 1) & (group_steps - 1)) != 0)) return;
                            float2 scale{1.0f, 1.0f}, zero{};
                            if (!call.row_groups) scale = floats_of(kWhole ? of_rows : scales[group], call.bf16_scales);
                            if (call.has_zeros && !call.row_groups)
                                zero =
                                    floats_of(kWhole ? zeros_of_rows : scales[groups * (kTileRows / 2) + group], false);
#pragma unroll
                            for (int n = 0; n < kN; ++n)
#pragma unroll
                                for (int i = 0; i < 4; ++i) {
                                    float value = kSecond<kBits> == 1.0f
                                                      ? products[1][n][i] + products[0][n][i]
                                                      : fmaf(products[1][n][i], kSecond<kBits>, products[0][n][i]);
                                    if (call.has_zeros)
                                        value = fmaf(i < 2 ? -zero.x : -zero.y * kUp,
                                                     i % 2 == 0 ? x_sum[n].x : x_sum[n].y, value);
                                    sums[j][n][i] = fmaf(i < 2 ? scale.x : scale.y, value, sums[j][n][i]);
                                }
                        };
                        products_of.template operator()<0>();
                        products_of.template operator()<1>();
                        products_of.template operator()<2>();
                        products_of.template operator()<3>();
                    }
                    __syncwarp();  // all have read what is overwritten now
                    if (owed != 0 || source.projection() != projection) {
                        if (owed++ == 0) owed_from = stage;
                        end_copies();
                    } else {
                        source.copy_column(stage);
                    }
                    stage += stage_bytes;
                    if (stage == ring + kStages * stage_bytes) stage = ring;
                }
            }
            if (call.shared_partials) __syncthreads();  // sums go where activations have been
#pragma unroll
            for (uint32_t j = 0; j < kTiles; ++j) {
                if (j >= tiles) break;
                float2 zero{};
                if (kWhole && call.row_groups && call.has_zeros)
                    zero = floats_of(reinterpret_cast<const uint32_t*>(
                                         row_scales<kExperts>(call, p, schedule, own_first + j * step) + 32)[g],
                                     false);
                float4* const to = partials + (buffer + j * kWarps + warp) * call.columns * 8;
#pragma unroll
                for (int n = 0; n < kN; ++n)
                    if (4 * n + t < call.columns)
                        to[(4 * n + t) * 8 + g] = {
                            sums[j][n][0] - zero.x * all_sum[n].x, sums[j][n][1] - zero.x * all_sum[n].y,
                            sums[j][n][2] - zero.y * kUp * all_sum[n].x, sums[j][n][3] - zero.y * kUp * all_sum[n].y};
            }
            if (!kExperts && call.slices != 0)
                cluster_barrier();
            else
                __syncthreads();
            // Each warp adds up the sums of tiles of its own, of a cluster every so many.
            const uint32_t parts = 1u << p.parts;
#pragma unroll 1
            for (uint32_t tile = (warp << call.slices) + slice; tile < batch.end - batch.begin;
                 tile += kWarps << call.slices) {
                float2 scale{kBehind<T>, kBehind<T> * kUpper<kBits>};
                const uint32_t of_tile = lane % 8;
                if (call.row_groups) {
                    const auto* const of_rows =
                        reinterpret_cast<const uint32_t*>(row_scales<kExperts>(call, p, schedule, batch.begin + tile));
                    const float2 of_row = floats_of(of_rows[of_tile], call.bf16_scales);
                    scale.x *= of_row.x, scale.y *= of_row.y;
                }
#pragma unroll
                for (int n = 0; n < kN; ++n) {
                    const uint32_t token = 8 * n + lane / 8 * 2;
                    if (token >= tokens) continue;
                    const float4* const from =
                        partials + (buffer + (tile << p.parts)) * call.columns * 8 + 32 * n + lane;
                    float4 sum{};
                    for (uint32_t other = 0; other < (kExperts ? 1 : 1u << call.slices); ++other)
#pragma unroll 4
                        for (uint32_t part = 0; part < parts; ++part) {
                            const float4* const one = from + part * call.columns * 8;
                            const float4 more = kExperts || call.slices == 0 ? *one : load_of_cluster(one, other);
                            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
                        }
                    const uint32_t expert = kExperts ? schedule.expert(product) : 0;
                    const auto put = [&](uint32_t i, float lower, float upper) {
                        if (token + i >= tokens) return;
                        write<T, kExperts>(call, p, expert, batch.begin + tile - product * p.count.by, of_tile,
                                           kExperts ? schedule.choice(row + token + i) : token + i,
                                           kExperts ? weights[row - first_row + token + i] : 1.0f, lower * scale.x,
                                           upper * scale.y);
                    };
                    put(0, sum.x, sum.z);
                    put(1, sum.y, sum.w);
                }
            }
            begin = batch.end;
            buffer = p.buffers == 1 || buffer != 0 ? 0 : call.tiles * kWarps;
            if (p.buffers == 1 && begin < share.end) __syncthreads();
        }
        ask_for(1);
    }
    if (!kExperts && call.slices != 0) cluster_barrier();  // others may be reading here
    if (!kExperts || call.count == 1) return;
    // Sums over the choices of each token.
    cooperative_groups::this_grid().sync();
    const uint32_t cols = call.projections[1].rows, pieces = (cols + 3) / 4;
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < call.tokens * pieces; i += gridDim.x * blockDim.x)
        combine(call.choices, static_cast<const float*>(call.projections[1].y), static_cast<T*>(call.y), i / pieces,
                i % pieces * 4, cols);
}

template <typename T, int kBits, int kN, bool kExperts, bool kWhole>
Status launch_as(FewTokens& call, const Device& device, cudaStream_t stream) noexcept {
    const auto kernel = few_tokens<T, kBits, kN, kExperts, kWhole>;
    QMOE_TRY(runtime_status(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(device.shared))));
    const uint32_t ring = kWarps * kStagesOf<kBits, kN, kWhole> * call.tiles * call.slot_bytes;
    return launch(kernel, call.shares.by << call.slices, kWarps * kLanes, Room(call, ring, kExperts).bytes,
                  call.count == 2, 1u << call.slices, device, stream, call);
}

// As many tiles at a time as there is room for, with as few detours.
template <typename T, int kBits, int kN, bool kExperts, bool kWhole>
bool divide_for(FewTokens& call, const Device& device) noexcept {
    constexpr uint32_t kTiles = kTilesOf<kBits, kN, kWhole>;
    call.most = std::min(call.tokens, 8u * kN);
    const auto fits = [&](uint32_t tiles, bool shared_partials, bool slabs) {
        call.tiles = tiles;
        call.shared_partials = shared_partials;
        return divide(call, kBits, kStagesOf<kBits, kN, kWhole>, kExperts, device, slabs);
    };
    if (fits(kTiles, false, false) || fits(kTiles, true, false)) return true;
    for (const bool slabs : {false, true})
        for (uint32_t tiles = kTiles / 2; tiles > 0; tiles /= 2)
            if (fits(tiles, false, slabs)) return true;
    return false;
}

template <typename T, int kBits, bool kExperts, bool kWhole>
Status launch_whole(FewTokens& call, const Device& device, cudaStream_t stream) noexcept {
    const uint32_t choices = kExperts ? call.tokens * call.choices.top_k.by : 0;
    const bool few = call.tokens <= 8 || (kExperts && choices <= 4 * call.choices.experts);
    if (!few && divide_for<T, kBits, 2, kExperts, kWhole>(call, device))
        return launch_as<T, kBits, 2, kExperts, kWhole>(call, device, stream);
    // Also where more tokens at a time have no room; those of a matrix come as many as were asked for.
    if ((few || kExperts) && divide_for<T, kBits, 1, kExperts, kWhole>(call, device))
        return launch_as<T, kBits, 1, kExperts, kWhole>(call, device, stream);
    return Status::error(Code::kNoKernel, "cuda: shared memory of a block is too small");
}

// Chooses the kernel, by the tokens that a product has most often: kN = 2 reads weights once for up to 16.
template <typename T, int kBits, bool kExperts>
Status launch_few_tokens(FewTokens call, const Device& device, cudaStream_t stream) noexcept {
    if constexpr (!kExperts) {
        // A cluster of two blocks of threads has half of the columns' activations in each.
        constexpr uint64_t kMostBytes = 80 << 10;
        Projection& p = call.projections[0];
        if (device.overlaps && uint64_t{call.tokens} * p.cols * 2 > kMostBytes && p.blocks % 2 == 0 &&
            device.multiprocessors > 1 && has_clusters(few_tokens<T, kBits, 2, false, true>)) {
            call.slices = 1;
            p.blocks /= 2;
        }
    }
    return call.groups == 1 ? launch_whole<T, kBits, kExperts, true>(call, device, stream)
                            : launch_whole<T, kBits, kExperts, false>(call, device, stream);
}

// What few_tokens_<bits>.cu compile.
#define QMOE_FEW_TOKENS(what, bits)                                                                               \
    what template Status launch_few_tokens<__half, bits, false>(FewTokens, const Device&, cudaStream_t) noexcept; \
    what template Status launch_few_tokens<__half, bits, true>(FewTokens, const Device&, cudaStream_t) noexcept;  \
    what template Status launch_few_tokens<__nv_bfloat16, bits, false>(FewTokens, const Device&,                  \
                                                                       cudaStream_t) noexcept;                    \
    what template Status launch_few_tokens<__nv_bfloat16, bits, true>(FewTokens, const Device&, cudaStream_t) noexcept;

}  // namespace qmoe::cuda
