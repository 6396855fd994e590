// From codes to operands of the tensor cores, for the layout of tiles.h.
//
// The bits of a small integer c, read as a float, are the subnormal c 2^-24 in float16 (up to 2047, the larger half of
// which are normal numbers of the same value) and c 2^-133 in bfloat16 (up to 255), which tensor cores take as exactly as
// any other number. So masking is all that it takes, and it need not even bring a code to the lowest bits: operands of
// rows 8-15 stay kBits above those of rows 0-7, and sums of these rows are divided by 2^kBits. Activations in bfloat16
// are multiplied by 2^64 beforehand, so that products are normal float32 numbers. Zeros are taken off by sums of
// activations, in the same scale.
#pragma once

#include "common.cuh"
#include "int/mma.cuh"
#include "int/tiles.h"

namespace qmoe::cuda {

// What activations are multiplied by before.
inline constexpr float kBeforeBf16 = 18446744073709551616.0f;  // 2^64

// What sums of products are multiplied by behind, of rows 0-7.
template <typename T>
inline constexpr float kBehind = 590295810358705651712.0f;  // 2^(133 - 64)
template <>
inline constexpr float kBehind<__half> = 16777216.0f;  // 2^24
// What besides them of rows 8-15, and of product m = 1 of a step.
template <int kBits>
inline constexpr float kUpper = kBits == 8 ? 1.0f : 1.0f / (1 << kBits);
template <int kBits>
inline constexpr float kSecond = kBits == 2 ? 1.0f / 16 : 1.0f;

// A lane's words of a block in shared memory.
template <int kBits>
__device__ __forceinline__ void load_words(const uint8_t* block, uint32_t lane, uint32_t (&words)[2 * kBits]) {
#pragma unroll
    for (uint32_t i = 0; i < kBits / 2 * 4; i += 4)
        *reinterpret_cast<uint4*>(words + i) = *reinterpret_cast<const uint4*>(block + lane * 16 + i * 4 * kLanes);
    if constexpr (kBits == 3)
        *reinterpret_cast<uint2*>(words + 4) = *reinterpret_cast<const uint2*>(block + lane * 8 + 16 * kLanes);
}
// Those of the products of 64 columns, kHalf of the block's two. Not of 3 bits.
template <int kBits, int kHalf>
__device__ __forceinline__ void load_half_words(const uint8_t* block, uint32_t lane, uint32_t (&words)[2 * kBits]) {
    constexpr uint32_t kFirst = kHalf * kBits;
    if constexpr (kBits == 2) {
        *reinterpret_cast<uint2*>(words + kFirst) = *reinterpret_cast<const uint2*>(block + lane * 16 + kFirst * 4);
    } else {
#pragma unroll
        for (uint32_t i = kFirst; i < kFirst + kBits; i += 4)
            *reinterpret_cast<uint4*>(words + i) = *reinterpret_cast<const uint4*>(block + lane * 16 + i * 4 * kLanes);
    }
}

// `kMask` is of a half of a word.
template <int kBy, uint32_t kMask>
__device__ __forceinline__ uint32_t masked(uint32_t word) {
    return (word >> kBy) & (kMask * 0x00010001u);
}

// First operands of product q = 2 step + m.
template <int kBits, int kQ>
__device__ __forceinline__ void operands(const uint32_t (&words)[2 * kBits], uint32_t (&a)[4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        uint32_t &lower = a[2 * h], &upper = a[2 * h + 1];
        if constexpr (kBits == 2) {
            constexpr int kBy = 8 * (kQ / 2 % 2), kAt = 4 * (kQ % 2);
            const uint32_t word = words[kQ / 4 * 2 + h];
            lower = masked<kBy, 3u << kAt>(word);
            upper = masked<kBy, 12u << kAt>(word);
        } else if constexpr (kBits == 3 && kQ < 6) {
            const uint32_t word = words[kQ / 2 * 2 + h];
            lower = masked<6 * (kQ % 2), 7>(word);
            upper = masked<6 * (kQ % 2), 7 << 3>(word);
        } else if constexpr (kBits == 3 && kQ == 6) {
            lower = masked<12, 7>(words[h]);
            upper = masked<9, 7 << 3>(words[2 + h]);
        } else if constexpr (kBits == 3) {
            lower = masked<12, 7>(words[4 + h]);
            upper = masked<12, 8>(words[h]) | masked<11, 16>(words[2 + h]) | masked<10, 32>(words[4 + h]);
        } else if constexpr (kBits == 4) {
            const uint32_t word = words[kQ / 2 * 2 + h];
            lower = masked<8 * (kQ % 2), 15>(word);
            upper = masked<8 * (kQ % 2), 15 << 4>(word);
        } else {
            const uint32_t word = words[2 * kQ + h];
            lower = __byte_perm(word, 0, 0x4240);
            upper = __byte_perm(word, 0, 0x4341);
        }
    }
}

// Two activations as the products want them.
template <typename T>
__device__ __forceinline__ uint32_t prepared(uint32_t two) {
    if constexpr (std::is_same_v<T, __half>) return two;
    const __nv_bfloat162 v = __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&two), __float2bfloat162_rn(kBeforeBf16));
    return *reinterpret_cast<const uint32_t*>(&v);
}

__device__ __forceinline__ float2 floats_of(uint32_t word, bool bf16) {
    return bf16 ? __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&word))
                : __half22float2(*reinterpret_cast<const __half2*>(&word));
}

}  // namespace qmoe::cuda
