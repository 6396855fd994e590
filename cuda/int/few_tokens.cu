// `int` times a few tokens: as fast as memory gives the codes.
//
// A block of threads stays on its multiprocessor and its warps in teams; a team takes one tile of 16 rows after the
// other, its warps divide the columns. Each lane copies its own share of the codes into a ring in shared memory, far
// ahead of its use and across tiles: what keeps memory busy is the ring, not registers or the number of warps. The
// activations are in shared memory as a whole, in the order in which lanes want them, beside their sums over groups.
//
// What limits such a kernel below 4 bits is the number of instructions per code. Here a code becomes an operand of the
// tensor cores by masking alone: the bits of the integer c, read as a float, are the subnormal c 2^-24 in float16 and
// c 2^-133 in bfloat16 (above 127 it is a normal number, of the same value), which the tensor cores take as exactly as
// any other number. Activations in bfloat16 are multiplied by 2^64 beforehand, so that products are normal float32
// numbers. Sums over a group are brought back, the zero times the sum of the activations taken off, and scaled, in
// float32. The order of summation is fixed: results depend on nothing but the shape and the size of a team.
#include "common.cuh"
#include "int/tiles.h"

namespace qmoe::cuda {
namespace {

struct Product {
    const uint8_t* tiles;
    const void *x, *bias;
    void* y;
    uint64_t tile_bytes;
    uint32_t block_bytes, rows, cols, count, blocks, tokens, team;  // count: of tiles
    float zero;
    bool has_zeros, bf16_scales, row_groups;
};

// What activations are multiplied by before, and sums of products behind.
constexpr float kBeforeBf16 = 18446744073709551616.0f;  // 2^64
template <typename T>
constexpr float kBehind = 590295810358705651712.0f;  // 2^(133 - 64)
template <>
constexpr float kBehind<__half> = 16777216.0f;  // 2^24

template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, __half>)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t to, const uint8_t* from) {
    if constexpr (kBytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytes));
}

// Codes of kBits at bits kFrom and 16 + kFrom of a word, at the lower end of each half.
template <int kFrom, int kBits>
__device__ __forceinline__ uint32_t pair(uint32_t word) {
    return (word >> kFrom) & (((1u << kBits) - 1) * 0x00010001u);
}

// First operands of product kM of step kStep from a lane's words: see tiles.h.
template <int kBits, int kStep, int kM>
__device__ __forceinline__ void operands(const uint32_t* words, uint32_t (&a)[4]) {
    if constexpr (kBits == 2 || kBits == 3) {
        a[0] = pair<8 * kM, 2>(words[kStep]);
        a[1] = pair<8 * kM + 2, 2>(words[kStep]);
        a[2] = pair<8 * kM + 4, 2>(words[kStep]);
        a[3] = pair<8 * kM + 6, 2>(words[kStep]);
        if constexpr (kBits == 3) {
            constexpr int kFirst = 8 * (kStep % 2) + 4 * kM;
            const uint32_t high = words[4 + kStep / 2];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int by = kFirst + j - 2;
                a[j] |= (by >= 0 ? high >> by : high << -by) & 0x00040004u;
            }
        }
    } else if constexpr (kBits == 4) {
        const uint32_t word = words[2 * kStep + kM];
        a[0] = pair<0, 4>(word);
        a[1] = pair<4, 4>(word);
        a[2] = pair<8, 4>(word);
        a[3] = pair<12, 4>(word);
    } else {
        const uint32_t first = words[4 * kStep + 2 * kM], second = words[4 * kStep + 2 * kM + 1];
        a[0] = pair<0, 8>(first);
        a[1] = pair<8, 8>(first);
        a[2] = pair<0, 8>(second);
        a[3] = pair<8, 8>(second);
    }
}

__device__ __forceinline__ float2 floats_of(uint32_t word, bool bf16) {
    return bf16 ? __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&word))
                : __half22float2(*reinterpret_cast<const __half2*>(&word));
}

// Eight neighbouring columns of one token as they are, zeros beyond the last column.
template <typename T>
__device__ __forceinline__ uint4 load_columns(const T* row, uint32_t col, uint32_t cols, bool aligned) {
    if (aligned) return col < cols ? __ldg(reinterpret_cast<const uint4*>(row + col)) : uint4{};
    uint32_t words[4] = {};
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i)
        if (col + i < cols)
            words[i / 2] |= uint32_t{__ldg(reinterpret_cast<const uint16_t*>(row + col + i))} << (16 * (i % 2));
    return {words[0], words[1], words[2], words[3]};
}

// Two activations as the products want them.
template <typename T>
__device__ __forceinline__ uint32_t prepared(uint32_t two) {
    if constexpr (std::is_same_v<T, __half>) return two;
    const __nv_bfloat162 v = __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&two), __float2bfloat162_rn(kBeforeBf16));
    return *reinterpret_cast<const uint32_t*>(&v);
}

// What is where in shared memory: rings, partial sums of teams, activations (block, step, token, t; 16 bytes), and their
// sums (group, token).
template <int kBits, int kN, int kGroups, uint32_t kWarps>
struct Room {
    static constexpr uint32_t kThreads = kWarps * kLanes;
    static constexpr uint32_t kWords = 2 * kBits, kCodes = kWords * 4 * kLanes;
    static constexpr uint32_t kStage = kCodes + kGroups * 64;
    // Some 50 to 100 KiB on their way into a multiprocessor, and one stage a warp that it reads.
    static constexpr int kStages = kWarps == 32 ? (kBits == 2 ? 4 : 3) : kN == 2 && kBits == 8 ? 2 : kBits == 2 ? 6 : 3;
    static constexpr uint32_t kRing = kStages * kStage;
    static constexpr uint32_t kPartial = kWarps * kRing, kX = kPartial + 2 * kWarps * kN * kLanes * 16;

    static uint32_t bytes(uint32_t tokens, uint32_t blocks) noexcept {
        return kX + blocks * (tokens * kTileColumns * 2 + kGroups * 8 * kN * 4);
    }
};

// kWarps: 32 where registers and shared memory allow it, since each of them waits for itself most of the time.
// kGroups: of a block; one where a row is a group, which only its scale tells from groups of a block.
template <typename T, int kBits, int kN, int kGroups, uint32_t kWarps>
__global__ __launch_bounds__(kWarps* kLanes, 1) void few_tokens(const Product p) {
    using R = Room<kBits, kN, kGroups, kWarps>;
    constexpr uint32_t kThreads = R::kThreads;
    extern __shared__ __align__(128) uint8_t shared[];
    const uint32_t warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
    const uint32_t teams_here = kWarps / p.team, teams = gridDim.x * teams_here;
    const uint32_t team_here = warp / p.team, member = warp % p.team;
    const uint32_t team = team_here * gridDim.x + blockIdx.x;
    uint8_t* const ring = shared + warp * R::kRing;
    float4* const partial = reinterpret_cast<float4*>(shared + R::kPartial);  // [2][warp][kN][lane]
    uint4* const x = reinterpret_cast<uint4*>(shared + R::kX);
    float* const sums = reinterpret_cast<float*>(x + p.blocks * kTileSteps * p.tokens * 4);

    // What is copied next, and where to.
    const uint32_t ring_begin = static_cast<uint32_t>(__cvta_generic_to_shared(ring)), ring_end = ring_begin + R::kRing;
    const uint32_t block_step = p.team * p.block_bytes, scale_lanes = p.row_groups ? 0 : 8 * kGroups;
    const uint8_t* next = p.tiles + uint64_t{team} * p.tile_bytes + member * p.block_bytes;
    uint32_t next_tile = team, next_block = member, next_to = ring_begin;
    const auto copy_next = [&] {
        if (next_tile < p.count && next_block < p.blocks) {
#pragma unroll
            for (uint32_t piece = 0; piece < R::kWords / 4; ++piece)
                copy_async<16>(next_to + lane * 16 + piece * 512, next + lane * 16 + piece * 512);
            if constexpr (R::kWords % 4 != 0)
                copy_async<8>(next_to + lane * 8 + R::kWords / 4 * 512, next + lane * 8 + R::kWords / 4 * 512);
            if (lane < scale_lanes) {  // a word a lane
                copy_async<4>(next_to + lane * 4 + R::kCodes, next + lane * 4 + R::kCodes);
                if (p.has_zeros)
                    copy_async<4>(next_to + lane * 4 + R::kCodes + kGroups * 32,
                                  next + lane * 4 + R::kCodes + kGroups * 32);
            }
            next_block += p.team;
            next += block_step;
            if (next_block >= p.blocks) {
                next_block = member;
                next_tile += teams;
                next = p.tiles + uint64_t{next_tile} * p.tile_bytes + member * p.block_bytes;
            }
        }
        asm volatile("cp.async.commit_group;");
        next_to = next_to + R::kStage == ring_end ? ring_begin : next_to + R::kStage;
    };
#pragma unroll 1
    for (int i = 0; i < R::kStages - 1; ++i) copy_next();

    const bool aligned = p.cols % 8 == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
    const uint32_t pieces = p.blocks * (kTileColumns / 8);
    for (uint32_t i = threadIdx.x; i < pieces * p.tokens; i += kThreads) {  // whole warps: pieces are a multiple of 16,
        const uint32_t token = i / pieces, piece = i % pieces;              // and halves of a warp do not mix below
        const uint4 raw =
            load_columns(static_cast<const T*>(p.x) + uint64_t{token} * p.cols, 8 * piece, p.cols, aligned);
        x[(piece / 4 * p.tokens + token) * 4 + piece % 4] = {prepared<T>(raw.x), prepared<T>(raw.y), prepared<T>(raw.z),
                                                             prepared<T>(raw.w)};
        float sum = 0.0f;
        for (const uint32_t two : {raw.x, raw.y, raw.z, raw.w}) {
            const float2 v = floats_of(two, std::is_same_v<T, __nv_bfloat16>);
            sum += v.x + v.y;
        }
        const uint32_t mask = i / kLanes * kLanes + kLanes <= pieces * p.tokens ? ~0u : 0xffffu;
#pragma unroll
        for (uint32_t d = 1; d < 16 / kGroups; d *= 2) sum += __shfl_xor_sync(mask, sum, d);
        if (piece % (16 / kGroups) == 0) sums[piece / (16 / kGroups) * 8 * kN + token] = sum;
    }
    __syncthreads();

    const uint4* own[kN];  // tokens that are not there may be any: a column of products has nothing to do with others
#pragma unroll
    for (int n = 0; n < kN; ++n) own[n] = x + min(8 * n + g, p.tokens - 1) * 4 + t;
    const uint32_t step_stride = p.tokens * 4;
    const uint8_t* from = ring;
    uint32_t turn = 0;
#pragma unroll 1
    for (uint32_t tile = team; tile < p.count; tile += teams, ++turn) {
        float totals[kN][4] = {};
        const uint8_t* const tail =
            p.tiles + uint64_t{tile} * p.tile_bytes + uint64_t{p.blocks} * p.block_bytes + g * 4;
        float2 zero{p.zero, p.zero};
        if (p.row_groups && p.has_zeros) zero = floats_of(*reinterpret_cast<const uint32_t*>(tail + 32), false);
#pragma unroll 1
        for (uint32_t block = member; block < p.blocks; block += p.team) {
            asm volatile("cp.async.wait_group %0;" ::"n"(R::kStages - 2) : "memory");
            __syncwarp();  // scales were copied by other lanes; and all have read what is overwritten next
            uint32_t words[R::kWords], scales[kGroups], zeros[kGroups];
#pragma unroll
            for (uint32_t piece = 0; piece < R::kWords / 4; ++piece)
                *reinterpret_cast<uint4*>(words + 4 * piece) =
                    *reinterpret_cast<const uint4*>(from + lane * 16 + piece * 512);
            if constexpr (R::kWords % 4 != 0)
                *reinterpret_cast<uint2*>(words + R::kWords / 4 * 4) =
                    *reinterpret_cast<const uint2*>(from + lane * 8 + R::kWords / 4 * 512);
#pragma unroll
            for (int i = 0; i < kGroups; ++i) {
                const auto* const at = reinterpret_cast<const uint32_t*>(from + R::kCodes) + g * kGroups + i;
                scales[i] = at[0];
                zeros[i] = at[8 * kGroups];
            }
            from = from + R::kStage == ring + R::kRing ? ring : from + R::kStage;
            copy_next();
            float products[2][kN][4];  // of even and of odd products, which do not wait for each other
            const auto step = [&]<int kStep>() {
                if (kStep % (kTileSteps / kGroups) == 0)
#pragma unroll
                    for (int n = 0; n < kN; ++n)
#pragma unroll
                        for (int i = 0; i < 4; ++i) products[0][n][i] = products[1][n][i] = 0.0f;
                uint4 columns[kN];
#pragma unroll
                for (int n = 0; n < kN; ++n) columns[n] = own[n][(block * kTileSteps + kStep) * step_stride];
                uint32_t a[4];
                operands<kBits, kStep, 0>(words, a);
#pragma unroll
                for (int n = 0; n < kN; ++n) mma<T>(products[0][n], a, columns[n].x, columns[n].y);
                operands<kBits, kStep, 1>(words, a);
#pragma unroll
                for (int n = 0; n < kN; ++n) mma<T>(products[1][n], a, columns[n].z, columns[n].w);
                if ((kStep + 1) % (kTileSteps / kGroups) != 0) return;
                constexpr int kGroup = kStep / (kTileSteps / kGroups);
                float2 scale{1.0f, 1.0f};
                if (!p.row_groups) {
                    scale = floats_of(scales[kGroup], p.bf16_scales);
                    if (p.has_zeros) zero = floats_of(zeros[kGroup], false);
                }
#pragma unroll
                for (int n = 0; n < kN; ++n) {
                    const float2 sum =
                        *reinterpret_cast<const float2*>(sums + (block * kGroups + kGroup) * 8 * kN + 8 * n + 2 * t);
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float off = (i < 2 ? zero.x : zero.y) * (i % 2 == 0 ? sum.x : sum.y);
                        const float value = fmaf(products[0][n][i] + products[1][n][i], kBehind<T>, -off);
                        totals[n][i] = fmaf(i < 2 ? scale.x : scale.y, value, totals[n][i]);
                    }
                }
            };
            step.template operator()<0>();
            step.template operator()<1>();
            step.template operator()<2>();
            step.template operator()<3>();
        }
        if (p.row_groups) {
            const float2 scale = floats_of(*reinterpret_cast<const uint32_t*>(tail), p.bf16_scales);
#pragma unroll
            for (int n = 0; n < kN; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) totals[n][i] *= i < 2 ? scale.x : scale.y;
        }
        // The sums of a team's warps, in their order, by each of them in turn. A barrier a tile is enough, since what is
        // written next is what was read before the last barrier.
        if (p.team > 1) {
            float4* const here = partial + (turn % 2 * kWarps + team_here * p.team) * kN * kLanes + lane;
#pragma unroll
            for (int n = 0; n < kN; ++n)
                here[(member * kN + n) * kLanes] = {totals[n][0], totals[n][1], totals[n][2], totals[n][3]};
            asm volatile("bar.sync %0, %1;" ::"r"(team_here), "r"(p.team * kLanes) : "memory");
            if (turn % p.team != member) continue;
#pragma unroll
            for (int n = 0; n < kN; ++n) {
                float4 sum = here[n * kLanes];
#pragma unroll 1
                for (uint32_t other = 1; other < p.team; ++other) {
                    const float4 more = here[(other * kN + n) * kLanes];
                    sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
                }
                totals[n][0] = sum.x, totals[n][1] = sum.y, totals[n][2] = sum.z, totals[n][3] = sum.w;
            }
        }
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t row = tile * kTileRows + g + i / 2 * 8, token = 8 * n + 2 * t + i % 2;
                if (row >= p.rows || token >= p.tokens) continue;
                float value = totals[n][i];
                if (p.bias != nullptr) value += static_cast<float>(static_cast<const T*>(p.bias)[row]);
                static_cast<T*>(p.y)[uint64_t{token} * p.rows + row] = from_float<T>(value);
            }
    }
    asm volatile("cp.async.wait_all;");
}

// Warps of a team: those that read the busiest multiprocessor's tiles in the fewest turns. What the sum over a team costs
// a tile, as a quarter of a block for every one of its warps, is fitted to measurements on an H100.
uint32_t choose_team(uint32_t warps, uint32_t tiles, uint32_t blocks, uint32_t multiprocessors) noexcept {
    const uint64_t busiest = ceil_div(uint64_t{tiles}, uint64_t{multiprocessors});
    uint32_t best = 1;
    uint64_t least = ~uint64_t{0};
    for (uint32_t team = 1; team <= warps; team *= 2) {
        const uint64_t turns = ceil_div(busiest, uint64_t{warps / team});
        const uint64_t cost = turns * (4 * ceil_div(uint64_t{blocks}, uint64_t{team}) + team);
        if (cost < least) least = cost, best = team;
    }
    return best;
}

struct Device {
    uint32_t multiprocessors, shared;  // shared: bytes that a block may have
};

// One launch per as many tokens as there is room for.
template <typename T, int kBits, int kN, int kGroups, uint32_t kWarps>
Status launch(Product product, uint64_t tokens, const Device& device, cudaStream_t stream) noexcept {
    using R = Room<kBits, kN, kGroups, kWarps>;
    const auto kernel = few_tokens<T, kBits, kN, kGroups, kWarps>;
    uint32_t most = 8 * kN;
    while (most > 1 && R::bytes(most, product.blocks) > device.shared) --most;
    if (R::bytes(most, product.blocks) > device.shared)
        return Status::mismatch(Code::kNoKernel, "cuda: columns that one token may have", 0, 1 << 15, product.cols);
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(device.shared));
    QMOE_TRY(runtime_status(error));
    if (product.team == 0) product.team = choose_team(kWarps, product.count, product.blocks, device.multiprocessors);
    if (product.team > kWarps) product.team = kWarps;
    const uint64_t launches = ceil_div(tokens, uint64_t{most});
    const uint32_t grid = product.count < device.multiprocessors ? product.count : device.multiprocessors;
    for (uint64_t i = 0, first = 0; i < launches; ++i) {
        const uint64_t last = tokens * (i + 1) / launches;
        Product part = product;
        part.tokens = static_cast<uint32_t>(last - first);
        part.x = static_cast<const T*>(product.x) + first * product.cols;
        part.y = static_cast<T*>(product.y) + first * product.rows;
        kernel<<<grid, R::kThreads, R::bytes(part.tokens, product.blocks), stream>>>(part);
        first = last;
    }
    return launch_status();
}

template <typename T, int kBits, int kN, int kGroups>
Status launch_warps(const Product& product, uint64_t tokens, const Device& device, cudaStream_t stream) noexcept {
    if constexpr (kN == 1 && kBits < 8) {
        const auto all = static_cast<uint32_t>(tokens);  // at most 8
        if (Room<kBits, kN, kGroups, 32>::bytes(all, product.blocks) <= device.shared)
            return launch<T, kBits, kN, kGroups, 32>(product, tokens, device, stream);
    }
    return launch<T, kBits, kN, kGroups, 16>(product, tokens, device, stream);
}

template <typename T, int kBits>
Status launch_bits(const Product& product, uint32_t groups, uint64_t tokens, const Device& device,
                   cudaStream_t stream) noexcept {
    const auto with = [&]<int kN>() {
        switch (groups) {
            case 2: return launch_warps<T, kBits, kN, 2>(product, tokens, device, stream);
            case 4: return launch_warps<T, kBits, kN, 4>(product, tokens, device, stream);
            default: return launch_warps<T, kBits, kN, 1>(product, tokens, device, stream);
        }
    };
    return tokens <= 8 ? with.template operator()<1>() : with.template operator()<2>();
}

template <typename T>
Status launch_type(const IntTiles& tiles, const Product& product, uint64_t tokens, const Device& device,
                   cudaStream_t stream) noexcept {
    switch (tiles.bits) {
        case 2: return launch_bits<T, 2>(product, tiles.groups, tokens, device, stream);
        case 3: return launch_bits<T, 3>(product, tiles.groups, tokens, device, stream);
        case 4: return launch_bits<T, 4>(product, tiles.groups, tokens, device, stream);
        default: return launch_bits<T, 8>(product, tiles.groups, tokens, device, stream);
    }
}

}  // namespace

Status linear_int(const IntLinear& linear, cudaStream_t stream) noexcept {
    const IntLayout stored(linear.spec, linear.rows, linear.cols);
    if (!has_tiles(stored)) return Status::error(Code::kNoKernel, "cuda: there are no tiles of this matrix");
    if (linear.tokens == 0) return {};
    const IntTiles tiles(stored);
    int index = 0, multiprocessors = 0, shared = 0;
    cudaError_t error = cudaGetDevice(&index);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    QMOE_TRY(runtime_status(error));
    const Device device{static_cast<uint32_t>(multiprocessors), static_cast<uint32_t>(shared)};
    const auto count = static_cast<uint32_t>(tiles.tiles), blocks = static_cast<uint32_t>(tiles.blocks);
    const Product product{static_cast<const uint8_t*>(linear.tiles),
                          linear.x,
                          linear.bias,
                          linear.y,
                          tiles.tile_bytes,
                          tiles.block_bytes,
                          static_cast<uint32_t>(tiles.rows),
                          static_cast<uint32_t>(tiles.cols),
                          count,
                          blocks,
                          0,
                          linear.team,
                          tiles.zero,
                          tiles.has_zeros,
                          tiles.scale_type == ScaleType::kBfloat16,
                          tiles.groups == 0};
    switch (linear.type) {
        case OutputType::kFloat16: return launch_type<__half>(tiles, product, linear.tokens, device, stream);
        case OutputType::kBfloat16: return launch_type<__nv_bfloat16>(tiles, product, linear.tokens, device, stream);
        default: return Status::error(Code::kDtype, "cuda: activations are float16 or bfloat16");
    }
}

}  // namespace qmoe::cuda
