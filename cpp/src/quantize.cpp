#include "qmoe/quantize.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "half.h"
#include "qmoe/checked.h"

namespace qmoe {
namespace {

float round_scale(float scale, ScaleType type) noexcept {
    switch (type) {
        case ScaleType::kFloat16: return half_to_float(float_to_half(scale));
        case ScaleType::kBfloat16: return bfloat_to_float(float_to_bfloat(scale));
        case ScaleType::kFloat32: return scale;
    }
    return scale;
}

// Rounds |x| < 2^22 to nearest even in plain additions, which vectorise on every instruction set (nearbyint does not on
// SSE2).
inline float round_even(float x) noexcept {
    constexpr float kMagic = 0x1.8p23f;
    return (x + kMagic) - kMagic;
}

struct Range {
    float low, high;
    bool finite;
};

// Minimum and maximum, in 16 strands so that compilers vectorise without reassociating. NaN and infinity stick in
// `probe`.
Range find_range(const float* w, uint64_t n) noexcept {
    constexpr uint64_t kStrands = 16;
    float low[kStrands], high[kStrands], probe[kStrands];
    for (uint64_t s = 0; s < kStrands; ++s) low[s] = high[s] = probe[s] = 0.0f;
    uint64_t i = 0;
    for (; i + kStrands <= n; i += kStrands)
        for (uint64_t s = 0; s < kStrands; ++s) {
            const float x = w[i + s];
            low[s] = x < low[s] ? x : low[s];
            high[s] = x > high[s] ? x : high[s];
            probe[s] += x * 0.0f;
        }
    for (; i < n; ++i) {
        low[0] = std::min(low[0], w[i]);
        high[0] = std::max(high[0], w[i]);
        probe[0] += w[i] * 0.0f;
    }
    Range range{0.0f, 0.0f, true};
    for (uint64_t s = 0; s < kStrands; ++s) {
        range.low = std::min(range.low, low[s]);
        range.high = std::max(range.high, high[s]);
        range.finite &= probe[s] == 0.0f;
    }
    return range;
}

}  // namespace

Status quantize_rtn(const float* weight, uint64_t rows, uint64_t cols, uint32_t bits, uint32_t group,
                    ScaleType scale_type, bool half_step, uint8_t* codes, float* scales,
                    std::span<uint8_t> zeros) noexcept {
    if (bits != 2 && bits != 3 && bits != 4 && bits != 8)
        return Status::error(Code::kUnknown, "rtn: bits must be 2, 3, 4 or 8");
    if (rows == 0 || cols == 0) return Status::error(Code::kShape, "rtn: empty matrix");
    const uint64_t width = group == 0 ? cols : group, groups = ceil_div(cols, width);
    if (!zeros.empty() && zeros.size() != rows * groups)
        return Status::mismatch(Code::kShape, "rtn: number of zero points", 0, rows * groups, zeros.size());
    const float top = static_cast<float>((1u << bits) - 1), half = half_step ? 0.5f : 0.0f,
                middle = static_cast<float>(1u << (bits - 1)) - half;
    for (uint64_t r = 0; r < rows; ++r)
        for (uint64_t g = 0; g < groups; ++g) {
            const uint64_t begin = g * width, n = std::min(width, cols - begin);
            const float* const w = weight + r * cols + begin;
            const Range range = find_range(w, n);
            if (!range.finite)
                return Status::mismatch(Code::kValue, "rtn: a weight is NaN or infinite; row", (r * cols + begin) * 4,
                                        0, r);
            float scale;
            if (zeros.empty()) {
                scale = (range.high > -range.low ? -range.high : -range.low) / middle;
                if (half_step) scale = std::abs(scale);  // both sides of the grid are equally long
            } else {
                scale = (range.high - range.low) / top;
            }
            scale = round_scale(scale, scale_type);
            if (!std::isfinite(scale))
                return Status::mismatch(Code::kValue, "rtn: a scale overflows its type; row", (r * cols + begin) * 4, 0,
                                        r);
            // All weights zero, or so small that the scale vanished: any positive scale encodes exact zeros where a
            // code is worth zero, and elsewhere only the scale 0 does.
            const bool vanished = scale == 0.0f;
            if (vanished) scale = 1.0f;
            float zero = middle;
            if (!zeros.empty()) {
                const float stored = std::clamp(round_even(-range.low / scale - half), 0.0f, top);
                zeros[r * groups + g] = static_cast<uint8_t>(stored);
                zero = stored + half;
            }
            scales[r * groups + g] = vanished && half_step ? 0.0f : scale;
            uint8_t* const c = codes + r * cols + begin;
            for (uint64_t i = 0; i < n; ++i) {
                float q = round_even(w[i] / scale + zero);
                q = q < 0.0f ? 0.0f : q;
                q = q > top ? top : q;
                c[i] = static_cast<uint8_t>(static_cast<int32_t>(q));
            }
        }
    return {};
}

}  // namespace qmoe
