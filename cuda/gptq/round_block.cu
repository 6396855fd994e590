// The inner loop of GPTQ and of coordinate descent: the columns of one block rounded one after the other, each passing its
// change on to the columns after it. See python/qmoe_core/quantize/feedback.py, its slow twin.
//
// One thread per row. A block is cut into strips of 16 columns whose targets lie in registers; a strip first takes in the
// changes of all strips before it, then its own columns go one by one. The coefficients above the diagonal (read by
// every thread alike) and each thread's own changes lie in shared memory: 94 KiB for 128 columns, two thread blocks per
// multiprocessor.
//
// Products and sums are rounded one by one, in the order of the columns, as the twin does: equal inputs give equal bits.
#include "common.cuh"
#include "gptq/ternary_rounding.cuh"

namespace qmoe::cuda {
namespace {

constexpr uint32_t kThreads = 128, kStrip = 16;

__host__ __device__ constexpr uint32_t strip_offset(uint32_t strip) {
    return kStrip * kStrip * (strip * (strip + 1) / 2);  // strips before it hold 1, 2, ... squares of coefficients
}

constexpr uint32_t shared_bytes(uint32_t strips) {
    return (strip_offset(strips) + (strips - 1) * kStrip * kThreads) * 4;
}

struct IntRounder {
    const float *scales, *zeros;
    float scale = 1, zero = 0, top;
    uint32_t first, width, group = UINT32_MAX;

    __device__ IntRounder(const RoundBlock& a, uint64_t row)
        : scales(a.scale + row * a.groups),
          zeros(a.zero + row * a.groups),
          top(static_cast<float>(a.top)),
          first(a.first),
          width(a.width) {}
    __device__ float operator()(float target, uint32_t column, float, uint8_t& code) {
        if (const uint32_t g = (first + column) / width; g != group) {
            group = g;
            scale = scales[g];
            zero = zeros[g];
        }
        const float rounded = fminf(fmaxf(rintf(__fadd_rn(__fdiv_rn(target, scale), zero)), 0.0f), top);
        code = static_cast<uint8_t>(rounded);
        return __fmul_rn(scale, __fsub_rn(rounded, zero));
    }
};

struct TernaryRounder {
    TernaryRounding round;

    __device__ TernaryRounder(const RoundBlock& a, uint64_t row)
        : round(a.low, a.high, a.price, a.bits + row / a.rows * 3, row) {}
    __device__ float operator()(float target, uint32_t, float precision, uint8_t& code) const {
        const TernaryRounding::Result result = round(target, precision);
        code = static_cast<uint8_t>(result.code);
        return result.value;
    }
};

// Sixteen values of a row, or as many as there are; whole strips of aligned rows go 16 bytes at a time.
__device__ inline void load_strip(const float* p, uint32_t count, bool vectors, float (&out)[kStrip]) {
    if (vectors && count == kStrip) {
#pragma unroll
        for (uint32_t i = 0; i < kStrip; i += 4) {
            const float4 v = *reinterpret_cast<const float4*>(p + i);
            out[i] = v.x, out[i + 1] = v.y, out[i + 2] = v.z, out[i + 3] = v.w;
        }
    } else {
#pragma unroll
        for (uint32_t i = 0; i < kStrip; ++i) out[i] = i < count ? p[i] : 0.0f;
    }
}

template <class Rounder>
__global__ void __launch_bounds__(kThreads) round_block_kernel(const __grid_constant__ RoundBlock a, bool vectors) {
    extern __shared__ float4 shared[];
    const uint32_t strips = (a.columns + kStrip - 1) / kStrip, expert = blockIdx.y, thread = threadIdx.x;
    float* const triangle = reinterpret_cast<float*>(shared);
    float* const changes = triangle + strip_offset(strips) + thread;
    const float* const coefficients = a.coefficients + expert * a.coefficient_expert_stride;
    // Neighbouring threads read neighbouring addresses: factors come with rows or with columns contiguous.
    const bool by_row = a.coefficient_column_stride == 1;
    for (uint32_t strip = 0; strip < strips; ++strip) {
        const uint32_t above = (strip + 1) * kStrip;
        for (uint32_t i = thread; i < above * kStrip; i += kThreads) {
            const uint32_t j = by_row ? i / kStrip : i % above, within = by_row ? i % kStrip : i / above;
            const uint32_t k = strip * kStrip + within;
            triangle[strip_offset(strip) + j * kStrip + within] =
                j < k && k < a.columns ? coefficients[j * a.coefficient_row_stride + k * a.coefficient_column_stride]
                                       : 0.0f;
        }
    }
    __syncthreads();

    // From here on a thread touches its own row and its own changes only.
    const uint32_t row = blockIdx.x * kThreads + thread;
    if (row >= a.rows) return;
    const uint64_t at = expert * a.expert_stride + row * a.row_stride;
    const float* const weight = a.weight + at;
    float* const residual = a.residual + at;
    uint8_t* const codes = a.codes + at;
    const float* const target = a.target + (uint64_t{expert} * a.rows + row) * a.columns;
    const float* const precision = a.precision + expert * a.precision_stride;
    Rounder round(a, uint64_t{expert} * a.rows + row);

    for (uint32_t strip = 0; strip < strips; ++strip) {
        const uint32_t first = strip * kStrip, count = min(kStrip, a.columns - first);
        float t[kStrip], w[kStrip], r[kStrip];
        load_strip(target + first, count, vectors, t);
        load_strip(weight + first, count, vectors, w);
        load_strip(residual + first, count, vectors, r);
        const float* u = triangle + strip_offset(strip);
#pragma unroll 2
        for (uint32_t j = 0; j < first; ++j, u += kStrip) {
            const float change = changes[j * kThreads];
#pragma unroll
            for (uint32_t k = 0; k < kStrip; k += 4) {
                const float4 v = *reinterpret_cast<const float4*>(u + k);
                t[k] = __fadd_rn(t[k], __fmul_rn(change, v.x));
                t[k + 1] = __fadd_rn(t[k + 1], __fmul_rn(change, v.y));
                t[k + 2] = __fadd_rn(t[k + 2], __fmul_rn(change, v.z));
                t[k + 3] = __fadd_rn(t[k + 3], __fmul_rn(change, v.w));
            }
        }
        alignas(16) uint8_t code[kStrip];
#pragma unroll
        for (uint32_t j = 0; j < kStrip; ++j) {
            code[j] = 0;
            if (j < count) {
                const float value = round(t[j], first + j, precision[first + j], code[j]);
                const float fresh = __fsub_rn(w[j], value), change = __fsub_rn(fresh, r[j]);
                r[j] = fresh;
                if (strip + 1 < strips) changes[(first + j) * kThreads] = change;
#pragma unroll
                for (uint32_t k = j + 1; k < kStrip; ++k) t[k] = __fadd_rn(t[k], __fmul_rn(change, u[j * kStrip + k]));
            }
        }
        if (vectors && count == kStrip) {
#pragma unroll
            for (uint32_t i = 0; i < kStrip; i += 4)
                *reinterpret_cast<float4*>(residual + first + i) = make_float4(r[i], r[i + 1], r[i + 2], r[i + 3]);
            uint32_t packed[4];
#pragma unroll
            for (uint32_t i = 0; i < 4; ++i)
                packed[i] = code[4 * i] | code[4 * i + 1] << 8 | code[4 * i + 2] << 16 |
                            static_cast<uint32_t>(code[4 * i + 3]) << 24;
            *reinterpret_cast<uint4*>(codes + first) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
        } else {
#pragma unroll
            for (uint32_t i = 0; i < kStrip; ++i)
                if (i < count) {
                    residual[first + i] = r[i];
                    codes[first + i] = code[i];
                }
        }
    }
}

template <class Rounder>
Status launch(const RoundBlock& a, cudaStream_t stream) noexcept {
    const uint32_t strips = (a.columns + kStrip - 1) / kStrip, bytes = shared_bytes(strips);
    if (const cudaError_t error =
            cudaFuncSetAttribute(round_block_kernel<Rounder>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes(kMaxBlockColumns / kStrip)));
        error != cudaSuccess)
        return Status::error(Code::kNoKernel, cudaGetErrorString(error));
    const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    const bool vectors = aligned(a.weight) && aligned(a.residual) && aligned(a.codes) && aligned(a.target) &&
                         a.row_stride % 16 == 0 && a.expert_stride % 16 == 0 && a.columns % 4 == 0;
    const dim3 grid((a.rows + kThreads - 1) / kThreads, a.experts);
    round_block_kernel<Rounder><<<grid, kThreads, bytes, stream>>>(a, vectors);
    return launch_status();
}

}  // namespace

Status round_block(const RoundBlock& a, cudaStream_t stream) noexcept {
    if (a.experts == 0 || a.rows == 0 || a.columns == 0) return Status::error(Code::kShape, "round_block: empty");
    if (a.columns > kMaxBlockColumns)
        return Status::mismatch(Code::kShape, "round_block: columns", 0, kMaxBlockColumns, a.columns);
    if (a.experts > 65535) return Status::mismatch(Code::kLimit, "round_block: experts", 0, 65535, a.experts);
    if (a.ternary) return launch<TernaryRounder>(a, stream);
    if (a.width == 0 || a.top == 0 || a.top > 255) return Status::error(Code::kValue, "round_block: group or top code");
    if ((a.first + a.columns - 1) / a.width >= a.groups)
        return Status::mismatch(Code::kShape, "round_block: groups", 0, (a.first + a.columns - 1) / a.width + 1,
                                a.groups);
    return launch<IntRounder>(a, stream);
}

}  // namespace qmoe::cuda
