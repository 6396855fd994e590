// What bench_ggml and bench_kernels share, so that both measure the same: shapes, routing, inputs, the check of the
// results and the counters. Nothing here knows either side's kernels.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace qmoe::bench {

inline constexpr uint64_t kTopK = 8;
inline constexpr double kRotation = 700e6;  // bytes of weights in turn: what was read once is out of every cache

struct Shape {
    const char* name;
    uint64_t rows, cols, experts;  // N, K, E
    bool per_choice;               // x has a row for every choice of expert, not only for every token (down)
    std::vector<uint64_t> tokens;  // what is measured

    uint64_t choices() const { return experts == 1 ? 1 : kTopK; }
    uint64_t x_rows(uint64_t count) const { return per_choice ? count * choices() : count; }
};

inline const std::vector<Shape>& shapes() {
    static const std::vector<Shape> all = {
        {"linear", 4096, 14336, 1, false, {1, 8, 32, 512}},
        {"experts_up", 768, 2048, 128, false, {1, 32, 512}},
        {"experts_down", 2048, 768, 128, true, {1, 32, 512}},
    };
    return all;
}

// A whole layer of experts, gate, up, activation, down and the sum, counted as the three matrices of every expert in a
// row. Only we have it in one call; the rival's is the sum of twice experts_up and once experts_down, without the rest.
inline const Shape& layer_shape() {
    static const Shape layer = {"layer", 3 * 768, 2048, 128, false, {1, 32, 512}};
    return layer;
}

// Which experts a batch of tokens goes to.
struct Routing {
    uint64_t tokens;
    std::vector<int32_t> ids;    // (tokens, top_k)
    std::vector<float> weights;  // (tokens, top_k), each token's sum to 1
    uint64_t active;             // experts that have any token
};

// `tables` batches, each token's experts distinct and random. The tables of single tokens together go through all
// experts before one comes again, or else some would be read a second time while still in a cache.
// One expert means no routing: everything goes to it.
inline std::vector<Routing> random_routings(uint64_t tokens, uint64_t experts, uint64_t tables = 16) {
    if (experts == 1) return {{tokens, {}, {}, 1}};
    std::mt19937_64 generator(tokens);
    std::vector<int32_t> deck(experts);
    std::iota(deck.begin(), deck.end(), 0);
    uint64_t dealt = experts;
    std::vector<Routing> all(tables);
    for (Routing& routing : all) {
        routing.tokens = tokens;
        std::vector<bool> seen(experts);
        for (uint64_t t = 0; t < tokens; ++t) {
            if (tokens > 1 || dealt + kTopK > experts) {
                std::shuffle(deck.begin(), deck.end(), generator);
                dealt = 0;
            }
            for (uint64_t j = 0; j < kTopK; ++j) {
                const int32_t id = deck[dealt + j];
                seen[static_cast<uint64_t>(id)] = true;
                routing.ids.push_back(id);
                routing.weights.push_back(1.0f / static_cast<float>(kTopK));
            }
            dealt += kTopK;
        }
        routing.active = static_cast<uint64_t>(std::count(seen.begin(), seen.end(), true));
    }
    return all;
}

inline std::vector<float> random_activations(uint64_t count) {
    std::mt19937_64 generator(2);
    std::normal_distribution<float> normal;
    std::vector<float> x(count);
    for (float& value : x) value = normal(generator);
    return x;
}

// The relative error (in norm) of y[i] against the dot products of the rows of w (y.size(), K) with x (K).
inline double relative_error(std::span<const float> w, std::span<const float> x, std::span<const float> y) {
    double error = 0, norm = 0;
    for (size_t i = 0; i < y.size(); ++i) {
        double exact = 0;
        for (size_t k = 0; k < x.size(); ++k)
            exact += static_cast<double>(w[i * x.size() + k]) * static_cast<double>(x[k]);
        error += std::pow(static_cast<double>(y[i]) - exact, 2);
        norm += exact * exact;
    }
    return std::sqrt(error / norm);
}

// Both sides may round activations to 8 bits, no worse.
inline void check_error(double error) {
    if (!(error < 0.02)) throw std::runtime_error("wrong by " + std::to_string(error));
}

// What one run went through; the rates are per second.
struct Work {
    double weights = 0, flops = 0, bytes = 0;

    // One call: the weights of every active expert are read once at least, all choices multiplied.
    void add(const Shape& shape, const Routing& routing, double expert_bytes) {
        const double active = static_cast<double>(routing.active), size = static_cast<double>(shape.rows * shape.cols);
        weights += active * size;
        bytes += active * expert_bytes;
        flops += 2 * size * static_cast<double>(routing.tokens * shape.choices());
    }
    void report(benchmark::State& state) const {
        using benchmark::Counter;
        state.counters["weights"] = Counter(weights, Counter::kIsRate);
        state.counters["flops"] = Counter(flops, Counter::kIsRate);
        state.counters["stored_bytes"] = Counter(bytes, Counter::kIsRate);
    }
};

// LINEAR/TYPE/BUFFER/tokens:M/threads:T
inline std::string cell_name(const Shape& shape, const std::string& type, const std::string& buffer, uint64_t tokens,
                             int threads) {
    return std::string(shape.name) + "/" + type + "/" + buffer + "/tokens:" + std::to_string(tokens) +
           "/threads:" + std::to_string(threads);
}

inline bool& failed() {
    static bool any = false;
    return any;
}

// Registers one cell. `body` throws on any error: the cell is then reported as failed and the program exits with 1.
template <typename Body>
void add(const std::string& name, Body body) {
    benchmark::RegisterBenchmark(name.c_str(),
                                 [body](benchmark::State& state) {
                                     try {
                                         body(state);
                                     } catch (const std::exception& error) {
                                         failed() = true;
                                         state.SkipWithError(error.what());
                                     }
                                 })
        ->UseRealTime()
        ->Unit(benchmark::kMillisecond);
}

// The value of our own option `--NAME=NUMBER`, which is taken out of the arguments; exits with 2 if it is no number.
inline uint64_t option(int& argc, char** argv, const std::string& name, uint64_t otherwise) {
    const std::string prefix = "--" + name + "=";
    for (int i = 1; i < argc; ++i) {
        const std::string_view argument = argv[i];
        if (!argument.starts_with(prefix)) continue;
        const auto [end, error] =
            std::from_chars(argument.data() + prefix.size(), argument.data() + argument.size(), otherwise);
        if (error != std::errc() || end != argument.data() + argument.size() || otherwise == 0) {
            std::fprintf(stderr, "%s: not a positive number\n", argv[i]);
            std::exit(2);
        }
        std::rotate(argv + i, argv + i + 1, argv + argc);
        --argc;
        break;
    }
    return otherwise;
}

inline int run(int argc, char** argv) {
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
    const size_t count = benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
    return failed() || count == 0 ? 1 : 0;
}

// How many copies of `bytes` of weights are needed to rotate; the option --copies says otherwise (tests).
inline uint64_t& forced_copies() {
    static uint64_t copies = 0;
    return copies;
}
inline uint64_t copies_of(uint64_t bytes) {
    if (forced_copies() > 0) return forced_copies();
    return static_cast<uint64_t>(std::ceil(kRotation / static_cast<double>(bytes)));
}

}  // namespace qmoe::bench
