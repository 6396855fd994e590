// `ternary` times a few tokens, of one matrix or of a layer's experts: work for nonzeros alone.
//
// Weights come as streams of symbols (formats/ternary_streams.h): how far from one nonzero to the next, and its sign.
// Activations lie in shared memory by slot, those of all tokens of a product beside each other, so that a symbol is taken
// apart once, costs one load, and two additions per token: y = (high - low) / 2 * (plus - minus) + (high + low) / 2 *
// (plus + minus), where plus and minus are sums of activations. What limits this is shared memory: the loads of a warp go
// to 32 places that have nothing to do with each other, of which three or four are in the same bank.
//
// A warp takes a group of rows at a time, S lanes a row. Each block of threads has a share of neighbouring groups, of one
// matrix or across those of experts, and brings the activations of as many products as there is room for. Both
// projections of a layer of experts and the sums over a token's choices are one launch, with barriers of all blocks of
// threads between them; where they differ in bits, three. Results depend on nothing but the shape and the tokens.
#pragma once

#include <cooperative_groups.h>

#include "experts/combine.cuh"
#include "experts/gates.cuh"
#include "experts/schedule.cuh"
#include "launch.cuh"
#include "ternary/task.cuh"

namespace qmoe::cuda {

struct TernaryProjection : TernaryView {
    const void *x, *bias;
    void* y;
    Divisor groups;  // of a matrix
    uint32_t fit;    // products that there is room for the activations of
    bool is_first;   // of experts: x has a row per token; else x is what the first one has left, by choice
};

struct TernaryFewTokens {
    TernaryProjection projections[2];
    uint32_t begin, end;  // which of them this launch is: of a matrix the first one, of experts both or one
    uint32_t tokens;      // of x; of a matrix at most kM
    Divisor grid;
    // Of experts alone.
    Choices choices;
    const void* weights;
    OutputType weights_type;
    Gate gate;
    void* y;
};

// More tokens than these need registers of two warps each.
template <int kM>
inline constexpr uint32_t kTernaryWarps = kM > 4 ? 16 : 32;

// What a slot has of each token: float32 of one token, else what x is made of, of which a load brings four or eight.
template <typename T, int kM>
inline constexpr uint32_t kSlotBytes = kM == 1 ? 4 : kM * sizeof(T);

// Activations in shared memory begin here: behind the schedule.
QMOE_INLINE uint32_t ternary_x_at(const TernaryFewTokens& call, bool experts) noexcept {
    if (!experts) return 0;
    return (Schedule::bytes(call.tokens * call.choices.top_k.by, call.choices.experts) + 15) / 16 * 16;
}

// Two numbers of 16 bits as floats.
template <typename T>
__device__ __forceinline__ float2 two_floats(uint32_t pair) {
    if constexpr (std::is_same_v<T, __half>)
        return __half22float2(*reinterpret_cast<const __half2*>(&pair));
    else
        return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

// x[slot] of all tokens.
template <typename T, int kM>
__device__ __forceinline__ void load_slot(const uint8_t* at, float (&out)[kM]) {
    if constexpr (kM == 1) {
        out[0] = *reinterpret_cast<const float*>(at);
    } else {
        uint32_t pairs[kM / 2];
        if constexpr (kM == 4) {
            const uint2 raw = *reinterpret_cast<const uint2*>(at);
            pairs[0] = raw.x, pairs[1] = raw.y;
        } else {
            const uint4 raw = *reinterpret_cast<const uint4*>(at);
            pairs[0] = raw.x, pairs[1] = raw.y, pairs[2] = raw.z, pairs[3] = raw.w;
        }
#pragma unroll
        for (int i = 0; i < kM / 2; ++i) {
            const float2 two = two_floats<T>(pairs[i]);
            out[2 * i] = two.x, out[2 * i + 1] = two.y;
        }
    }
}

// Goes through the symbols of a quad from slot `next` on, which it moves behind the last one: adds what is there to `both`,
// and with its sign to `signed_`.
template <typename T, int kGap, int kM>
__device__ __forceinline__ void walk(const uint4& quad, const uint8_t* x, uint32_t& next, float (&signed_)[kM],
                                     float (&both)[kM]) {
    using Symbols = TernarySymbols<kGap>;
    const Symbols symbols(quad);
#pragma unroll
    for (int i = 0; i < Symbols::kCount; ++i) {
        const uint32_t symbol = symbols[i];
        next += Symbols::gap(symbol);
        const float sign = __uint_as_float((symbol << kGap & 0x80000000u) | 0x3f800000u);
        float values[kM];
        load_slot<T, kM>(x + (next + i) * kSlotBytes<T, kM>,
                         values);  // every symbol goes one further: i of them so far
#pragma unroll
        for (int m = 0; m < kM; ++m) {
            signed_[m] = fmaf(sign, values[m], signed_[m]);
            both[m] += values[m];
        }
    }
    next += Symbols::kCount;
}

// What a first projection has left of a choice, for the second one's column.
__device__ __forceinline__ float second_input(const TernaryFewTokens& call, uint32_t choice, uint32_t col) {
    const TernaryProjection& first = call.projections[0];
    const float* const row = static_cast<const float*>(first.y) + uint64_t{choice} * first.rows;
    if (first.order == RowOrder::kPlain) return activated(row[col], call.gate.activation);
    const bool halves = first.order == RowOrder::kHalves;
    return gated(row[halves ? col : 2 * col], row[halves ? first.rows / 2 + col : 2 * col + 1], call.gate);
}

// Brings the activations of one product to `x`, by slot; those of tokens that it does not have are zeros.
template <typename T, int kGap, int kM, typename Load>
__device__ __forceinline__ void bring(const TernaryProjection& p, uint8_t* x, uint32_t tokens, const Load& load) {
    constexpr uint32_t kStep = 1u << kGap, kAtOnce = 2;
    const auto put = [&](uint32_t slot, uint32_t m, float value) {
        uint8_t* const at = x + slot * kSlotBytes<T, kM>;
        if constexpr (kM == 1)
            *reinterpret_cast<float*>(at) = value;
        else
            reinterpret_cast<T*>(at)[m] = from_float<T>(value);
    };
#pragma unroll 1
    for (uint32_t first = threadIdx.x; first < p.cols; first += kAtOnce * blockDim.x) {
        float values[kAtOnce][kM];
#pragma unroll
        for (uint32_t j = 0; j < kAtOnce; ++j)
#pragma unroll
            for (uint32_t m = 0; m < kM; ++m) {
                const uint32_t col = first + j * blockDim.x;
                values[j][m] = m < tokens && col < p.cols ? load(m, col) : 0.0f;
            }
#pragma unroll
        for (uint32_t j = 0; j < kAtOnce; ++j) {
            const uint32_t col = first + j * blockDim.x;
            if (col >= p.cols) break;
#pragma unroll
            for (uint32_t m = 0; m < kM; ++m) put(col + col / (kStep - 1), m, values[j][m]);
        }
    }
    const uint32_t between = p.slots / kStep;  // empty slots among the columns
    for (uint32_t i = threadIdx.x; i < between + p.all_slots - p.slots; i += blockDim.x)
#pragma unroll
        for (uint32_t m = 0; m < kM; ++m) put(i < between ? i * kStep + kStep - 1 : p.slots + i - between, m, 0.0f);
}

template <typename T, int kGap, int kM, bool kExperts>
__global__ __launch_bounds__(kTernaryWarps<kM>* kLanes,
                             1) void ternary_few_tokens(const __grid_constant__ TernaryFewTokens call) {
    constexpr uint32_t kWarps = kTernaryWarps<kM>;
    QMOE_SHARED_MEMORY(shared, 16);
    const uint32_t warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    uint8_t* const activations = shared + ternary_x_at(call, kExperts);
    Schedule schedule(shared, kExperts ? call.tokens * call.choices.top_k.by : 0, call.choices.experts);
    const auto share_of = [&](const TernaryProjection& p) {
        return Range::share((kExperts ? schedule.products() : 1) * p.groups.by, call.grid);
    };
    TernaryTask task{};
    uint32_t open = ~0u;  // the group that it is of, before its turn has come
    const auto look = [&](const TernaryProjection& p, uint32_t unit) {
        const uint32_t product = kExperts ? p.groups.divide(unit) : 0;
        task.look(p, kExperts ? schedule.expert(product) : 0, unit - product * p.groups.by);
    };
    // Weights do not depend on what came before: a projection's first ones are asked for before its activations are there.
    const auto open_first = [&](const TernaryProjection& p) {
        const Range share = share_of(p);
        open = share.begin + warp;
        if (open < share.end) look(p, open), task.fetch(p);
    };
    if constexpr (!kExperts) open_first(call.projections[0]);
    wait_for_previous();
    let_next_begin();
    if constexpr (kExperts) schedule.make(call.choices, FixedDivisor<kM>{}, [] {});

#pragma unroll 1
    for (uint32_t projection = call.begin; projection < call.end; ++projection) {
        if (projection > call.begin) cooperative_groups::this_grid().sync();
        const TernaryProjection& p = call.projections[projection];
        const uint32_t product_bytes = p.all_slots * kSlotBytes<T, kM>, segment = lane & (p.segments - 1);
        Range share = share_of(p);
#pragma unroll 1
        while (share.begin < share.end) {
            const uint32_t first = kExperts ? p.groups.divide(share.begin) : 0;
            const uint32_t last = kExperts ? min(p.groups.divide(share.end - 1), first + p.fit - 1) : 0;
            const uint32_t end = kExperts ? min(share.end, (last + 1) * p.groups.by) : share.end;
            const uint32_t own = share.begin + warp;
            const bool closed = own < end && own != open;
            if (closed) look(p, own);
            __syncthreads();  // all are done with the activations before
#pragma unroll 1
            for (uint32_t product = first; product <= last; ++product) {
                uint8_t* const x = activations + (product - first) * product_bytes;
                if constexpr (kExperts) {
                    const uint32_t row = schedule.first_row(product), rows = schedule.first_row(product + 1) - row;
                    bring<T, kGap, kM>(p, x, rows, [&](uint32_t m, uint32_t col) {
                        const uint32_t choice = schedule.choice(row + m);
                        if (!p.is_first) return to_float(from_float<T>(second_input(call, choice, col)));
                        return to_float(
                            static_cast<const T*>(p.x)[uint64_t{call.choices.top_k.divide(choice)} * p.cols + col]);
                    });
                } else {
                    bring<T, kGap, kM>(p, x, call.tokens, [&](uint32_t m, uint32_t col) {
                        return to_float(static_cast<const T*>(p.x)[uint64_t{m} * p.cols + col]);
                    });
                }
            }
            if (closed) task.fetch(p);
            __syncthreads();
#pragma unroll 1
            for (uint32_t unit = own; unit < end; unit += kWarps) {
                if (unit != own) look(p, unit), task.fetch(p);
                const uint32_t product = kExperts ? p.groups.divide(unit) : 0;
                const uint8_t* const x = activations + (product - first) * product_bytes;
                float signed_[kM] = {}, both[kM] = {};
#pragma unroll 1
                for (; task.k < task.k_end; ++task.k) {
                    const uint4 fetched = task.quad(task.k + 3);
                    walk<T, kGap, kM>(task.now, x, task.next, signed_, both);
                    task.now = task.ahead, task.ahead = task.further, task.further = fetched;
                }
                __syncwarp();
                const float high = __uint_as_float(task.levels << 16), low = __uint_as_float(task.levels & 0xffff0000u);
                const uint32_t row = task.row();
#pragma unroll
                for (int m = 0; m < kM; ++m) {
                    float sum = fmaf(0.5f * (high - low), signed_[m], 0.5f * (high + low) * both[m]);
                    for (uint32_t other = p.segments / 2; other > 0; other /= 2)
                        sum += __shfl_xor_sync(~0u, sum, other);
                    if (segment != (m & (p.segments - 1)) || row >= p.rows) continue;
                    const T* const bias = static_cast<const T*>(p.bias);
                    if constexpr (kExperts) {
                        const uint32_t first_row = schedule.first_row(product);
                        if (first_row + m >= schedule.first_row(product + 1)) continue;
                        const uint32_t choice = schedule.choice(first_row + m);
                        if (bias != nullptr) sum += to_float(bias[uint64_t{schedule.expert(product)} * p.rows + row]);
                        if (!p.is_first) sum *= load_weight(call.weights, choice, call.weights_type);
                        static_cast<float*>(p.y)[uint64_t{choice} * p.rows + row] = sum;
                    } else {
                        if (m >= call.tokens) continue;
                        if (bias != nullptr) sum += to_float(bias[row]);
                        static_cast<T*>(p.y)[uint64_t{static_cast<uint32_t>(m)} * p.rows + row] = from_float<T>(sum);
                    }
                }
            }
            share.begin = end;
        }
        if (kExperts && projection + 1 < call.end) open_first(call.projections[projection + 1]);
    }
    if (!kExperts || call.end - call.begin == 1) return;
    cooperative_groups::this_grid().sync();
    combine_all<8>(call.choices, static_cast<const float*>(call.projections[1].y), static_cast<T*>(call.y),
                   call.projections[1].rows);
}

// Divides shared memory. Returns how much a block takes of it; 0 where there is no room for one product's activations.
template <typename T, int kM>
uint32_t divide_ternary(TernaryFewTokens& call, bool experts, const Device& device) noexcept {
    constexpr uint32_t kMostProducts = 4;  // what a share is of, most often
    const uint32_t x_at = ternary_x_at(call, experts), room = device.shared > x_at ? device.shared - x_at : 0;
    uint32_t x_bytes = 0;
    for (uint32_t i = call.begin; i < call.end; ++i) {
        TernaryProjection& p = call.projections[i];
        const uint32_t each = p.all_slots * kSlotBytes<T, kM>, fit = room / each;
        if (fit == 0) return 0;
        p.fit = !experts ? 1 : fit < kMostProducts ? fit : kMostProducts;
        x_bytes = p.fit * each > x_bytes ? p.fit * each : x_bytes;
    }
    return x_at + x_bytes;
}

template <typename T, int kGap, int kM, bool kExperts>
Status launch_ternary_as(TernaryFewTokens& call, uint32_t shared, const Device& device, cudaStream_t stream) noexcept {
    const auto kernel = ternary_few_tokens<T, kGap, kM, kExperts>;
    QMOE_TRY(runtime_status(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(device.shared))));
    call.grid = Divisor(device.multiprocessors);
    return launch(kernel, device.multiprocessors, kTernaryWarps<kM> * kLanes, shared, call.end - call.begin == 2,
                  device, stream, call);
}

// Chooses how many tokens a product has: a load of four is as fast as one of two; of eight it takes more than twice as long,
// but experts' products of eight bring activations once where two of four would twice.
template <typename T, int kGap, bool kExperts>
Status launch_ternary(TernaryFewTokens call, const Device& device, cudaStream_t stream) noexcept {
    if constexpr (kExperts) {
        const bool many = call.tokens * call.choices.top_k.by > 2 * call.choices.experts;
        if (const uint32_t shared = many ? divide_ternary<T, 8>(call, true, device) : 0; shared != 0)
            return launch_ternary_as<T, kGap, 8, true>(call, shared, device, stream);
    }
    if (const uint32_t shared = call.tokens > 1 ? divide_ternary<T, 4>(call, kExperts, device) : 0; shared != 0)
        return launch_ternary_as<T, kGap, 4, kExperts>(call, shared, device, stream);
    if (const uint32_t shared = divide_ternary<T, 1>(call, kExperts, device); shared != 0)
        return launch_ternary_as<T, kGap, 1, kExperts>(call, shared, device, stream);
    return Status::error(Code::kNoKernel, "cuda: shared memory of a block is too small");
}

// Tokens of one launch of a linear layer that fit, at most 4.
template <typename T>
uint32_t tokens_at_once(TernaryFewTokens call, const Device& device) noexcept {
    return divide_ternary<T, 4>(call, false, device) != 0 ? 4 : 1;
}

// What few_tokens_<gap>.cu compile.
#define QMOE_TERNARY_FEW_TOKENS(what, gap)                                                                           \
    what template Status launch_ternary<__half, gap, false>(TernaryFewTokens, const Device&, cudaStream_t) noexcept; \
    what template Status launch_ternary<__half, gap, true>(TernaryFewTokens, const Device&, cudaStream_t) noexcept;  \
    what template Status launch_ternary<__nv_bfloat16, gap, false>(TernaryFewTokens, const Device&,                  \
                                                                   cudaStream_t) noexcept;                           \
    what template Status launch_ternary<__nv_bfloat16, gap, true>(TernaryFewTokens, const Device&,                   \
                                                                  cudaStream_t) noexcept;

}  // namespace qmoe::cuda
