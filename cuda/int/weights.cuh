// Operands of the tensor cores from codes in tiles.h's layout, scales included: (code - zero) * scale, rounded to T.
//
// Codes are masked where they are in a half of a word, kUp bits above its lowest one; that factor goes into what they are
// multiplied by. In float16 the bits of 1024 beside a code make it 1024 + code 2^kUp; taking off 1024 and the integer next
// to zero is exact. In bfloat16 a code is the number that it is as bits, code 2^(kUp - 133): see operands.cuh. Where zero is
// a power of two, zero * scale is exact, and so one instruction makes an operand. These are 2^-53 of what is asked for, so
// that scales up to 2^47 do not overflow on the way, and sums are multiplied by 2^53; of scales below 2^-73 digits are lost.
// Scales are rounded to T once. A whole row's scale stays out of it: sums are multiplied by it.
#pragma once

#include "common.cuh"
#include "gemm/matrix.cuh"
#include "int/operands.cuh"

namespace qmoe::cuda {

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

// Which codes and groups there is code for: all; those of which a block is one group, or a row is; those of them without
// stored zeros or half steps, where zero is 2^(kBits - 1).
enum class IntForm { kAny, kWhole, kPlain };

// What the codes of a row g + 8 kRow mean, in a group.
template <typename T, int kBits, bool kPlain, int kRow>
class IntGrid {
  public:
    // Sums are multiplied by it.
    static constexpr float kBehind = std::is_same_v<T, __half> ? 1.0f : 9007199254740992.0f;  // 2^53

    __device__ __forceinline__ void set_zero(float zero) {
        const float whole = kPlain ? zero : fminf(fmaxf(rintf(zero), 0.0f), 255.0f);
        fraction_ = whole - zero;
        whole_ = whole;
        if constexpr (!kOneStep)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                minus_[i] = kIsHalf ? pair_of(-(1024.0f * part_of(up_of(i)) + whole))
                                    : pair_of(-whole * kSubnormal / part_of(up_of(i)));
    }
    __device__ __forceinline__ void set_scale(float scale) {
        const float rounded = to_float(from_float<T>(scale));
        rest_ = kIsHalf ? pair_of(fraction_ * scale)
                        : pair_of((kOneStep ? -whole_ : fraction_) * rounded * kTaken * kSubnormal);
#pragma unroll
        for (int i = 0; i < 2; ++i) scales_[i] = pair_of(kIsHalf ? scale : rounded * kTaken * part_of(up_of(i)));
    }
    // The same of kPlain grids in bfloat16, of a scale that is rounded already, twice: only its exponent changes.
    static constexpr bool kTakesPair = kPlain && std::is_same_v<T, __nv_bfloat16>;
    __device__ __forceinline__ void set_scale(uint32_t pair) {
        const auto times = [&](float power) {
            return __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&pair), __float2bfloat162_rn(power));
        };
        rest_ = times(-static_cast<float>(1 << (kBits - 1)) * (kTaken * kSubnormal));
#pragma unroll
        for (int i = 0; i < 2; ++i) scales_[i] = times(kTaken * part_of(up_of(i)));
    }
    // Of codes at bits kAt and kAt + 16 of a word.
    template <int kAt>
    __device__ __forceinline__ uint32_t at(uint32_t word) const {
        if constexpr (kBits == 8) {
            return value<0>(permuted(word, kMagic, 0x5050 | (kAt / 8 + 2) << 8 | kAt / 8));
        } else {
            constexpr int kUp = kBits == 3 ? kAt % 6 : kAt % 8;
            constexpr uint32_t kMask = (((1u << kBits) - 1) << kUp) * 0x00010001u;
            if constexpr (kIsHalf) return value<kUp>(masked_or<kMask>(word >> (kAt - kUp), kMagic));
            return value<kUp>(word >> (kAt - kUp) & kMask);
        }
    }
    // Of codes at the lowest bits of both halves.
    __device__ __forceinline__ uint32_t of_codes(uint32_t codes) const {
        return value<0>(codes | kMagic);
    }

  private:
    static constexpr bool kIsHalf = std::is_same_v<T, __half>;
    using Pair = std::conditional_t<kIsHalf, __half2, __nv_bfloat162>;
    static constexpr uint32_t kMagic = kIsHalf ? 0x64006400 : 0;  // 1024, 1024
    static constexpr bool kOneStep = kPlain && !kIsHalf;
    static constexpr float kTaken = 1208925819614629174706176.0f;             // 2^80
    static constexpr float kSubnormal = 1.0f / kTaken / 9007199254740992.0f;  // 2^-133
    // Where codes can be.
    static constexpr __host__ __device__ int up_of(int i) {
        return i == 0 ? (kBits == 8 ? 0 : kBits * kRow) : kBits == 2 ? 2 * kRow + 4 : 0;
    }
    static constexpr __host__ __device__ float part_of(int up) {
        return 1.0f / static_cast<float>(1 << up);
    }

    static __device__ __forceinline__ Pair pair_of(float value) {
        const T one = from_float<T>(value);
        return {one, one};
    }
    template <int kUp>
    __device__ __forceinline__ uint32_t value(uint32_t bits) const {
        constexpr int kIndex = kUp == up_of(0) ? 0 : 1;
        static_assert(kUp == up_of(kIndex));
        Pair pair = *reinterpret_cast<const Pair*>(&bits);
        if constexpr (kIsHalf)
            pair = kUp == 0 ? __hadd2(pair, minus_[kIndex]) : __hfma2(pair, pair_of(part_of(kUp)), minus_[kIndex]);
        else if constexpr (!kOneStep)
            pair = __hadd2(pair, minus_[kIndex]);
        pair = __hfma2(pair, scales_[kIndex], rest_);
        return *reinterpret_cast<const uint32_t*>(&pair);
    }

    Pair minus_[2], scales_[2], rest_;  // by up_of()
    float whole_, fraction_;
};

// A lane's codes of a tile's block.
template <typename T, int kBits, IntForm kForm>
class IntWeights {
    static constexpr bool kWhole = kForm != IntForm::kAny;

  public:
    // What is the same for all tiles, in registers.
    struct Shape {
        bool row_groups, has_zeros, bf16_scales;
        uint32_t groups;
        float zero;

        __device__ __forceinline__ explicit Shape(const TiledMatrix& p)
            : row_groups(p.row_groups),
              has_zeros(kForm != IntForm::kPlain && p.has_zeros),
              bf16_scales(kept(p.bf16_scales)),
              groups(kWhole ? 1 : p.groups),
              zero(kForm == IntForm::kPlain ? static_cast<float>(1 << (kBits - 1)) : p.zero) {}
    };

    // `tile`: in memory; `g`: lane / 4.
    __device__ __forceinline__ void begin(const Shape& shape, const TiledMatrix& p, const uint8_t* tile, uint32_t g) {
        float2 zero{shape.zero, shape.zero};
        if (shape.row_groups) {
            const uint8_t* const behind = tile + p.tile_bytes - (shape.has_zeros ? 64 : 32) + g * 4;
            row_scale_ = floats_of(*reinterpret_cast<const uint32_t*>(behind), shape.bf16_scales);
            if (shape.has_zeros) zero = floats_of(*reinterpret_cast<const uint32_t*>(behind + 32), false);
        }
        lower_.set_zero(zero.x), upper_.set_zero(zero.y);
        lower_.set_scale(1.0f), upper_.set_scale(1.0f);
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
                lower_.set_zero(zero.x), upper_.set_zero(zero.y);
            }
            if constexpr (Lower::kTakesPair) {
                uint32_t both = scales_[kGroup];
                if (!shape.bf16_scales) {
                    const float2 scale = floats_of(both, false);
                    const __nv_bfloat162 rounded = __floats2bfloat162_rn(scale.x, scale.y);
                    both = *reinterpret_cast<const uint32_t*>(&rounded);
                }
                lower_.set_scale(permuted(both, both, 0x1010)), upper_.set_scale(permuted(both, both, 0x3232));
            } else {
                const float2 scale = floats_of(scales_[kGroup], shape.bf16_scales);
                lower_.set_scale(scale.x), upper_.set_scale(scale.y);
            }
        }
        pairs<kQ, 0>(a), pairs<kQ, 1>(a);
    }
    // Of row g + 8 r: what sums are to be multiplied by.
    __device__ __forceinline__ float scale(uint32_t r) const {
        return (r == 0 ? row_scale_.x : row_scale_.y) * Lower::kBehind;
    }

  private:
    static constexpr uint32_t kGroups = kWhole ? 1 : 4;
    using Lower = IntGrid<T, kBits, kForm == IntForm::kPlain, 0>;

    template <int kQ, int kH>
    __device__ __forceinline__ void pairs(uint32_t (&a)[4]) const {
        uint32_t &lower = a[2 * kH], &upper = a[2 * kH + 1];
        if constexpr (kBits == 2) {
            constexpr int kAt = 8 * (kQ / 2 % 2) + 4 * (kQ % 2);
            const uint32_t word = words_[kQ / 4 * 2 + kH];
            lower = lower_.template at<kAt>(word), upper = upper_.template at<kAt + 2>(word);
        } else if constexpr (kBits == 3 && kQ < 6) {
            const uint32_t word = words_[kQ / 2 * 2 + kH];
            lower = lower_.template at<6 * (kQ % 2)>(word), upper = upper_.template at<6 * (kQ % 2) + 3>(word);
        } else if constexpr (kBits == 3 && kQ == 6) {
            lower = lower_.template at<12>(words_[kH]), upper = upper_.template at<12>(words_[2 + kH]);
        } else if constexpr (kBits == 3) {
            lower = lower_.template at<12>(words_[4 + kH]);
            upper = upper_.of_codes(masked<15, 1>(words_[kH]) | masked<14, 2>(words_[2 + kH]) |
                                    masked<13, 4>(words_[4 + kH]));
        } else if constexpr (kBits == 4) {
            const uint32_t word = words_[kQ / 2 * 2 + kH];
            lower = lower_.template at<8 * (kQ % 2)>(word), upper = upper_.template at<8 * (kQ % 2) + 4>(word);
        } else {
            const uint32_t word = words_[2 * kQ + kH];
            lower = lower_.template at<0>(word), upper = upper_.template at<8>(word);
        }
    }

    alignas(16) uint32_t words_[2 * kBits];
    uint32_t scales_[kGroups], zeros_[kGroups];
    float2 row_scale_{1.0f, 1.0f};
    Lower lower_;
    IntGrid<T, kBits, kForm == IntForm::kPlain, 1> upper_;
};

}  // namespace qmoe::cuda
