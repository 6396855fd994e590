// `int` times a few tokens, of one matrix or of a layer's experts: as fast as memory gives the codes.
//
// There is one block of threads per multiprocessor, and each has a run of neighbouring tiles, of one matrix or across
// those of experts. It works through them in rounds of at most as many tiles as it has warps. The blocks of a round are
// divided among the warps evenly, wherever a tile begins; a warp keeps the sums of its part of a tile in registers and
// leaves them in shared memory; after a barrier, warp i adds up what there is of tile i, in the order of the parts, and
// writes it. Results depend on nothing but the shape, the tokens and the number of multiprocessors.
//
// Weights come through a ring of a warp's own (ring.cuh), that is filled across rounds and experts, and of a matrix even
// before the kernel before this one has ended: what keeps memory busy is the bytes on their way, not registers or the
// number of warps. Activations are in shared memory in the order in which lanes want them, as many columns as there is
// room for (a slab), beside their sums over groups, which take care of zeros.
#pragma once

#include "int/operands.cuh"
#include "ring.cuh"

namespace qmoe::cuda {

// A launch's part of IntLinear or IntExperts.
struct FewTokens {
    const uint8_t* tiles;  // of expert 0
    uint64_t expert_bytes, tile_bytes;
    const void *x, *bias;
    void* y;
    uint32_t block_bytes, rows, cols, count, blocks;  // rows as stored; count: of tiles of an expert
    uint32_t slab, slots;                             // blocks of a slab; of a ring
    uint32_t tokens;                                  // of x; of experts all, of a matrix at most 8 kN
    uint32_t most;                                    // tokens that one product can have, at most 8 kN
    uint32_t groups;                                  // of a block; 1 where a row is a group
    float zero;
    bool has_zeros, bf16_scales, row_groups;
    // Of experts alone. x has a row per token (first projection), or per choice; y one per choice.
    const int64_t* ids;  // (tokens, top_k)
    const void* weights;
    uint32_t experts, top_k;
    bool is_first;
    OutputType weights_type;
    RowOrder order;
    Gate gate;
};

// What is where in shared memory.
template <int kBits, int kN, uint32_t kWarps>
struct Room {
    uint32_t barriers, partial, x, sums, starts, ids, lists, bytes;

    QMOE_INLINE Room(const FewTokens& p, bool experts) noexcept {
        barriers = kWarps * p.slots * p.block_bytes;
        partial = barriers + kWarps * p.slots * kBarrierBytes;
        x = partial + kWarps * 2 * kN * kLanes * 16;     // [warp][first tile or second][n][lane]
        sums = x + p.slab * p.most * kTileColumns * 2;   // x: [step][token][t], 16 bytes
        starts = sums + p.slab * p.groups * 8 * kN * 4;  // sums: [group][token]
        lists = starts + (experts ? (p.experts + 1 + 3) / 4 * 16 : 0);
        ids = lists + (experts ? kWarps * 8 * kN * 4 : 0);
        bytes = ids + (experts ? p.tokens * p.top_k * 2 : 0);
    }
};

// Eight neighbouring columns of one token as they are, zeros beyond the last column.
template <typename T>
__device__ __forceinline__ uint4 load_columns(const T* row, uint32_t col, uint32_t cols, bool aligned) {
    if (aligned) return col < cols ? *reinterpret_cast<const uint4*>(row + col) : uint4{};
    uint32_t words[4] = {};
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i)
        if (col + i < cols)
            words[i / 2] |= uint32_t{*reinterpret_cast<const uint16_t*>(row + col + i)} << (16 * (i % 2));
    return {words[0], words[1], words[2], words[3]};
}

__device__ __forceinline__ float activated(float v, Activation activation) {
    switch (activation) {
        case Activation::kSilu: return v / (1.0f + __expf(-v));
        case Activation::kGelu: return 0.5f * v * (1.0f + erff(v * 0.70710678f));
        case Activation::kGeluTanh: return 0.5f * v * (1.0f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
        default: return fmaxf(v, 0.0f);
    }
}

__device__ __forceinline__ float load_weight(const void* weights, uint32_t i, OutputType type) {
    switch (type) {
        case OutputType::kFloat32: return static_cast<const float*>(weights)[i];
        case OutputType::kFloat16: return __half2float(static_cast<const __half*>(weights)[i]);
        default: return __bfloat162float(static_cast<const __nv_bfloat16*>(weights)[i]);
    }
}

__device__ __forceinline__ float gated(float gate, float up, const Gate& how) {
    if (!how.clamped) return activated(gate, how.activation) * up;
    gate = fminf(gate, how.limit);
    up = fminf(fmaxf(up, -how.limit), how.limit);
    return (up + 1.0f) * gate / (1.0f + __expf(-how.alpha * gate));
}

// The schedule of a layer's experts: of each the tiles times the products of at most 8 kN tokens, one expert after the
// other, so that a unit is one tile and product.
template <uint32_t kWarps>
__device__ inline void count_units(const FewTokens& p, uint32_t most, uint32_t* starts, uint16_t* ids) {
    const uint32_t choices = p.tokens * p.top_k;
    for (uint32_t e = threadIdx.x; e <= p.experts; e += kWarps * kLanes) starts[e] = 0;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < choices; i += kWarps * kLanes) {
        const int64_t id = p.ids[i];
        const bool here = id >= 0 && id < p.experts;
        ids[i] = here ? static_cast<uint16_t>(id) : uint16_t{0xffff};
        if (here) atomicAdd(starts + id, 1);
    }
    __syncthreads();
    if (threadIdx.x >= kLanes) return;
    uint32_t before = 0;
    for (uint32_t first = 0; first <= p.experts; first += kLanes) {
        const uint32_t e = first + threadIdx.x;
        const uint32_t own = e < p.experts ? (starts[e] + most - 1) / most * p.count : 0;
        uint32_t sum = own;
#pragma unroll
        for (uint32_t d = 1; d < kLanes; d *= 2) {
            const uint32_t below = __shfl_up_sync(~0u, sum, d);
            if (threadIdx.x >= d) sum += below;
        }
        if (e <= p.experts) starts[e] = before + sum - own;
        before += __shfl_sync(~0u, sum, kLanes - 1);
    }
}

// A warp's list of an expert's choices first .. first + most - 1, and how many there are.
__device__ inline uint32_t list_choices(const uint16_t* ids, uint32_t choices, uint32_t expert, uint32_t first,
                                        uint32_t most, uint32_t* list) {
    const uint32_t lane = threadIdx.x % kLanes;
    uint32_t found = 0;
    __syncwarp();
    for (uint32_t base = 0; base < choices && found < first + most; base += kLanes) {
        const bool match = base + lane < choices && ids[base + lane] == expert;
        const uint32_t all = __ballot_sync(~0u, match), at = found + __popc(all & ((1u << lane) - 1)) - first;
        if (match && at < most) list[at] = base + lane;  // at wraps around below first
        found += __popc(all);
    }
    __syncwarp();
    return min(found - first, most);
}

// Some tiles of one matrix and one product's tokens.
struct Round {
    uint32_t unit = 0, tiles = 0;  // the first one, and how many
    uint32_t first_tile = 0, expert = 0, product = 0;
};

// The run of a warp in a round's slab.
template <uint32_t kWarps>
struct Run {
    const uint32_t total;  // blocks
    __device__ __forceinline__ uint32_t begin(uint32_t warp) const { return warp * total / kWarps; }
    // The warp that has a block.
    __device__ __forceinline__ uint32_t owner(uint32_t block) const { return (kWarps * (block + 1) - 1) / total; }
};

// kWhole: a block is one group (or a row is), which spares branches and lets loads of all steps begin together.
template <typename T, int kBits, int kN, uint32_t kWarps, bool kExperts, bool kWhole>
__global__ __launch_bounds__(kWarps* kLanes, 1) void few_tokens(const __grid_constant__ FewTokens p) {
    constexpr uint32_t kThreads = kWarps * kLanes;
    extern __shared__ __align__(128) uint8_t shared[];
    const Room<kBits, kN, kWarps> room(p, kExperts);
    const uint32_t warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
    uint4* const x = reinterpret_cast<uint4*>(shared + room.x);
    float* const sums = reinterpret_cast<float*>(shared + room.sums);
    float4* const partial = reinterpret_cast<float4*>(shared + room.partial);
    uint32_t* const starts = reinterpret_cast<uint32_t*>(shared + room.starts);
    uint32_t* const list = reinterpret_cast<uint32_t*>(shared + room.lists) + warp * 8 * kN;
    uint16_t* const ids = reinterpret_cast<uint16_t*>(shared + room.ids);
    const uint32_t choices = kExperts ? p.tokens * p.top_k : 0;

    // Ids are from before the kernel before this one where this is the second projection, whose kernel waited for them.
    if (kExperts && p.is_first) wait_for_previous(), let_next_begin();
    if constexpr (kExperts) {
        count_units<kWarps>(p, p.most, starts, ids);
        __syncthreads();
    }
    const uint32_t units = kExperts ? starts[p.experts] : p.count;
    const auto cut = [&](uint32_t i) { return static_cast<uint32_t>(uint64_t{units} * i / gridDim.x); };
    const uint32_t begin = cut(blockIdx.x), end = cut(blockIdx.x + 1);
    const auto round_at = [&](uint32_t unit, uint32_t expert) {
        Round round{unit, 0, unit, expert, 0};
        if constexpr (kExperts) {
            while (unit >= starts[round.expert + 1] && round.expert + 1 < p.experts) ++round.expert;
            round.first_tile = unit - starts[round.expert];
            if (round.first_tile >= p.count) round.product = round.first_tile / p.count, round.first_tile %= p.count;
        }
        const uint32_t left = min(p.count - round.first_tile, end - unit);
        round.tiles = left <= kWarps ? left : left / ((left + kWarps - 1) / kWarps);
        return round;
    };

    // What is copied next.
    Ring ring(shared + warp * p.slots * p.block_bytes,
              reinterpret_cast<uint64_t*>(shared + room.barriers) + warp * p.slots, p.block_bytes, p.slots);
    const uint8_t* next = nullptr;
    uint32_t next_left = 0, next_in_tile = 0;  // blocks of the run; of them in this tile
    uint32_t next_slab = 0, next_first = 0;    // blocks of a tile's slab; the first one of the slab behind
    Round next_round = round_at(begin, 0);
    const auto open_next = [&] {
        while (next_round.unit < end) {
            next_slab = min(p.slab, p.blocks - next_first);
            const Run<kWarps> run{next_round.tiles * next_slab};
            const uint32_t from = run.begin(warp), tile = from / next_slab, block = from % next_slab;
            next_left = run.begin(warp + 1) - from;
            next_in_tile = next_slab - block;
            next = p.tiles + (kExperts ? next_round.expert * p.expert_bytes : 0) +
                   (next_round.first_tile + tile) * p.tile_bytes + (next_first + block) * p.block_bytes;
            next_first += next_slab;
            if (next_first == p.blocks) {
                next_first = 0;
                next_round = round_at(next_round.unit + next_round.tiles, next_round.expert);
            }
            if (next_left != 0) return;
        }
    };
    const auto step_next = [&] {
        next += p.block_bytes;
        if (--next_left == 0) return open_next();
        if (--next_in_tile != 0) return;
        next_in_tile = next_slab;
        next += p.tile_bytes - uint64_t{next_slab} * p.block_bytes;
    };
    open_next();
#pragma unroll 1
    for (uint32_t i = 0; i < p.slots && next_left != 0; ++i, step_next()) ring.fill(i, next);
    if (!kExperts || !p.is_first) wait_for_previous(), let_next_begin();

    const bool aligned = p.cols % 8 == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
    const uint32_t groups = kWhole ? 1 : p.groups, group_steps = kTileSteps / groups;
    uint32_t tokens = p.tokens, product_of_x = ~0u, expert_of_x = 0;
#pragma unroll 1
    for (Round round = round_at(begin, 0); round.unit < end; round = round_at(round.unit + round.tiles, round.expert)) {
        float4 totals[kN] = {};  // of tile number `warp` of the round
#pragma unroll 1
        for (uint32_t first = 0; first < p.blocks; first += p.slab) {
            const uint32_t slab = min(p.slab, p.blocks - first);
            if (p.slab < p.blocks || round.product != product_of_x || round.expert != expert_of_x) {
                if constexpr (kExperts)
                    tokens = list_choices(ids, choices, round.expert, round.product * p.most, p.most, list);
                const uint32_t pieces = slab * (kTileColumns / 8), width = 4 * group_steps;
                for (uint32_t i = threadIdx.x; i < pieces * tokens; i += kThreads) {  // whole halves of warps
                    const uint32_t token = i / pieces, piece = i % pieces;
                    uint32_t row = token;
                    if constexpr (kExperts) row = p.is_first ? list[token] / p.top_k : list[token];
                    const uint4 raw = load_columns(static_cast<const T*>(p.x) + uint64_t{row} * p.cols,
                                                   first * kTileColumns + 8 * piece, p.cols, aligned);
                    x[(piece / 4 * tokens + token) * 4 + piece % 4] = {prepared<T>(raw.x), prepared<T>(raw.y),
                                                                       prepared<T>(raw.z), prepared<T>(raw.w)};
                    float sum = 0.0f;
                    for (const uint32_t two : {raw.x, raw.y, raw.z, raw.w}) {
                        const float2 v = floats_of(two, std::is_same_v<T, __nv_bfloat16>);
                        sum += v.x + v.y;
                    }
                    const uint32_t mask = i / kLanes * kLanes + kLanes <= pieces * tokens ? ~0u : 0xffffu;
#pragma unroll
                    for (uint32_t d = 1; d < 16; d *= 2)
                        if (d < width) sum += __shfl_xor_sync(mask, sum, d);
                    if (piece % width == 0) sums[piece / width * 8 * kN + token] = sum;
                }
                product_of_x = round.product, expert_of_x = round.expert;
                __syncthreads();
            }
            const uint4* own[kN];  // tokens that are not there may be any: columns of products do not mix
#pragma unroll
            for (int n = 0; n < kN; ++n) own[n] = x + min(8 * n + g, tokens - 1) * 4 + t;

            const Run<kWarps> run{round.tiles * slab};
            const uint32_t run_end = run.begin(warp + 1);
            uint32_t at = run.begin(warp), tile = at / slab, block = at % slab;
#pragma unroll 1
            for (uint32_t part = 0; at < run_end; ++part, ++tile, block = 0) {
                const uint32_t part_end = min(run_end, (tile + 1) * slab);
                float part_sums[kN][4] = {};
                float2 zero{p.zero, p.zero};
                if (p.row_groups && p.has_zeros)
                    zero = floats_of(
                        *reinterpret_cast<const uint32_t*>(p.tiles + (kExperts ? round.expert * p.expert_bytes : 0) +
                                                           (round.first_tile + tile + 1) * p.tile_bytes - 32 + g * 4),
                        false);
                float products[2][kN][4] = {};  // of even and of odd products
#pragma unroll 1
                for (; at < part_end; ++at, ++block) {
                    const uint8_t* const codes = ring.front();
                    uint32_t words[2 * kBits];
                    load_words<kBits>(codes, lane, words);
                    const auto* const scales =
                        reinterpret_cast<const uint32_t*>(codes + 2 * kBits * 4 * kLanes) + g * groups;
                    uint32_t group = 0;
                    const auto step = [&]<int kStep>() {
                        uint4 columns[kN];
#pragma unroll
                        for (int n = 0; n < kN; ++n) columns[n] = own[n][(block * kTileSteps + kStep) * tokens * 4];
                        uint32_t a[4];
                        operands<kBits, 2 * kStep>(words, a);
#pragma unroll
                        for (int n = 0; n < kN; ++n) mma<T>(products[0][n], a, columns[n].x, columns[n].y);
                        operands<kBits, 2 * kStep + 1>(words, a);
#pragma unroll
                        for (int n = 0; n < kN; ++n) mma<T>(products[1][n], a, columns[n].z, columns[n].w);
                        if (kStep < kTileSteps - 1 && (kWhole || ((kStep + 1) & (group_steps - 1)) != 0)) return;
                        float2 scale{1.0f, 1.0f};
                        if (!p.row_groups) {
                            scale = floats_of(scales[group], p.bf16_scales);
                            if (p.has_zeros) zero = floats_of(scales[8 * groups + group], false);
                        }
#pragma unroll
                        for (int n = 0; n < kN; ++n) {
                            const float2 sum = *reinterpret_cast<const float2*>(
                                sums + (block * groups + group) * 8 * kN + 8 * n + 2 * t);
#pragma unroll
                            for (int i = 0; i < 4; ++i) {
                                const float off = (i < 2 ? zero.x : zero.y) * (i % 2 == 0 ? sum.x : sum.y);
                                const float raw = fmaf(products[1][n][i], kSecond<kBits>, products[0][n][i]);
                                const float value = fmaf(raw, i < 2 ? kBehind<T> : kBehind<T> * kUpper<kBits>, -off);
                                part_sums[n][i] = fmaf(i < 2 ? scale.x : scale.y, value, part_sums[n][i]);
                                products[0][n][i] = products[1][n][i] = 0.0f;
                            }
                        }
                        ++group;
                    };
                    step.template operator()<0>();
                    step.template operator()<1>();
                    step.template operator()<2>();
                    step.template operator()<3>();
                    __syncwarp();  // all have read what is overwritten now
                    if (next_left != 0) ring.refill(next), step_next();
                    ring.advance();
                }
#pragma unroll
                for (int n = 0; n < kN; ++n)
                    partial[((warp * 2 + part) * kN + n) * kLanes + lane] = {part_sums[n][0], part_sums[n][1],
                                                                             part_sums[n][2], part_sums[n][3]};
            }
            __syncthreads();
            if (warp < round.tiles) {
                const uint32_t last = run.owner((warp + 1) * slab - 1);
#pragma unroll 1
                for (uint32_t of = run.owner(warp * slab); of <= last; ++of) {
                    const uint32_t from = run.begin(of);
                    if (from == run.begin(of + 1)) continue;
                    const uint32_t part = from < warp * slab ? 1 : 0;  // what it has of this tile is its second
#pragma unroll
                    for (int n = 0; n < kN; ++n) {
                        const float4 more = partial[((of * 2 + part) * kN + n) * kLanes + lane];
                        totals[n].x += more.x, totals[n].y += more.y, totals[n].z += more.z, totals[n].w += more.w;
                    }
                }
            }
            if (first + slab < p.blocks || round.unit + round.tiles < end) __syncthreads();
        }
        if (warp >= round.tiles) continue;

        const uint32_t tile = round.first_tile + warp;
        float2 scale{1.0f, 1.0f};
        if (p.row_groups)
            scale = floats_of(
                *reinterpret_cast<const uint32_t*>(p.tiles + (kExperts ? round.expert * p.expert_bytes : 0) +
                                                   (tile + 1) * p.tile_bytes - (p.has_zeros ? 64 : 32) + g * 4),
                p.bf16_scales);
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint32_t token = 8 * n + 2 * t + i;
                if (token >= tokens) continue;
                float lower = (i == 0 ? totals[n].x : totals[n].y) * scale.x;
                float upper = (i == 0 ? totals[n].z : totals[n].w) * scale.y;
                const auto* const bias = static_cast<const T*>(p.bias);
                if constexpr (kExperts) {
                    const uint32_t choice = list[token];
                    if (p.order != RowOrder::kPlain) {
                        const uint32_t unit = tile * 8 + g, half = p.rows / 2;
                        if (unit >= half) continue;
                        if (bias != nullptr) {
                            const T* const of = bias + uint64_t{round.expert} * p.rows;
                            const bool halves = p.order == RowOrder::kHalves;
                            lower += static_cast<float>(of[halves ? unit : 2 * unit]);
                            upper += static_cast<float>(of[halves ? half + unit : 2 * unit + 1]);
                        }
                        static_cast<T*>(p.y)[uint64_t{choice} * half + unit] =
                            from_float<T>(gated(lower, upper, p.gate));
                        continue;
                    }
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        const uint32_t row = tile * kTileRows + g + 8 * r;
                        if (row >= p.rows) continue;
                        float value = r == 0 ? lower : upper;
                        if (bias != nullptr) value += static_cast<float>(bias[uint64_t{round.expert} * p.rows + row]);
                        if (p.is_first)
                            static_cast<T*>(p.y)[uint64_t{choice} * p.rows + row] =
                                from_float<T>(activated(value, p.gate.activation));
                        else
                            static_cast<float*>(p.y)[uint64_t{choice} * p.rows + row] =
                                value * load_weight(p.weights, choice, p.weights_type);
                    }
                } else {
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        const uint32_t row = tile * kTileRows + g + 8 * r;
                        if (row >= p.rows) continue;
                        const float value =
                            (r == 0 ? lower : upper) + (bias != nullptr ? static_cast<float>(bias[row]) : 0);
                        static_cast<T*>(p.y)[uint64_t{token} * p.rows + row] = from_float<T>(value);
                    }
                }
            }
    }
}

struct Device {
    uint32_t multiprocessors, shared;  // shared: bytes that a block may have
    bool overlaps;                     // kernels can begin before the one before them has ended

    static Status current(Device& out) noexcept {
        int index = 0, multiprocessors = 0, shared = 0, major = 0;
        cudaError_t error = cudaGetDevice(&index);
        const auto get = [&](int& value, cudaDeviceAttr attribute) {
            if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, index);
        };
        get(multiprocessors, cudaDevAttrMultiProcessorCount);
        get(shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
        get(major, cudaDevAttrComputeCapabilityMajor);
        out = {static_cast<uint32_t>(multiprocessors), static_cast<uint32_t>(shared), major >= 9};
        return runtime_status(error);
    }
};

// Launches `kernel` so that it may begin before the one before it in the stream has ended, where the device can.
template <typename... Arguments>
Status launch(void (*kernel)(Arguments...), dim3 grid, uint32_t threads, uint32_t shared, bool overlaps,
              cudaStream_t stream, std::type_identity_t<Arguments>... arguments) noexcept {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = threads;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = overlaps ? 1 : 0;
    return runtime_status(cudaLaunchKernelEx(&config, kernel, arguments...));
}

inline constexpr uint32_t kMostSlots = 8;

// Divides shared memory between rings and a slab, the rest of which is fixed: all columns where at least two slots are
// left for every warp, and else slabs of the same size beside three slots. False where there is no room at all.
template <int kBits, int kN, uint32_t kWarps>
bool divide(FewTokens& p, bool experts, const Device& device) noexcept {
    using R = Room<kBits, kN, kWarps>;
    p.slots = 2, p.slab = p.blocks;
    if (R(p, experts).bytes > device.shared) {
        p.slots = 3, p.slab = 1;
        if (R(p, experts).bytes > device.shared) return false;
        while (p.slab < p.blocks && (++p.slab, R(p, experts).bytes <= device.shared)) {}
        const uint32_t slabs = ceil_div(p.blocks, p.slab - 1);
        p.slab = ceil_div(p.blocks, slabs);
    }
    while (p.slots < kMostSlots && (++p.slots, R(p, experts).bytes <= device.shared)) {}
    while (R(p, experts).bytes > device.shared) --p.slots;
    return true;
}

template <typename T, int kBits, int kN, uint32_t kWarps, bool kExperts>
Status launch_as(const FewTokens& p, const Device& device, cudaStream_t stream) noexcept {
    const auto kernel = p.groups == 1 ? few_tokens<T, kBits, kN, kWarps, kExperts, true>
                                      : few_tokens<T, kBits, kN, kWarps, kExperts, false>;
    QMOE_TRY(runtime_status(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(device.shared))));
    const uint32_t grid = !kExperts && p.count < device.multiprocessors ? p.count : device.multiprocessors;
    return launch(kernel, grid, kWarps * kLanes, Room<kBits, kN, kWarps>(p, kExperts).bytes, device.overlaps, stream,
                  p);
}

// Chooses the kernel. p.most is the number of tokens that a product may have, of which the kernel may take fewer where
// p is of experts.
template <typename T, int kBits, bool kExperts>
Status launch_few_tokens(FewTokens p, const Device& device, cudaStream_t stream) noexcept {
    if (p.most <= 8) {
        if (divide<kBits, 1, 32>(p, kExperts, device)) return launch_as<T, kBits, 1, 32, kExperts>(p, device, stream);
        if (divide<kBits, 1, 16>(p, kExperts, device)) return launch_as<T, kBits, 1, 16, kExperts>(p, device, stream);
    } else if (divide<kBits, 2, 16>(p, kExperts, device)) {
        return launch_as<T, kBits, 2, 16, kExperts>(p, device, stream);
    }
    return Status::mismatch(Code::kNoKernel, "cuda: shared memory of a block is too small", 0,
                            Room<kBits, 1, 16>(p, kExperts).bytes, device.shared);
}

// What few_tokens_<bits>.cu compile.
#define QMOE_FEW_TOKENS(what, bits)                                                                               \
    what template Status launch_few_tokens<__half, bits, false>(FewTokens, const Device&, cudaStream_t) noexcept; \
    what template Status launch_few_tokens<__half, bits, true>(FewTokens, const Device&, cudaStream_t) noexcept;  \
    what template Status launch_few_tokens<__nv_bfloat16, bits, false>(FewTokens, const Device&,                  \
                                                                       cudaStream_t) noexcept;                    \
    what template Status launch_few_tokens<__nv_bfloat16, bits, true>(FewTokens, const Device&, cudaStream_t) noexcept;

}  // namespace qmoe::cuda
