// Deterministic inputs for the benchmarks.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

namespace qmoe::bench {

// Independent trits with the given share of zeros, signs equally likely.
inline std::vector<int8_t> random_trits(uint64_t count, double zeros, uint64_t seed = 1) {
    std::mt19937_64 generator(seed);
    std::vector<int8_t> trits(count);
    const auto zero_below = static_cast<uint32_t>(zeros * 4294967295.0);
    for (int8_t& t : trits) {
        const uint64_t r = generator();
        t = static_cast<uint32_t>(r) < zero_below ? int8_t{0} : (r >> 63) ? int8_t{1} : int8_t{-1};
    }
    return trits;
}

// One level a row, in bfloat16, spread over 0.8 to 1.25: as much as the largest weights of Gaussian rows differ.
inline std::vector<float> random_levels(uint64_t rows, uint64_t seed = 1) {
    std::mt19937_64 generator(seed);
    std::uniform_int_distribution<int> step(0x3F4D, 0x3FA0);
    std::vector<float> levels(rows);
    for (float& level : levels) level = std::bit_cast<float>(static_cast<uint32_t>(step(generator)) << 16);
    return levels;
}

// Bits per trit of the observed frequencies: what no code of independent trits can beat.
inline double empirical_entropy(const std::vector<int8_t>& trits) {
    double count[3] = {};
    for (const int8_t t : trits) count[t + 1] += 1;
    double bits = 0;
    for (const double c : count)
        if (c > 0) bits -= c / static_cast<double>(trits.size()) * std::log2(c / static_cast<double>(trits.size()));
    return bits;
}

inline std::vector<float> random_weights(uint64_t count, uint64_t seed = 1) {
    std::mt19937_64 generator(seed);
    std::normal_distribution<float> normal(0.0f, 0.02f);
    std::vector<float> weights(count);
    for (float& w : weights) w = normal(generator);
    return weights;
}

}  // namespace qmoe::bench
