// Operands of the tensor cores from ternary codes in tiles, two bits each: 0, 1 for a plus, 2 for a minus.
//
// A tile is 16 rows, cut into blocks of 128 columns, of which a row has 32 bytes, a code of a lower column at lower bits: as
// little as memory takes at once, since rows come one by one, in the order of their streams. Behind a tile's last block its rows' levels:
// bfloat16 of a plus | of a minus << 16. A weight is two of the eight bytes [0 0 plus plus minus minus minus minus]; a byte
// permutation makes two weights of a lane out of that.
#pragma once

#include "common.cuh"
#include "gemm/matrix.cuh"

namespace qmoe::cuda {

struct TernaryTiles {
    static constexpr uint32_t kRowBytes = kTileColumns / 4, kBlockBytes = kTileRows * kRowBytes,
                              kLevelsBytes = kTileRows * 4;
};

// The two levels of a row, as the eight bytes that a weight is chosen from, and what sums are to be multiplied by.
struct TernaryLevels {
    uint32_t zero_plus = 0, minus_minus = 0;
    float scale = 1.0f;

    TernaryLevels() = default;
    template <typename T>
    static __device__ __forceinline__ TernaryLevels of(uint32_t levels) {
        TernaryLevels out;
        if constexpr (std::is_same_v<T, __nv_bfloat16>) {
            out.zero_plus = levels << 16;
            out.minus_minus = __byte_perm(levels, 0, 0x3232);
        } else {
            // float16 has more digits than bfloat16 and fewer exponents: the larger one becomes 1 to 2.
            const uint32_t plus = levels & 0x7f80, minus = levels >> 16 & 0x7f80,
                           exponent = plus > minus ? plus : minus;
            const uint32_t most = exponent > 0x7f00 - 0x80 ? 0x7f00 - 0x80 : exponent < 0x80 ? 0x80 : exponent;
            out.scale = __uint_as_float(most << 16);  // 2^(e - 127)
            const float inverse = __uint_as_float((0x7f00 - most) << 16);
            const __half two[2] = {__float2half_rn(__uint_as_float(levels << 16) * inverse),
                                   __float2half_rn(__uint_as_float(levels & 0xffff0000u) * inverse)};
            const uint32_t pair = *reinterpret_cast<const uint32_t*>(two);
            out.zero_plus = pair << 16;
            out.minus_minus = __byte_perm(pair, 0, 0x3232);
        }
        return out;
    }
    __device__ __forceinline__ uint32_t pair(uint32_t bytes) const { return permuted(zero_plus, minus_minus, bytes); }
};

// A lane's codes of a tile's block, as IntWeights.
template <typename T>
class TernaryWeights {
  public:
    struct Shape {
        __device__ __forceinline__ explicit Shape(const TiledMatrix&) {}
    };
    __device__ __forceinline__ void begin(const Shape&, const TiledMatrix& p, const uint8_t* tile, uint32_t g) {
        const auto* const levels =
            reinterpret_cast<const uint32_t*>(tile + p.tile_bytes - TernaryTiles::kLevelsBytes) + g;
#pragma unroll
        for (uint32_t r = 0; r < 2; ++r) levels_[r] = TernaryLevels::of<T>(levels[8 * r]);
    }
    static constexpr bool kHasHalves = true;
    template <int kHalf>
    __device__ __forceinline__ void load(const Shape&, const uint8_t* block, uint32_t lane) {
        shift_ = lane % 4 * 4;
#pragma unroll
        for (uint32_t r = 0; r < 2; ++r)
            *reinterpret_cast<uint4*>(words_[r] + 4 * kHalf) =
                *reinterpret_cast<const uint4*>(block + (lane / 4 + 8 * r) * TernaryTiles::kRowBytes + kHalf * 16);
    }
    template <int kQ>
    __device__ __forceinline__ void operand(const Shape&, uint32_t (&a)[4]) const {
#pragma unroll
        for (uint32_t r = 0; r < 2; ++r) {
            // Two codes of columns 2 t and 2 t + 1, and of the two 8 further; then each in a byte; then which bytes.
            const uint32_t twos = words_[r][kQ] >> shift_ & 0x000f000f;
            const uint32_t bytes = (twos * 0x41 & 0x03030303) * 0x22 + 0x10101010;
            a[r] = levels_[r].pair(bytes), a[2 + r] = levels_[r].pair(bytes >> 16);
        }
    }
    __device__ __forceinline__ float scale(uint32_t r) const {
        return levels_[r].scale;
    }

  private:
    alignas(16) uint32_t words_[2][8];
    uint32_t shift_;
    TernaryLevels levels_[2];
};

}  // namespace qmoe::cuda
