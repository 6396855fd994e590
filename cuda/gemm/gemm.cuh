// Matrices in tiles times many tokens, of one matrix or of a layer's experts: tensor cores, each weight made an operand
// once for up to 256 tokens.
//
// A *unit* of work is a panel of rows times the tokens of a product. Groups of four warps multiply, each 64 rows of the
// panel: from Hopper on, weights are the operand in registers, made from codes while the products before run, and
// activations the one in shared memory. Four more warps bring both: one of them codes, block by block of 128 columns, as
// they are in memory, three (or the copy engine, asked by one) activations, in stages of 64 columns.
//
// Panels are *tall*, four groups, for products of up to 64 tokens, or *wide*, two groups, of up to 256. What limits wide
// ones is what the second-level cache gives: pairs of blocks of threads, a cluster, have neighbouring panels and the same
// tokens, and each brings half of the activations for both. Such pairs, or single blocks of threads, are *teams*. A matrix
// and few tokens have the panels that are predicted to take less time. There is a kernel for each number of tokens that
// products are multiplied as.
//
// Teams take whole units in turns as long as there are enough, and share the blocks of columns of the last ones evenly,
// wherever a unit begins, unless whole units leave as few idle. Of a unit that is cut, the team that has its beginning adds
// up what the others leave in memory, in their order; those come earlier in the grid, so that what is waited for runs or
// has run. Results depend on nothing but the shape, the tokens and the number of multiprocessors.
//
// A layer of experts is two launches: a schedule, and both projections and the sums over a token's choices, with barriers
// of all blocks of threads between these. Where panels are wide, a launch between them puts activations in the schedule's
// order.
//
// `Codes` is what a format is to all this: see int/weights.cuh.
#pragma once

#include <cooperative_groups.h>

#include <algorithm>
#include <atomic>
#include <chrono>

#include "experts/combine.cuh"
#include "gemm/bring.cuh"
#include "gemm/gather.cuh"
#include "gemm/multiply.cuh"
#include "launch.cuh"

namespace qmoe::cuda {

// What all threads do behind a projection of experts.
template <typename T>
__device__ __forceinline__ void finish_projection(const Gemm& call, uint32_t projection) {
    if (projection == 0 && call.end == 1) return;
    if (projection == 1 && call.last_expert < call.choices.experts) return;  // more launches follow
    // The next projection brings in boxes what this one has written.
    publish_memory_to_async();
    cooperative_groups::this_grid().sync();
    publish_memory_to_async();
    if (projection == 0) return;
    const GemmProjection& p = call.projections[1];
    combine_all<4>(call.choices, static_cast<const T*>(p.y), static_cast<T*>(call.y), p.rows);
}

template <typename T, class Codes, class Tile>
__device__ __forceinline__ void gemm_of_block(const Gemm& call, uint8_t* shared) {
    const GemmRoom<Tile> room(call);
    if (threadIdx.x < kLanes) {
        GemmRing::of_x(call, shared, room).init(GemmActivations<T, Tile>::kArrivals, Tile::kWarps * Tile::kCluster);
        GemmRing::of_codes(call, shared, room).init(kCopyArrivals, Tile::kWarps);
        publish_barriers();
    }
    let_next_begin();
    if constexpr (Tile::kCluster > 1)
        sync_cluster();
    else
        __syncthreads();
    // Codes of a linear layer have been there for long; those who multiply wait before they write.
    const bool brings_x = threadIdx.x >= kLanes && threadIdx.x < Tile::kCopiers;
    if (Tile::kExperts || call.codes_are_new || brings_x) wait_for_previous();
    uint32_t* const table = reinterpret_cast<uint32_t*>(shared + room.products);
    if constexpr (Tile::kExperts) {
        GemmProducts<true>::load(call, table);
        __syncthreads();
    }
    const GemmProducts<Tile::kExperts> products(call, table);
    const auto of_projections = [&](auto&& work_on) {
        if constexpr (Tile::kExperts) {
            for (uint32_t i = call.begin; i < call.end; ++i) {
                const GemmProjection& p = call.projections[i];
                work_on(p, GemmWork<Tile>(call, p, products.count()));
                finish_projection<T>(call, i);
            }
        } else {
            const GemmProjection& p = call.projections[call.begin];
            work_on(p, GemmWork<Tile>(call, p, products.count()));
        }
    };
    if (threadIdx.x >= Tile::kCopiers) {
        take_registers<Tile::kTaken>();
        GemmMultiplier<T, Codes, Tile> multiplier(call, shared, room);
        of_projections([&](const GemmProjection& p, const GemmWork<Tile>& work) { multiplier.run(p, work, products); });
    } else {
        give_registers<Tile::kGiven>();
        if (threadIdx.x < kLanes) {
            GemmRing ring = GemmRing::of_codes(call, shared, room);
            of_projections([&](const GemmProjection& p, const GemmWork<Tile>& work) {
                bring_codes(p, work, products, call.first_expert, ring);
            });
        } else {
            GemmActivations<T, Tile> activations(call, GemmRing::of_x(call, shared, room));
            of_projections(
                [&](const GemmProjection& p, const GemmWork<Tile>& work) { activations.bring(p, work, products); });
        }
    }
    if constexpr (Tile::kCluster > 1) sync_cluster();  // others may still arrive here
}

template <typename T, class Codes, class Tile>
__global__ __launch_bounds__(Tile::kThreads, 1) void gemm(const __grid_constant__ Gemm call) {
    QMOE_SHARED_MEMORY(swizzled, 1024);
    if constexpr (Tile::kCluster == 1 || kHasClusters) gemm_of_block<T, Codes, Tile>(call, swizzled);
}

// Tells the host, which asks how many threads a block of it may have, whether this device has the code for warpgroups.
inline constexpr uint32_t kWithWarpgroups = 64, kWithoutWarpgroups = 32;
static __global__ __launch_bounds__(kHasWarpgroups ? kWithWarpgroups : kWithoutWarpgroups) void which_code() {}

// A launch that is being prepared: tiles of tokens, and what the workspace holds.
struct GemmPlan {
    uint32_t most = 0;
    bool wide = false, has_boxes = false;

    // For a matrix: as few products as there are, all of them alike.
    Status make(uint64_t rows, uint64_t cols, uint64_t tokens, const Device& device) noexcept {
        QMOE_TRY(ask_device());
        const auto smallest = [&](std::initializer_list<uint32_t> sizes) {
            const uint64_t products = ceil_div(tokens, uint64_t{*(sizes.end() - 1)}), each = ceil_div(tokens, products);
            for (const uint32_t size : sizes)
                if (each <= size) return size;
            return *(sizes.end() - 1);
        };
        const auto cycles = [&](uint32_t groups, uint32_t cluster) {
            const uint64_t units =
                ceil_div(rows, uint64_t{groups * cluster * GemmShape::kGroupRows}) * ceil_div(tokens, uint64_t{most});
            return GemmShares::of(static_cast<uint32_t>(units),
                                  static_cast<uint32_t>(ceil_div(cols, uint64_t{kTileColumns})),
                                  device.multiprocessors / cluster, most, groups)
                .cycles;
        };
        constexpr uint32_t kClusterCycles = 1500;  // to begin and to end
        most = smallest({32, 64});
        if (!has_boxes) return {};
        wide = tokens > GemmTall::kMostTokens || cycles(GemmWide::kGroups, GemmWide::kCluster) + kClusterCycles <
                                                     cycles(GemmTall::kGroups, GemmTall::kCluster);
        if (wide && tokens > GemmTall::kMostTokens) most = smallest({128, 192, 256});
        return {};
    }
    // For a layer's experts, most of which shall be one product. Measured on an H100.
    Status make_for_experts(uint64_t choices, uint64_t experts) noexcept {
        QMOE_TRY(ask_device());
        const uint64_t about = choices / std::max<uint64_t>(std::min(choices, experts), 1);
        wide = has_boxes && about > 80;
        most = wide ? about > 160 ? 256 : 128 : about > 24 ? 64 : 32;
        return {};
    }
    uint64_t flags_bytes(const Device& device) const noexcept {
        return device.multiprocessors * GemmTall::kGroups * sizeof(uint64_t);
    }
    uint64_t sums_bytes(const Device& device) const noexcept {
        const uint64_t rows = (wide ? GemmWide::kGroups : GemmTall::kGroups) * GemmShape::kGroupRows;
        return flags_bytes(device) + uint64_t{device.multiprocessors} * most * rows * sizeof(float);
    }
    uint64_t gathered_bytes_of(uint64_t choices, uint64_t cols) const noexcept {
        return wide ? gathered_bytes(choices, cols) : 0;
    }
    // `room`: sums_bytes() of the workspace, 16-byte aligned.
    void put(Gemm& call, void* room, const Device& device) const noexcept {
        call.most = most;
        call.wide = wide;
        call.has_boxes = has_boxes;
        call.flags = static_cast<uint64_t*>(room);
        call.partials = reinterpret_cast<float*>(static_cast<uint8_t*>(room) + flags_bytes(device));
        static std::atomic<uint64_t> launches{
            static_cast<uint64_t>(std::chrono::system_clock::now().time_since_epoch().count())};
        call.nonce = (launches.fetch_add(1) * 2 + 1) * 0x9e3779b97f4a7c15;  // odd: never what flags are set back to
    }

  private:
    Status ask_device() noexcept {
        uint32_t threads = 0;
        QMOE_TRY(most_threads(which_code, threads));
        has_boxes = TensorMap::are_there(threads == kWithWarpgroups);
        return {};
    }
};

// Divides shared memory between codes and activations. What keeps memory busy are codes on their way.
template <class Tile>
Status divide(Gemm& call, const Device& device) noexcept {
    call.codes_bytes = 0;
    for (uint32_t i = call.begin; i < call.end; ++i)
        call.codes_bytes = std::max(call.codes_bytes, Tile::kTiles * call.projections[i].block_bytes);
    for (call.x_stages = call.most > GemmTall::kMostTokens ? 6 : Tile::kMostStages;
         call.x_stages >= Tile::kFewestXStages; --call.x_stages) {
        call.codes_stages = 0;
        const uint32_t fixed = GemmRoom<Tile>(call).bytes;
        const uint32_t left = fixed < device.shared ? device.shared - fixed : 0;
        call.codes_stages = std::min(left / call.codes_bytes, Tile::kMostStages);
        if (call.codes_stages >= 2 || (call.codes_stages == 1 && call.x_stages == Tile::kFewestXStages)) return {};
    }
    return Status::error(Code::kNoKernel, "cuda: shared memory of a block is too small");
}

template <typename T, class Codes, class Tile>
Status launch_tiles(Gemm& call, const Device& device, cudaStream_t stream) noexcept {
    QMOE_TRY(divide<Tile>(call, device));
    constexpr uint32_t kCachedBytes = 8 << 20;
    const uint32_t teams = device.multiprocessors / Tile::kCluster;
    for (uint32_t i = call.begin; i < call.end; ++i)
        call.projections[i].panels = ceil_div(call.projections[i].count.by, Tile::kTiles * Tile::kCluster);
    call.neighbours = 1;
    if constexpr (!Tile::kExperts) {
        const GemmProjection& p = call.projections[call.begin];
        const uint32_t products = ceil_div(call.tokens, call.most);
        call.neighbours = std::clamp(kCachedBytes / (call.most * p.cols * 2), 1u, products);
        call.shares = GemmShares::of(products * p.panels, p.blocks.by, teams, call.most, Tile::kGroups);
    }
    const auto kernel = gemm<T, Codes, Tile>;
    QMOE_TRY(runtime_status(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(device.shared))));
    return launch_clusters(kernel, teams * Tile::kCluster, Tile::kThreads, GemmRoom<Tile>(call).bytes, Tile::kCluster,
                           Tile::kExperts, device, stream, call);
}

// What comes before a launch for experts: the schedule, and with wide panels activations in its order at `gathered`.
inline Status launch_preparation(Gemm& call, void* gathered, const Device& device, cudaStream_t stream) noexcept {
    QMOE_TRY(launch_schedule(call.choices, call.most, call.schedule, device, stream));
    if (!call.wide) return {};
    GemmProjection& first = call.projections[0];
    QMOE_TRY(launch_gather(call.choices, call.schedule, first.x, gathered, first.cols, device, stream));
    first.x = gathered;
    return {};
}

template <typename T, class Codes>
Status launch_gemm_as(Gemm call, const Device& device, cudaStream_t stream) noexcept {
    for (uint32_t i = call.begin; i < call.end; ++i) {
        GemmProjection& p = call.projections[i];
        p.by_choice = call.experts && p.is_first && !call.wide;
        p.has_boxes = call.has_boxes && !p.by_choice && TensorMap::fits(p.x, p.cols);
        if (!p.has_boxes) continue;
        const uint32_t rows = call.experts ? call.tokens * call.choices.top_k.by : call.tokens;
        const uint32_t box_rows = call.experts ? 16 : call.wide ? call.most / GemmWide::kCluster : call.most;
        QMOE_TRY(p.x_boxes.make(p.x, rows, p.cols, box_rows));
    }
    const auto launch = [&]<class Shape, bool kExperts, uint32_t kMany>() {
        return launch_tiles<T, Codes, GemmTile<Shape, kExperts, kMany>>(call, device, stream);
    };
    if (call.experts && call.wide)
        return call.most == 128 ? launch.template operator()<GemmWide, true, 128>()
                                : launch.template operator()<GemmWide, true, 256>();
    if (call.experts)
        return call.most == 32 ? launch.template operator()<GemmTall, true, 32>()
                               : launch.template operator()<GemmTall, true, 64>();
    if (!call.wide)
        return call.most == 32 ? launch.template operator()<GemmTall, false, 32>()
                               : launch.template operator()<GemmTall, false, 64>();
    switch (call.most) {
        case 32: return launch.template operator()<GemmWide, false, 32>();
        case 64: return launch.template operator()<GemmWide, false, 64>();
        case 128: return launch.template operator()<GemmWide, false, 128>();
        case 192: return launch.template operator()<GemmWide, false, 192>();
        default: return launch.template operator()<GemmWide, false, 256>();
    }
}

}  // namespace qmoe::cuda
