// Operands of the tensor cores from codes in tiles.h's layout, scales included: (code - zero) * scale, rounded to T.
//
// A code at the lowest bits of a half beside the bits of 2^m, m the number of T's digits, is 2^m + code; taking off 2^m and
// the integer next to zero is exact. bfloat16 has too few digits for codes of 8 bits, which go by way of float32. Scales
// are rounded to T once. A whole row's scale stays out of it: sums are multiplied by it.
#pragma once

#include "common.cuh"
#include "gemm/matrix.cuh"
#include "int/operands.cuh"

namespace qmoe::cuda {

template <typename T>
struct PairOf {
    using Type = __nv_bfloat162;
    static constexpr uint32_t kMagic = 0x43004300;  // 128, 128
    static constexpr float kMagicValue = 128.0f, kMostZero = 127.0f;
};
template <>
struct PairOf<__half> {
    using Type = __half2;
    static constexpr uint32_t kMagic = 0x64006400;  // 1024, 1024
    static constexpr float kMagicValue = 1024.0f, kMostZero = 255.0f;
};

// (bits & kMask) | more: one instruction where `more` is in a register, which this sees to.
template <uint32_t kMask>
__device__ __forceinline__ uint32_t masked_or(uint32_t bits, uint32_t more) {
#ifdef __CUDA_ARCH__
    uint32_t out;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(bits), "n"(kMask), "r"(more));
    return out;
#else
    return (bits & kMask) | more;
#endif
}

// What a row's codes of a group mean.
template <typename T, int kBits>
class IntGrid {
  public:
    __device__ __forceinline__ void set_zero(float zero) {
        if constexpr (kByFloats) {
            fraction_ = -zero;
        } else {
            const float whole = fminf(fmaxf(rintf(zero), 0.0f), PairOf<T>::kMostZero);
            minus_ = pair_of(-(PairOf<T>::kMagicValue + whole));
            fraction_ = whole - zero;
        }
    }
    __device__ __forceinline__ void set_scale(float scale) {
        if constexpr (kByFloats)
            scale_ = scale, rest_ = fraction_ * scale;
        else
            scale_ = pair_of(scale), rest_ = pair_of(fraction_ * scale);
    }
    // Of codes at bits kAt and kAt + 16 of a word.
    template <int kAt>
    __device__ __forceinline__ uint32_t at(uint32_t word) const {
        if constexpr (kBits == 8) {
            constexpr uint32_t kFirst = kAt / 8, kSecond = kFirst + 2;
            if constexpr (kByFloats) {
                constexpr uint32_t kFloat = 0x4b000000;  // 2^23
                const float first = __uint_as_float(permuted(word, kFloat, 0x7540 | kFirst)),
                            second = __uint_as_float(permuted(word, kFloat, 0x7540 | kSecond));
                const __nv_bfloat162 both = __floats2bfloat162_rn(fmaf(first - 8388608.0f, scale_, rest_),
                                                                  fmaf(second - 8388608.0f, scale_, rest_));
                return *reinterpret_cast<const uint32_t*>(&both);
            } else {
                return value(permuted(word, PairOf<T>::kMagic, 0x5050 | kSecond << 8 | kFirst));
            }
        } else {
            return value(masked_or<((1u << kBits) - 1) * 0x00010001u>(word >> kAt, PairOf<T>::kMagic));
        }
    }
    // Of codes at the lowest bits of both halves.
    __device__ __forceinline__ uint32_t of_codes(uint32_t codes) const { return value(codes | PairOf<T>::kMagic); }

  private:
    using Pair = typename PairOf<T>::Type;
    static constexpr bool kByFloats = kBits == 8 && std::is_same_v<T, __nv_bfloat16>;
    using Number = std::conditional_t<kByFloats, float, Pair>;

    static __device__ __forceinline__ Pair pair_of(float value) {
        const T one = from_float<T>(value);
        return {one, one};
    }
    __device__ __forceinline__ uint32_t value(uint32_t bits) const {
        if constexpr (kByFloats) {
            return 0;
        } else {
            const Pair made = __hfma2(__hadd2(*reinterpret_cast<const Pair*>(&bits), minus_), scale_, rest_);
            return *reinterpret_cast<const uint32_t*>(&made);
        }
    }

    Number minus_, scale_, rest_;
    float fraction_;
};

// A lane's codes of a tile's block. kWhole: a block is one group, or a row is.
template <typename T, int kBits, bool kWhole>
class IntWeights {
  public:
    // What is the same for all tiles, in registers.
    struct Shape {
        bool row_groups, has_zeros, bf16_scales;
        uint32_t groups;
        float zero;

        __device__ __forceinline__ explicit Shape(const TiledMatrix& p)
            : row_groups(p.row_groups),
              has_zeros(p.has_zeros),
              bf16_scales(p.bf16_scales),
              groups(kWhole ? 1 : p.groups),
              zero(p.zero) {}
    };

    // `tile`: in memory; `g`: lane / 4.
    __device__ __forceinline__ void begin(const Shape& shape, const TiledMatrix& p, const uint8_t* tile, uint32_t g) {
        float2 zero{shape.zero, shape.zero};
        if (shape.row_groups) {
            const uint8_t* const behind = tile + p.tile_bytes - (shape.has_zeros ? 64 : 32) + g * 4;
            row_scale_ = floats_of(*reinterpret_cast<const uint32_t*>(behind), shape.bf16_scales);
            if (shape.has_zeros) zero = floats_of(*reinterpret_cast<const uint32_t*>(behind + 32), false);
        }
        grids_[0].set_zero(zero.x), grids_[1].set_zero(zero.y);
        grids_[0].set_scale(1.0f), grids_[1].set_scale(1.0f);
    }
    // Half kHalf of a block, which is in shared memory. With kHasHalves it leaves the other half's operands as they were.
    static constexpr bool kHasHalves = kBits != 3;
    template <int kHalf>
    __device__ __forceinline__ void load(const Shape& shape, const uint8_t* block, uint32_t lane) {
        if constexpr (kHasHalves)
            load_half_words<kBits, kHalf>(block, lane, words_);
        else if constexpr (kHalf == 0)
            load_words<kBits>(block, lane, words_);
        if (shape.row_groups || kHalf >= kGroups) return;
        constexpr uint32_t kOwn = kGroups == 1 ? 1 : kGroups / 2;
        const auto* const scales =
            reinterpret_cast<const uint32_t*>(block + 2 * kBits * 4 * kLanes) + lane / 4 * shape.groups;
#pragma unroll
        for (uint32_t i = kHalf * kOwn; i < (kHalf + 1) * kOwn; ++i) {
            const uint32_t group = kWhole || shape.groups == kGroups ? i : i / 2;
            scales_[i] = scales[group];
            if (shape.has_zeros) zeros_[i] = scales[group + shape.groups * (kTileRows / 2)];
        }
    }
    // The operand of columns 16 kQ .. 16 kQ + 15.
    template <int kQ>
    __device__ __forceinline__ void operand(const Shape& shape, uint32_t (&a)[4]) {
        constexpr int kGroupProducts = 8 / kGroups;
        if (kQ % kGroupProducts == 0 && !shape.row_groups) {
            constexpr int kGroup = kQ / kGroupProducts;
            if (shape.has_zeros) {
                const float2 zero = floats_of(zeros_[kGroup], false);
                grids_[0].set_zero(zero.x), grids_[1].set_zero(zero.y);
            }
            const float2 scale = floats_of(scales_[kGroup], shape.bf16_scales);
            grids_[0].set_scale(scale.x), grids_[1].set_scale(scale.y);
        }
        pairs<kQ, 0>(a), pairs<kQ, 1>(a);
    }
    // Of row g + 8 r: what sums are to be multiplied by.
    __device__ __forceinline__ float scale(uint32_t r) const {
        return r == 0 ? row_scale_.x : row_scale_.y;
    }

  private:
    static constexpr uint32_t kGroups = kWhole ? 1 : 4;

    template <int kQ, int kH>
    __device__ __forceinline__ void pairs(uint32_t (&a)[4]) const {
        uint32_t &lower = a[2 * kH], &upper = a[2 * kH + 1];
        if constexpr (kBits == 2) {
            constexpr int kAt = 8 * (kQ / 2 % 2) + 4 * (kQ % 2);
            const uint32_t word = words_[kQ / 4 * 2 + kH];
            lower = grids_[0].template at<kAt>(word), upper = grids_[1].template at<kAt + 2>(word);
        } else if constexpr (kBits == 3 && kQ < 6) {
            const uint32_t word = words_[kQ / 2 * 2 + kH];
            lower = grids_[0].template at<6 * (kQ % 2)>(word), upper = grids_[1].template at<6 * (kQ % 2) + 3>(word);
        } else if constexpr (kBits == 3 && kQ == 6) {
            lower = grids_[0].template at<12>(words_[kH]), upper = grids_[1].template at<12>(words_[2 + kH]);
        } else if constexpr (kBits == 3) {
            lower = grids_[0].template at<12>(words_[4 + kH]);
            upper = grids_[1].of_codes(masked<15, 1>(words_[kH]) | masked<14, 2>(words_[2 + kH]) |
                                       masked<13, 4>(words_[4 + kH]));
        } else if constexpr (kBits == 4) {
            const uint32_t word = words_[kQ / 2 * 2 + kH];
            lower = grids_[0].template at<8 * (kQ % 2)>(word), upper = grids_[1].template at<8 * (kQ % 2) + 4>(word);
        } else {
            const uint32_t word = words_[2 * kQ + kH];
            lower = grids_[0].template at<0>(word), upper = grids_[1].template at<8>(word);
        }
    }

    alignas(16) uint32_t words_[2 * kBits];
    uint32_t scales_[kGroups], zeros_[kGroups];
    float2 row_scale_{1.0f, 1.0f};
    IntGrid<T, kBits> grids_[2];
};

}  // namespace qmoe::cuda
