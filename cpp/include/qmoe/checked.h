// Overflow-checked 64-bit arithmetic: the only arithmetic allowed on numbers that come from a file.
#pragma once

#include <cstdint>

namespace qmoe {

[[nodiscard]] inline bool checked_add(uint64_t a, uint64_t b, uint64_t& out) noexcept {
    return !__builtin_add_overflow(a, b, &out);
}

[[nodiscard]] inline bool checked_mul(uint64_t a, uint64_t b, uint64_t& out) noexcept {
    return !__builtin_mul_overflow(a, b, &out);
}

// Rounds up to a multiple of `unit`; false when the result does not fit.
[[nodiscard]] inline bool checked_round_up(uint64_t a, uint64_t unit, uint64_t& out) noexcept {
    uint64_t biased = 0;
    if (!checked_add(a, unit - 1, biased)) return false;
    out = biased / unit * unit;
    return true;
}

constexpr uint64_t ceil_div(uint64_t a, uint64_t b) noexcept {
    return a / b + (a % b != 0);
}

}  // namespace qmoe
