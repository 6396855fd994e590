// Reading memory as fast as possible, and what share of that a product reaches.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <vector>

#include "cpu/pool.h"

namespace qmoe::bench {

typedef uint64_t Line __attribute__((vector_size(64), may_alias));

// Reads S streams of `length` bytes that start `stride` apart, a line of each in turn. Lines are summed in registers: a
// sum in memory (which is what DoNotOptimize would make of them in this loop) is slower than the reading.
template <uint64_t S>
uint64_t read_streams(const char* data, uint64_t length, uint64_t stride, uint64_t ahead, bool to_l1) {
    Line sum[S] = {};
    for (uint64_t at = 0; at < length; at += sizeof(Line))
#pragma GCC unroll 8
        for (uint64_t s = 0; s < S; ++s) {
            const char* p = data + s * stride + at;
            if (to_l1)  // behind the end it does nothing
                __builtin_prefetch(p + ahead, 0, 3);
            else
                __builtin_prefetch(p + ahead, 0, 2);
            sum[s] |= *reinterpret_cast<const Line*>(p);
        }
    for (uint64_t s = 1; s < S; ++s) sum[0] |= sum[s];
    return sum[0][0] ^ sum[0][7];
}

inline double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline double median(std::vector<double> values) {
    std::nth_element(values.begin(), values.begin() + static_cast<ptrdiff_t>(values.size() / 2), values.end());
    return values[values.size() / 2];
}

// A product's share of the read limit. What memory delivers changes by the second where a machine is shared (two threads
// read 37 or 65 GB/s within one minute), so every product is followed at once by a read of as many cold bytes on as many
// threads, in one of several ways in turn. The share is the median of the ratios, beside the way that reads fastest.
class ReadLimit {
  public:
    // After a product that took `seconds`; `data` holds `bytes`.
    void follow(double seconds, const uint8_t* data, uint64_t bytes, int threads) {
        const size_t way = turn_++ % kWays.size();
        const double begin = seconds_now();
        parallel_for(static_cast<uint64_t>(threads), threads, [&](uint64_t t) {
            const uint64_t part = bytes / static_cast<uint64_t>(threads) / 512 * 512;
            benchmark::DoNotOptimize(kWays[way](reinterpret_cast<const char*>(data) + t * part, part));
        });
        const double took = seconds_now() - begin;
        rates_[way].push_back(static_cast<double>(bytes) / took);
        shares_[way].push_back(took / seconds);
    }
    void report(benchmark::State& state) const {
        double share = 0, rate = 0;
        for (size_t way = 0; way < kWays.size(); ++way) {
            if (shares_[way].empty()) continue;
            if (const double here = median(rates_[way]); here > rate) rate = here, share = median(shares_[way]);
        }
        if (rate == 0) return;
        state.counters["read_limit"] = rate;
        state.counters["share_of_read_limit"] = share;
    }

  private:
    template <uint64_t S, uint64_t Ahead>
    static uint64_t read(const char* data, uint64_t bytes) {
        return read_streams<S>(data, bytes / S, bytes / S, Ahead, false);
    }
    static constexpr std::array<uint64_t (*)(const char*, uint64_t), 4> kWays = {read<1, 2048>, read<1, 4096>,
                                                                                 read<4, 1024>, read<8, 2048>};
    uint64_t turn_ = 0;
    std::array<std::vector<double>, kWays.size()> rates_, shares_;
};

}  // namespace qmoe::bench
