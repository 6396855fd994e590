// `int` times a few tokens: as fast as memory gives the codes.
//
// A block of threads stays on its multiprocessor and its warps in teams; a team takes one tile of 16 rows after the
// other, its warps divide the columns. Each lane copies its own share of the codes into a ring in shared memory, far
// ahead of its use and across tiles, and takes it from there without any other thread: what keeps memory busy is the
// ring, not registers or the number of warps. Codes become floats by bits: with those of 128.0 around it, code c is
// 128 + c, from which the middle of the codes is then subtracted, exactly. (To do that once a group, from the sums, is
// cheaper but costs digits: tensor cores cut off what is small beside 128 times the activations.) Where a zero is not
// the middle, the rest is taken from the sum over a group, of which the tensor cores keep the sum of the activations
// beside it, a product with ones. Products of a group are scaled in float32. The order of summation is fixed: results
// do not depend on anything but the shape.
#include "common.cuh"
#include "int/tiles.h"

namespace qmoe::cuda {
namespace {

constexpr uint32_t kWarps = 16, kThreads = kWarps * kLanes;

struct Product {
    const uint8_t *codes, *scales, *zeros;
    const void *x, *bias;
    void* y;
    uint32_t rows, cols, tiles, blocks, groups, tile_scales, tokens, team;
    float zero;  // from the middle of the codes, where none are stored
    bool bf16_scales;
};

template <typename T>
struct Element;
// A code's lowest bit in the pattern of 128 + code, 1 beside 1, and the product.
template <>
struct Element<__nv_bfloat16> {
    static constexpr uint32_t kMagic = 0x43004300, kOnes = 0x3f803f80, kAt = 0;
};
template <>
struct Element<__half> {
    static constexpr uint32_t kMagic = 0x58005800, kOnes = 0x3c003c00, kAt = 3;
};

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
__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
    if constexpr (kBytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytes));
}
__device__ __forceinline__ void copies_commit() {
    asm volatile("cp.async.commit_group;");
}
template <int kLeft>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// The bits of `kBits` wide codes at bits kFrom and 16 + kFrom of a word, as 128 + code twice.
template <typename T, int kFrom, int kBits>
__device__ __forceinline__ uint32_t around(uint32_t word, uint32_t more = Element<T>::kMagic) {
    constexpr int kAt = Element<T>::kAt;
    constexpr uint32_t kMask = ((1u << kBits) - 1) * 0x00010001u << kAt;
    const uint32_t moved = kFrom >= kAt ? word >> (kFrom >= kAt ? kFrom - kAt : 0) : word << (kAt - kFrom);
    return (moved & kMask) | more;
}

// a - b, two of them.
template <typename T>
__device__ __forceinline__ uint32_t subtract(uint32_t a, uint32_t b) {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    const Pair d = __hsub2(*reinterpret_cast<const Pair*>(&a), *reinterpret_cast<const Pair*>(&b));
    return *reinterpret_cast<const uint32_t*>(&d);
}

// First operands of product `kM` of step `kStep`, from a lane's words: codes minus the middle, 2^(bits - 1). Codes of 8
// bits are two planes of 4, the upper one worth sixteen times as much, and its middle that of all.
template <typename T, int kBits, int kStep, int kM, int kPlane>
__device__ __forceinline__ void operands(const uint32_t* words, uint32_t (&a)[4]) {
    constexpr int kAt = Element<T>::kAt;
    if constexpr (kBits == 2) {
        a[0] = around<T, 8 * kM, 2>(words[kStep]);
        a[1] = around<T, 8 * kM + 2, 2>(words[kStep]);
        a[2] = around<T, 8 * kM + 4, 2>(words[kStep]);
        a[3] = around<T, 8 * kM + 6, 2>(words[kStep]);
    } else if constexpr (kBits == 3) {
        const uint32_t high = words[4 + kStep / 2];
        constexpr int kFirst = 8 * (kStep % 2) + 4 * kM;
        constexpr uint32_t kMask = 0x00010001u << (kAt + 2);
        const auto with = [&](int from) {  // bit 2 of the codes within the pattern of 128
            const int by = from - (kAt + 2);
            return ((by >= 0 ? high >> by : high << -by) & kMask) | Element<T>::kMagic;
        };
        a[0] = around<T, 8 * kM, 2>(words[kStep], with(kFirst));
        a[1] = around<T, 8 * kM + 2, 2>(words[kStep], with(kFirst + 1));
        a[2] = around<T, 8 * kM + 4, 2>(words[kStep], with(kFirst + 2));
        a[3] = around<T, 8 * kM + 6, 2>(words[kStep], with(kFirst + 3));
    } else if constexpr (kBits == 4) {
        const uint32_t word = words[2 * kStep + kM];
        a[0] = around<T, 0, 4>(word);
        a[1] = around<T, 4, 4>(word);
        a[2] = around<T, 8, 4>(word);
        a[3] = around<T, 12, 4>(word);
    } else {
        const uint32_t first = words[4 * kStep + 2 * kM], second = words[4 * kStep + 2 * kM + 1];
        a[0] = around<T, 4 * kPlane, 4>(first);
        a[1] = around<T, 8 + 4 * kPlane, 4>(first);
        a[2] = around<T, 4 * kPlane, 4>(second);
        a[3] = around<T, 8 + 4 * kPlane, 4>(second);
    }
    constexpr uint32_t kMiddle = kBits < 8 ? 1u << (kBits - 1) : kPlane == 1 ? 8 : 0;
    constexpr uint32_t kBoth = Element<T>::kMagic | (kMiddle * 0x00010001u << kAt);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = subtract<T>(a[i], kBoth);
}

// A lane's 8 columns of one token from `col` on; zeros beyond the last column.
template <typename T, bool kAligned>
__device__ __forceinline__ uint4 load_columns(const T* row, uint32_t col, uint32_t cols) {
    if constexpr (kAligned) {
        return col < cols ? __ldg(reinterpret_cast<const uint4*>(row + col)) : uint4{};
    } else {
        uint32_t words[4] = {};
        for (uint32_t i = 0; i < 8; ++i)
            if (col + i < cols)
                words[i / 2] |= uint32_t{__ldg(reinterpret_cast<const uint16_t*>(row + col + i))} << (16 * (i % 2));
        return {words[0], words[1], words[2], words[3]};
    }
}

__device__ __forceinline__ float2 pair_of_scales(uint32_t word, bool bf16) {
    return bf16 ? __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&word))
                : __half22float2(*reinterpret_cast<const __half2*>(&word));
}

// Sums of one group of a warp's tile and kN x 8 tokens. In every array of four: rows g, g, g + 8, g + 8 and tokens 2 t,
// 2 t + 1, 2 t, 2 t + 1.
template <typename T, int kBits, int kN>
struct Sums {
    static constexpr int kPlanes = kBits == 8 ? 2 : 1;
    float products[kPlanes][kN][4] = {}, ones[kN][4] = {};

    // `zeros`: whether some zero is not the middle.
    template <int kStep>
    __device__ __forceinline__ void add(const uint32_t* words, const uint4 (&x)[kN], bool zeros) {
        uint32_t a[4];
        if (zeros) {
            const uint32_t one[4] = {Element<T>::kOnes, Element<T>::kOnes, Element<T>::kOnes, Element<T>::kOnes};
#pragma unroll
            for (int n = 0; n < kN; ++n) {
                mma<T>(ones[n], one, x[n].x, x[n].y);
                mma<T>(ones[n], one, x[n].z, x[n].w);
            }
        }
        operands<T, kBits, kStep, 0, 0>(words, a);
#pragma unroll
        for (int n = 0; n < kN; ++n) mma<T>(products[0][n], a, x[n].x, x[n].y);
        operands<T, kBits, kStep, 1, 0>(words, a);
#pragma unroll
        for (int n = 0; n < kN; ++n) mma<T>(products[0][n], a, x[n].z, x[n].w);
        if constexpr (kPlanes == 2) {
            operands<T, kBits, kStep, 0, 1>(words, a);
#pragma unroll
            for (int n = 0; n < kN; ++n) mma<T>(products[1][n], a, x[n].x, x[n].y);
            operands<T, kBits, kStep, 1, 1>(words, a);
#pragma unroll
            for (int n = 0; n < kN; ++n) mma<T>(products[1][n], a, x[n].z, x[n].w);
        }
    }

    // totals += scale (codes - zero) x, and begins anew. `zero`, `scale`: of rows g and g + 8; zeros from the middle.
    __device__ __forceinline__ void finish(float (&totals)[kN][4], float2 scale, float2 zero) {
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float value = products[0][n][i];
                if constexpr (kPlanes == 2) value = fmaf(16.0f, products[1][n][i], value);
                value = fmaf(i < 2 ? -zero.x : -zero.y, ones[n][i], value);
                totals[n][i] = fmaf(i < 2 ? scale.x : scale.y, value, totals[n][i]);
                products[0][n][i] = products[kPlanes - 1][n][i] = ones[n][i] = 0.0f;
            }
    }
};

// Sizes of a warp's ring.
template <int kBits>
struct Ring {
    static constexpr int kStages = kBits == 8 ? 4 : kBits == 4 ? 6 : 8;
    static constexpr uint32_t kWords = 2 * kBits, kBlock = kWords * 4 * kLanes;
    static constexpr uint32_t kScales = 8 * 4 * 4;  // of a block: 8 pairs of up to 4 groups, 4 bytes each
    static constexpr uint32_t kStage = kBlock + 2 * kScales, kBytes = kStages * kStage;
};

template <typename T, int kBits, int kN, bool kAligned>
__global__ __launch_bounds__(kThreads, 1) void few_tokens(const Product p) {
    using R = Ring<kBits>;
    extern __shared__ __align__(128) uint8_t shared[];
    const uint32_t warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
    const uint32_t teams_here = kWarps / p.team, teams = gridDim.x * teams_here;
    const uint32_t team_here = warp / p.team, member = warp % p.team;
    const uint32_t team = team_here * gridDim.x + blockIdx.x;
    uint8_t* const ring = shared + warp * R::kBytes;
    const auto ring_at = static_cast<uint32_t>(__cvta_generic_to_shared(ring));
    float4* const partial = reinterpret_cast<float4*>(shared + kWarps * R::kBytes);  // [2][warp][kN][lane]

    // What is copied next.
    uint32_t next_tile = team, next_block = member, next_stage = 0;
    const auto copy_next = [&] {
        if (next_tile < p.tiles && next_block < p.blocks) {
            const uint64_t block = uint64_t{next_tile} * p.blocks + next_block;
            const uint8_t* const from = p.codes + block * R::kBlock;
            const uint32_t to = ring_at + next_stage * R::kStage;
#pragma unroll
            for (uint32_t piece = 0; piece < R::kWords / 4; ++piece)
                copy_async<16>(to + piece * 512 + lane * 16, from + piece * 512 + lane * 16);
            if constexpr (R::kWords % 4 != 0)
                copy_async<8>(to + R::kWords / 4 * 512 + lane * 8, from + R::kWords / 4 * 512 + lane * 8);
            if (p.groups != 0 && lane < 8 * p.groups) {  // a word a lane
                const uint64_t at = (block * 8 * p.groups + lane) * 4;
                copy_async<4>(to + R::kBlock + lane * 4, p.scales + at);
                if (p.zeros != nullptr) copy_async<4>(to + R::kBlock + R::kScales + lane * 4, p.zeros + at);
            }
            next_block += p.team;
            if (next_block >= p.blocks) {
                next_block = member;
                next_tile += teams;
            }
        }
        copies_commit();
        next_stage = next_stage + 1 == R::kStages ? 0 : next_stage + 1;
    };
    for (int i = 0; i < R::kStages - 1; ++i) copy_next();

    const T* x[kN];
    bool there[kN];
    for (int n = 0; n < kN; ++n) {
        there[n] = 8 * n + g < p.tokens;
        x[n] = static_cast<const T*>(p.x) + uint64_t{there[n] ? 8 * n + g : 0} * p.cols;
    }
    const bool zeros = p.zeros != nullptr || p.zero != 0.0f;
    const float2 constant = {p.zero, p.zero};
    const auto stored_zeros = [&](uint32_t word) {
        constexpr float kMiddle = 1 << (kBits - 1);
        const float2 zero = __half22float2(*reinterpret_cast<const __half2*>(&word));
        return float2{zero.x - kMiddle, zero.y - kMiddle};
    };
    uint32_t stage = 0, turn = 0;
    for (uint32_t tile = team; tile < p.tiles; tile += teams, ++turn) {
        float totals[kN][4] = {};
        Sums<T, kBits, kN> sums;
        float2 row_zero = constant;
        if (p.groups == 0 && p.zeros != nullptr)
            row_zero = stored_zeros(reinterpret_cast<const uint32_t*>(p.zeros)[uint64_t{tile} * 8 + g]);
        for (uint32_t block = member; block < p.blocks; block += p.team) {
            uint4 columns[kTileSteps][kN];
#pragma unroll
            for (uint32_t step = 0; step < kTileSteps; ++step)
#pragma unroll
                for (int n = 0; n < kN; ++n)
                    columns[step][n] =
                        there[n] ? load_columns<T, kAligned>(x[n], block * kTileColumns + step * 32 + 8 * t, p.cols)
                                 : uint4{};
            copies_wait<R::kStages - 2>();
            __syncwarp();  // scales are copied by other lanes; and all have read what is overwritten next
            const uint8_t* const from = ring + stage * R::kStage;
            stage = stage + 1 == R::kStages ? 0 : stage + 1;
            uint32_t words[R::kWords];
#pragma unroll
            for (uint32_t piece = 0; piece < R::kWords / 4; ++piece)
                *reinterpret_cast<uint4*>(words + 4 * piece) =
                    *reinterpret_cast<const uint4*>(from + piece * 512 + lane * 16);
            if constexpr (R::kWords % 4 != 0)
                *reinterpret_cast<uint2*>(words + R::kWords / 4 * 4) =
                    *reinterpret_cast<const uint2*>(from + R::kWords / 4 * 512 + lane * 8);
            const auto* const scales = reinterpret_cast<const uint32_t*>(from + R::kBlock) + g * p.groups;
            copy_next();
            const auto finish = [&](uint32_t group) {
                float2 zero = constant;
                if (p.zeros != nullptr) zero = stored_zeros(scales[R::kScales / 4 + group]);
                sums.finish(totals, pair_of_scales(scales[group], p.bf16_scales), zero);
            };
            sums.template add<0>(words, columns[0], zeros);
            if (p.groups == 4) finish(0);
            sums.template add<1>(words, columns[1], zeros);
            if (p.groups == 4) finish(1);
            if (p.groups == 2) finish(0);
            sums.template add<2>(words, columns[2], zeros);
            if (p.groups == 4) finish(2);
            sums.template add<3>(words, columns[3], zeros);
            if (p.groups != 0)
                finish(p.groups - 1);
            else  // not once a row: the tensor cores' sums lose digits as they grow
                sums.finish(totals, {1.0f, 1.0f}, row_zero);
        }
        if (p.groups == 0) {
            const float2 scale =
                pair_of_scales(reinterpret_cast<const uint32_t*>(p.scales)[uint64_t{tile} * 8 + g], p.bf16_scales);
            for (int n = 0; n < kN; ++n)
                for (int i = 0; i < 4; ++i) totals[n][i] *= i < 2 ? scale.x : scale.y;
        }
        // The sums of a team's warps, in their order, by each of them in turn. A barrier a tile is enough, since what is
        // written next is what was read before the last barrier.
        if (p.team > 1) {
            float4* const here = partial + (turn % 2 * kWarps + team_here * p.team) * kN * kLanes + lane;
            for (int n = 0; n < kN; ++n)
                here[(member * kN + n) * kLanes] = {totals[n][0], totals[n][1], totals[n][2], totals[n][3]};
            asm volatile("bar.sync %0, %1;" ::"r"(1 + team_here), "r"(p.team * kLanes) : "memory");
            if (turn % p.team != member) continue;
            for (int n = 0; n < kN; ++n) {
                float4 sum = here[n * kLanes];
                for (uint32_t other = 1; other < p.team; ++other) {
                    const float4 more = here[(other * kN + n) * kLanes];
                    sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
                }
                totals[n][0] = sum.x, totals[n][1] = sum.y, totals[n][2] = sum.z, totals[n][3] = sum.w;
            }
        }
        for (int n = 0; n < kN; ++n)
            for (int i = 0; i < 4; ++i) {
                const uint32_t row = tile * kTileRows + g + i / 2 * 8, token = 8 * n + 2 * t + i % 2;
                if (row >= p.rows || token >= p.tokens) continue;
                float value = totals[n][i];
                if (p.bias != nullptr) value += static_cast<float>(static_cast<const T*>(p.bias)[row]);
                static_cast<T*>(p.y)[uint64_t{token} * p.rows + row] = from_float<T>(value);
            }
    }
    copies_wait<0>();
}

// Warps of a team: those that read the busiest multiprocessor's tiles in the fewest turns. The sum over a team costs about
// half a block a tile.
uint32_t choose_team(uint32_t tiles, uint32_t blocks, uint32_t multiprocessors) noexcept {
    const uint64_t busiest = ceil_div(uint64_t{tiles}, uint64_t{multiprocessors});
    uint32_t best = 1;
    uint64_t least = ~uint64_t{0};
    for (uint32_t team = 1; team <= kWarps; team *= 2) {
        const uint64_t turns = ceil_div(busiest, uint64_t{kWarps / team});
        const uint64_t cost = turns * (2 * ceil_div(uint64_t{blocks}, uint64_t{team}) + (team > 1 ? 1 : 0));
        if (cost < least) least = cost, best = team;
    }
    return best;
}

template <typename T, int kBits, int kN, bool kAligned>
Status launch(const Product& product, uint32_t multiprocessors, cudaStream_t stream) noexcept {
    constexpr uint32_t kShared = kWarps * Ring<kBits>::kBytes + 2 * kWarps * kN * kLanes * sizeof(float4);
    const cudaError_t error =
        cudaFuncSetAttribute(few_tokens<T, kBits, kN, kAligned>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
    if (error != cudaSuccess) return Status::error(Code::kNoKernel, cudaGetErrorString(error));
    const uint32_t grid = product.tiles < multiprocessors ? product.tiles : multiprocessors;
    few_tokens<T, kBits, kN, kAligned><<<grid, kThreads, kShared, stream>>>(product);
    return launch_status();
}

template <typename T, int kBits>
Status launch_bits(const Product& product, uint32_t multiprocessors, cudaStream_t stream) noexcept {
    const bool aligned = product.cols % 8 == 0 && reinterpret_cast<uintptr_t>(product.x) % 16 == 0;
    if (product.tokens <= 8)
        return aligned ? launch<T, kBits, 1, true>(product, multiprocessors, stream)
                       : launch<T, kBits, 1, false>(product, multiprocessors, stream);
    return aligned ? launch<T, kBits, 2, true>(product, multiprocessors, stream)
                   : launch<T, kBits, 2, false>(product, multiprocessors, stream);
}

template <typename T>
Status launch_type(const IntTiles& tiles, const Product& product, uint32_t multiprocessors,
                   cudaStream_t stream) noexcept {
    switch (tiles.bits) {
        case 2: return launch_bits<T, 2>(product, multiprocessors, stream);
        case 3: return launch_bits<T, 3>(product, multiprocessors, stream);
        case 4: return launch_bits<T, 4>(product, multiprocessors, stream);
        default: return launch_bits<T, 8>(product, multiprocessors, stream);
    }
}

}  // namespace

Status linear_int(const IntLinear& linear, cudaStream_t stream) noexcept {
    const IntLayout stored(linear.spec, linear.rows, linear.cols);
    if (!has_tiles(stored)) return Status::error(Code::kNoKernel, "cuda: there are no tiles of this matrix");
    if (linear.tokens == 0) return {};
    const IntTiles tiles(stored);
    int device = 0, multiprocessors = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return Status::error(Code::kNoKernel, cudaGetErrorString(error));
    const auto sms = static_cast<uint32_t>(multiprocessors);
    const auto* const data = static_cast<const uint8_t*>(linear.tiles);
    const auto count = static_cast<uint32_t>(tiles.tiles), blocks = static_cast<uint32_t>(tiles.blocks);
    Product product{data,
                    data + tiles.scales_at,
                    tiles.has_zeros ? data + tiles.zeros_at : nullptr,
                    linear.x,
                    linear.bias,
                    linear.y,
                    static_cast<uint32_t>(tiles.rows),
                    static_cast<uint32_t>(tiles.cols),
                    count,
                    blocks,
                    tiles.groups,
                    static_cast<uint32_t>(tiles.tile_scales),
                    0,
                    linear.team != 0 ? linear.team : choose_team(count, blocks, sms),
                    tiles.zero,
                    tiles.scale_type == ScaleType::kBfloat16};
    for (uint64_t first = 0; first < linear.tokens; first += 16) {
        product.tokens = static_cast<uint32_t>(linear.tokens - first < 16 ? linear.tokens - first : 16);
        product.x = static_cast<const uint8_t*>(linear.x) + 2 * first * linear.cols;
        product.y = static_cast<uint8_t*>(linear.y) + 2 * first * linear.rows;
        switch (linear.type) {
            case OutputType::kFloat16: QMOE_TRY(launch_type<__half>(tiles, product, sms, stream)); break;
            case OutputType::kBfloat16: QMOE_TRY(launch_type<__nv_bfloat16>(tiles, product, sms, stream)); break;
            default: return Status::error(Code::kDtype, "cuda: activations are float16 or bfloat16");
        }
    }
    return {};
}

}  // namespace qmoe::cuda
