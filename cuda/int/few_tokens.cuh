// `int` times a few tokens, of one matrix or of a layer's experts: as fast as memory gives the codes.
//
// Each block of threads has a share of neighbouring tiles, of one matrix or across those of experts. It works through them
// in batches, as many tiles as there is room for the activations of: most often one. The blocks of a batch are divided
// among the warps evenly, wherever a tile begins. A warp writes what it has all of; of tiles that are cut, the warp that
// has the beginning adds up what the others left in shared memory, in their order. Where not even one product's
// activations have room, a batch is at most a tile a warp, and comes slab by slab of columns: warps divide the tiles, and
// of each every slab. Results depend on nothing but the shape, the tokens and the number of multiprocessors.
//
// Weights come through a ring of a warp's own (ring.cuh), that is filled across batches, experts and projections, and of a
// matrix even before the kernel before this one has ended: what keeps memory busy is the bytes on their way, not registers
// or the number of warps. What comes before the first copy is kept short for the same reason: no division, and no work
// that the host can do.
//
// Both projections of a layer of experts and the sums over a token's choices are one launch, with a barrier of all blocks
// of threads between them, while the ring fetches weights of the next projection; where they differ in format, three.
#pragma once

#include <cooperative_groups.h>

#include "barriers.cuh"
#include "experts/combine.cuh"
#include "experts/gates.cuh"
#include "int/activations.cuh"
#include "launch.cuh"

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

// Blocks begin .. end - 1 of a batch's tiles, one after the other.
struct Run {
    uint32_t begin, end;
};

// What a warp has of a batch of `tiles`; where p comes in slabs, of the one that begins at block `first`.
__device__ __forceinline__ Run run_of(const Projection& p, uint32_t warp, uint32_t tiles, uint32_t first) {
    if (p.fit != 0) {
        const uint32_t all = tiles * p.blocks.by;
        return {warp * all / kWarps, (warp + 1) * all / kWarps};
    }
    const uint32_t team = kWarps / tiles, tile = warp / team, member = warp % team;
    if (tile >= tiles) return {0, 0};
    const uint32_t slab = min(p.slab.by, p.blocks.by - first), begin = tile * p.blocks.by + first;
    return {begin + member * slab / team, begin + (member + 1) * slab / team};
}

// kWhole: a block is one group (or a row is), which spares branches and lets loads of all steps begin together.
template <typename T, int kBits, int kN, bool kExperts, bool kWhole>
__global__ __launch_bounds__(kWarps* kLanes, 1) void few_tokens(const __grid_constant__ FewTokens call) {
    constexpr uint32_t kNone = ~0u;
    QMOE_SHARED_MEMORY(shared, 128);
    const Room<kBits, kN> room(call, kExperts);
    const uint32_t warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
    const uint32_t block_bytes = call.projections[0].block_bytes;
    float4* const cut = reinterpret_cast<float4*>(shared + room.cut);
    float* const weights = reinterpret_cast<float*>(shared + room.weights);
    const uint32_t slot_bytes = call.chunk * block_bytes;
    Ring ring(shared + warp * call.slots * slot_bytes,
              reinterpret_cast<uint64_t*>(shared + room.barriers) + warp * call.slots, slot_bytes, call.slots);
    Schedule schedule(shared + room.schedule, kExperts ? call.tokens * call.choices.top_k.by : 0, call.choices.experts);
    if constexpr (kExperts) {
        // Ids are from before the kernel before this one where that was the first projection, which waited for them.
        const Projection& p = call.projections[0];
        if (p.is_first) wait_for_previous();
        schedule.make(call.choices, call.most, [&] {
            if (p.by_token)
                load_activations<T, kBits>(
                    p, shared + room.x, call.tokens, 0, kWhole ? 1 : p.groups, [](uint32_t row) { return row; }, [] {});
        });
    }

    // Shares are of tiles, product by product, or, where blocks of threads have all experts, tile by tile.
    const auto share_of = [&](const Projection& p) -> Range {
        if constexpr (!kExperts) return Range::share(p.count.by, call.grid);
        const uint32_t products = schedule.products();
        if (!p.all_experts) return Range::share(products * p.count.by, call.grid);
        const Range tiles = Range::share(p.count.by, call.grid);
        return {tiles.begin * products, tiles.end * products};
    };
    struct Place {
        uint32_t product, tile;
    };
    const auto place_of = [&](const Projection& p, uint32_t at) -> Place {
        if constexpr (!kExperts) return {0, at};
        if (p.all_experts) {
            const uint32_t products = schedule.products(), tile = at / products;
            return {at - tile * products, tile};
        }
        const uint32_t product = p.count.divide(at);
        return {product, at - product * p.count.by};
    };
    // As many tiles from `begin` on as one batch has.
    const auto batch_at = [&](const Projection& p, uint32_t begin, uint32_t end) -> Range {
        if constexpr (kExperts) {
            if (p.all_experts) return {begin, begin + schedule.products()};
            const uint32_t product = p.count.divide(begin);
            uint32_t last = product;
            while (p.fit != 0 && (last + 1) * p.count.by < end &&
                   schedule.first_row(last + 2) - schedule.first_row(product) <= p.fit)
                ++last;
            end = min(end, (last + 1) * p.count.by);
        }
        return {begin, p.fit != 0 ? end : min(end, begin + kWarps)};
    };
    const auto tile_at = [&](const Projection& p, uint32_t tile) {
        if constexpr (!kExperts) return p.tiles + tile * p.tile_bytes;
        const Place place = place_of(p, tile);
        return p.tiles + schedule.expert(place.product) * p.expert_bytes + place.tile * p.tile_bytes;
    };

    // What is copied next: blocks of a run, of the tile where it is.
    const uint8_t* next = nullptr;
    uint32_t next_left = 0, next_in_tile = 0, next_tile = 0, next_first = 0, next_projection = 0;
    Range next_share = share_of(call.projections[0]);
    const auto open_next = [&] {
        while (next_projection < call.count) {
            const Projection& p = call.projections[next_projection];
            if (next_share.begin == next_share.end) {
                if (++next_projection < call.count) next_share = share_of(call.projections[next_projection]);
                continue;
            }
            const Range batch = batch_at(p, next_share.begin, next_share.end);
            const Run run = run_of(p, warp, batch.end - batch.begin, next_first);
            const uint32_t tile = p.blocks.divide(run.begin), block = run.begin - tile * p.blocks.by;
            next_left = run.end - run.begin;
            next_in_tile = p.blocks.by - block;
            next_tile = batch.begin + tile;
            next = tile_at(p, next_tile) + block * block_bytes;
            next_first += p.slab.by;
            if (next_first >= p.blocks.by) next_first = 0, next_share.begin = batch.end;
            if (next_left != 0) return;
        }
    };
    // Calls copy(from, bytes) for the next blocks, as many as a slot has or there are of the tile.
    const auto copy_next = [&](const auto& copy) {
        const uint32_t count = min(min(call.chunk, next_in_tile), next_left), bytes = count * block_bytes;
        copy(next, bytes);
        next += bytes, next_left -= count, next_in_tile -= count;
        if (next_left == 0) return open_next();
        if (next_in_tile != 0) return;
        const Projection& p = call.projections[next_projection];
        next_in_tile = p.blocks.by;
        next = tile_at(p, ++next_tile);
    };
    open_next();
    uint32_t filled = 0;
    const auto fill_until = [&](uint32_t slots) {
#pragma unroll 1
        for (; filled < slots && next_left != 0; ++filled)
            copy_next([&](const uint8_t* from, uint32_t bytes) { ring.fill(filled, from, bytes); });
    };
    // Activations wait behind what the ring has asked for before.
    const bool has_waited = kExperts && call.projections[0].is_first;
    if (!has_waited || call.projections[0].by_token) fill_until(has_waited ? call.slots : call.ahead);
    if (!has_waited) wait_for_previous();

#pragma unroll 1
    for (uint32_t projection = 0; projection < call.count; ++projection) {
        const Projection& p = call.projections[projection];
        const uint32_t groups = kWhole ? 1 : p.groups, group_steps = kTileSteps / groups;
        const bool row_groups = kept(p.row_groups), has_zeros = kept(p.has_zeros), bf16_scales = kept(p.bf16_scales);
        if (projection != 0) cooperative_groups::this_grid().sync();
        if (kExperts && p.all_experts && schedule.products() == 0) break;  // sums of nothing
        const Range share = share_of(p);
#pragma unroll 1
        for (uint32_t begin = share.begin; begin < share.end;) {
            const Range batch = batch_at(p, begin, share.end);
            const uint32_t first_product = place_of(p, begin).product,
                           last_product = place_of(p, batch.end - 1).product;
            const uint32_t first_row = kExperts ? schedule.first_row(first_product) : 0;
            const uint32_t rows = kExperts ? schedule.first_row(last_product + 1) - first_row : call.tokens;
            const uint32_t team = p.fit == 0 ? kWarps / (batch.end - batch.begin) : 1;  // warps of a tile, in slabs
            float sums[kN][4] = {};
            uint32_t owned = kNone;  // the tile of which this warp has the beginning but not all
            const auto leave = [&] {
#pragma unroll
                for (int n = 0; n < kN; ++n)
                    cut[(warp * kN + n) * kLanes + lane] = {sums[n][0], sums[n][1], sums[n][2], sums[n][3]};
            };
            // What sums of rows g and g + 8 are to be multiplied by.
            const auto scale_of = [&](uint32_t tile) {
                float2 scale{kBehind<T>, kBehind<T> * kUpper<kBits>};
                if (p.row_groups) {
                    const uint8_t* const behind = tile_at(p, tile) + p.tile_bytes - (p.has_zeros ? 64 : 32) + g * 4;
                    const float2 of_row = floats_of(*reinterpret_cast<const uint32_t*>(behind), p.bf16_scales);
                    scale.x *= of_row.x, scale.y *= of_row.y;
                }
                return scale;
            };
            const auto write_tile = [&](uint32_t tile) {
                const auto [product, own] = place_of(p, tile);
                const uint32_t at = kExperts ? schedule.first_row(product) : 0;
                const uint32_t tokens = kExperts ? schedule.first_row(product + 1) - at : call.tokens;
                const float2 scale = scale_of(tile);
#pragma unroll
                for (int n = 0; n < kN; ++n)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const uint32_t token = 8 * n + 2 * t + i;
                        if (token >= tokens) continue;
                        write<T, kExperts>(call, p, kExperts ? schedule.expert(product) : 0, own, g,
                                           kExperts ? schedule.choice(at + token) : token,
                                           kExperts ? weights[at - first_row + token] : 1.0f, sums[n][i] * scale.x,
                                           sums[n][2 + i] * scale.y);
                    }
            };
            // Of a warp's own sums over choices, (tokens, rows of a tile).
            float* const own_choices = reinterpret_cast<float*>(cut + warp * kN * kLanes);
            const auto add_choices = [&](const Place& place, float2 scale, bool with_bias) {
                const uint32_t at = schedule.first_row(place.product),
                               count = schedule.first_row(place.product + 1) - at;
                const uint32_t row = place.tile * kTileRows + g;
                float2 bias{0.0f, 0.0f};
                if (p.bias != nullptr && with_bias) {
                    const T* const of_expert =
                        static_cast<const T*>(p.bias) + uint64_t{schedule.expert(place.product)} * p.rows;
                    bias.x = row < p.rows ? to_float(of_expert[row]) : 0.0f;
                    bias.y = row + 8 < p.rows ? to_float(of_expert[row + 8]) : 0.0f;
                }
#pragma unroll
                for (int n = 0; n < kN; ++n)
#pragma unroll
                    for (int i = 0; i < 2; ++i)
#pragma unroll 1
                        for (uint32_t other = 0; other < 4; ++other) {  // one by one: a token may have an expert twice
                            const uint32_t column = 8 * n + 2 * other + i;
                            if (column >= count) break;
                            if (t == other) {
                                const float weight = weights[at + column];
                                float* const to = own_choices +
                                                  call.choices.top_k.divide(schedule.choice(at + column)) * kTileRows +
                                                  g;
                                to[0] = fmaf(weight, fmaf(sums[n][i], scale.x, bias.x), to[0]);
                                to[8] = fmaf(weight, fmaf(sums[n][2 + i], scale.y, bias.y), to[8]);
                            }
                            __syncwarp();
                        }
            };
            if (kExperts && p.all_experts) {
                for (uint32_t i = lane; i < call.tokens * kTileRows; i += kLanes) own_choices[i] = 0.0f;
                __syncwarp();
            }
#pragma unroll 1
            for (uint32_t first = 0; first < p.blocks.by; first += p.slab.by) {
                const bool weighs = kExperts && !p.is_first && first == 0 && threadIdx.x < rows;
                const float weight =
                    weighs ? load_weight(call.weights, schedule.choice(first_row + threadIdx.x), call.weights_type)
                           : 0.0f;
                if (!kExperts || (!p.by_token && (!p.all_experts || begin == share.begin))) {
                    const auto row_of = [&](uint32_t row) {
                        if constexpr (!kExperts) return row;
                        const uint32_t choice = schedule.choice(first_row + row);
                        return p.is_first ? call.choices.top_k.divide(choice) : choice;
                    };
                    load_activations<T, kBits>(p, shared + room.x, rows, first, groups, row_of,
                                               [&] { fill_until(call.slots); });
                }
                if (weighs) weights[threadIdx.x] = weight;
                __syncthreads();
                let_next_begin();

                const Run run = run_of(p, warp, batch.end - batch.begin, first);
                const bool leaves = p.fit != 0 && !(kExperts && p.all_experts);
                if (leaves && run.begin == run.end) leave();  // nothing, to be added up like the rest
                uint32_t tile = p.blocks.divide(run.begin);
#pragma unroll 1
                for (uint32_t at = run.begin; at < run.end; ++tile) {
                    const uint32_t tile_begin = tile * p.blocks.by, tile_end = tile_begin + p.blocks.by;
                    const uint32_t piece_begin = at, piece_end = min(run.end, tile_end);
                    uint32_t row = 0, tokens = rows;
                    if constexpr (kExperts) {
                        const uint32_t product = place_of(p, batch.begin + tile).product;
                        row = schedule.first_row(product);
                        tokens = schedule.first_row(product + 1) - row;
                        row -= first_row;
                    }
                    // Tokens that are not there may be any: columns of products do not mix.
                    const auto row_at = [&](uint32_t token) {
                        uint32_t of_x = row + min(token, tokens - 1);
                        if (kExperts && p.by_token) of_x = call.choices.top_k.divide(schedule.choice(first_row + of_x));
                        return shared + room.x + of_x * p.row_bytes;
                    };
                    const uint32_t block = at - tile_begin - first;
                    const uint8_t* own[kN];
                    const float2* own_sums[kN][2];  // of tokens 2 t and the next one
#pragma unroll
                    for (int n = 0; n < kN; ++n) {
                        own[n] = row_at(8 * n + lane % 8) + lane / 8 * 16 + block * (kTileColumns * 2);
#pragma unroll
                        for (int i = 0; i < 2; ++i)
                            own_sums[n][i] = reinterpret_cast<const float2*>(row_at(8 * n + 2 * t + i) +
                                                                             p.slab.by * (kTileColumns * 2)) +
                                             block * groups;
                    }
                    if (p.fit != 0)
#pragma unroll
                        for (int n = 0; n < kN; ++n) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.0f;
                    float2 zero{};
                    const auto set_zero = [&](const void* halves) {
                        zero = floats_of(*static_cast<const uint32_t*>(halves), false);
                        zero.y *= 1.0f / kUpper<kBits>;
                    };
                    if (row_groups && has_zeros) set_zero(tile_at(p, batch.begin + tile) + p.tile_bytes - 32 + g * 4);
#pragma unroll 1
                    while (at < piece_end) {
                        const uint32_t count = min(piece_end - at, call.chunk);
                        const uint8_t* codes = ring.front();
#pragma unroll 1
                        for (uint32_t i = 0; i < count; ++i, codes += block_bytes) {
                            uint32_t words[2 * kBits];
                            load_words<kBits>(codes, lane, words);
                            const auto* scales =
                                reinterpret_cast<const uint32_t*>(codes + 2 * kBits * 4 * kLanes) + g * groups;
                            // Of even and odd products, where their scales differ.
                            constexpr int kChains = kSecond<kBits> == 1.0f ? 1 : 2;
                            float products[kChains][kN][4];
                            float2 scale{1.0f, 1.0f};
                            const auto step = [&]<int kStep>() {
                                if (kStep == 0 || (!kWhole && (kStep & (group_steps - 1)) == 0)) {
                                    if (!row_groups) {
                                        scale = floats_of(*scales, bf16_scales);
                                        if (has_zeros) set_zero(scales + groups * (kTileRows / 2));
                                        ++scales;
                                    }
#pragma unroll
                                    for (int n = 0; n < kN; ++n) {
                                        const float2 first = *own_sums[n][0]++, second = *own_sums[n][1]++;
                                        float(&begin)[4] = products[0][n];
                                        begin[0] = first.x, begin[1] = second.x;
                                        begin[2] = first.y, begin[3] = second.y;
                                        if (has_zeros) {
                                            begin[0] *= -zero.x, begin[1] *= -zero.x;
                                            begin[2] *= -zero.y, begin[3] *= -zero.y;
                                        }
                                        if constexpr (kChains == 2)
                                            products[1][n][0] = products[1][n][1] = products[1][n][2] =
                                                products[1][n][3] = 0.0f;
                                    }
                                }
                                uint4 columns[kN];
#pragma unroll
                                for (int n = 0; n < kN; ++n) columns[n] = load_matrices(own[n] + kStep * 64);
                                uint32_t a[4];
                                operands<kBits, 2 * kStep>(words, a);
#pragma unroll
                                for (int n = 0; n < kN; ++n) mma<T>(products[0][n], a, columns[n].x, columns[n].y);
                                operands<kBits, 2 * kStep + 1>(words, a);
#pragma unroll
                                for (int n = 0; n < kN; ++n)
                                    mma<T>(products[kChains - 1][n], a, columns[n].z, columns[n].w);
                                if (kStep == kTileSteps - 1 || (!kWhole && ((kStep + 1) & (group_steps - 1)) == 0))
#pragma unroll
                                    for (int n = 0; n < kN; ++n)
#pragma unroll
                                        for (int i = 0; i < 4; ++i) {
                                            float value = products[0][n][i];
                                            if constexpr (kChains == 2)
                                                value = fmaf(products[1][n][i], kSecond<kBits>, value);
                                            sums[n][i] = fmaf(i < 2 ? scale.x : scale.y, value, sums[n][i]);
                                        }
                            };
                            step.template operator()<0>();
                            step.template operator()<1>();
                            step.template operator()<2>();
                            step.template operator()<3>();
#pragma unroll
                            for (int n = 0; n < kN; ++n) own[n] += kTileColumns * 2;
                        }
                        at += count;
                        __syncwarp();  // all have read what is overwritten now
                        if (next_left != 0)
                            copy_next([&](const uint8_t* from, uint32_t bytes) { ring.refill(from, bytes); });
                        ring.advance();
                    }
                    if (kExperts && p.all_experts)
                        add_choices(place_of(p, batch.begin + tile), scale_of(batch.begin + tile),
                                    piece_begin == tile_begin);
                    if (!leaves) continue;
                    if (piece_begin == tile_begin && piece_end == tile_end) {
                        write_tile(batch.begin + tile);
                        continue;
                    }
                    owned = piece_begin == tile_begin ? tile : kNone;
                    if (owned == kNone) leave();
                }
                if (p.fit == 0 && first + p.slab.by >= p.blocks.by && warp / team < batch.end - batch.begin) {
                    owned = warp % team == 0 ? warp / team : kNone;
                    if (owned == kNone) leave();
                }
                __syncthreads();
            }
            if (owned != kNone) {
                // The warps behind this one that have some of the tile: of evenly divided blocks those that begin before
                // it ends.
                const uint32_t tiles = batch.end - batch.begin;
                const uint32_t end = p.fit == 0 ? warp + team : min(kWarps, (kWarps * (owned + 1) + tiles - 1) / tiles);
                constexpr uint32_t kAtOnce = 4;  // loads on their way
#pragma unroll 1
                for (uint32_t other = warp + 1; other < end; other += kAtOnce) {
                    float4 more[kAtOnce][kN];
#pragma unroll
                    for (uint32_t j = 0; j < kAtOnce; ++j)
#pragma unroll
                        for (int n = 0; n < kN; ++n)
                            more[j][n] = other + j < end ? cut[((other + j) * kN + n) * kLanes + lane] : float4{};
#pragma unroll
                    for (uint32_t j = 0; j < kAtOnce; ++j)
#pragma unroll
                        for (int n = 0; n < kN; ++n) {
                            sums[n][0] += more[j][n].x, sums[n][1] += more[j][n].y;
                            sums[n][2] += more[j][n].z, sums[n][3] += more[j][n].w;
                        }
                }
                write_tile(batch.begin + owned);
            }
            if (kExperts && p.all_experts) {
                for (uint32_t i = threadIdx.x; i < call.tokens * kTileRows; i += blockDim.x) {
                    float sum = 0.0f;
#pragma unroll
                    for (uint32_t other = 0; other < kWarps; ++other)
                        sum += reinterpret_cast<const float*>(cut + other * kN * kLanes)[i];
                    const uint32_t row = place_of(p, begin).tile * kTileRows + i % kTileRows;
                    if (row < p.rows)
                        static_cast<T*>(call.y)[uint64_t{i / kTileRows} * p.rows + row] = from_float<T>(sum);
                }
            }
            begin = batch.end;
            if (begin < share.end) __syncthreads();
        }
    }
    if (!kExperts || call.count == 1) return;
    // Sums over the choices of each token.
    if (!call.projections[1].all_experts)
        cooperative_groups::this_grid().sync();
    else if (schedule.products() != 0)
        return;
    combine_all<8>(call.choices, static_cast<const float*>(call.projections[1].y), static_cast<T*>(call.y),
                   call.projections[1].rows);
}

}  // namespace qmoe::cuda
