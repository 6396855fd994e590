// Rounding to {low, 0, high} by error and rate, as TernaryGrid.round (python/qmoe_core/quantize/grids.py) does, operation
// by operation.
#pragma once

#include <cstdint>

namespace qmoe::cuda {

struct TernaryRounding {
    struct Result {
        int code;
        float value;
    };

    float low, high, cost_low, cost_zero, cost_high;

    // Levels and price of `row`, counted over all matrices; bits (3) of its matrix.
    __device__ TernaryRounding(const float* lows, const float* highs, const float* prices, const float* bits,
                               uint64_t row)
        : low(lows[row]), high(highs[row]) {
        cost_low = __fmul_rn(prices[row], bits[0]);
        cost_zero = __fmul_rn(prices[row], bits[1]);
        cost_high = __fmul_rn(prices[row], bits[2]);
    }
    __device__ static float error(float precision, float distance, float cost) {
        return __fadd_rn(__fmul_rn(precision, __fmul_rn(distance, distance)), cost);
    }
    __device__ Result operator()(float target, float precision) const {
        const float at_zero = error(precision, target, cost_zero);
        const float at_high = error(precision, __fsub_rn(target, high), cost_high);
        const float at_low = error(precision, __fsub_rn(target, low), cost_low);
        const bool up = at_high < at_zero, down = at_low < fminf(at_high, at_zero);
        return down ? Result{-1, low} : up ? Result{1, high} : Result{0, 0.0f};
    }
};

}  // namespace qmoe::cuda
