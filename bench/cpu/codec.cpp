// Speed of the codecs on one core, in weights per second (items_per_second), and bits per weight of what they write.
//
//   cmake -S . -B build-bench -DQMOE_BENCH=ON && cmake --build build-bench && build-bench/bench/cpu/bench_codec
//
// For ternary the bits count everything: header, specs, entries, levels, offsets, lane states, padding, checksums.
#include <benchmark/benchmark.h>

#include "formats/ternary.h"
#include "qmoe/quantize.h"
#include "qmoe/record.h"
#include "samples.h"

namespace qmoe::bench {
namespace {

constexpr uint64_t kRows = 1366, kCols = 768;  // just over a million weights, the narrowest matrix promised

void rtn_and_pack(benchmark::State& state) {
    const uint64_t rows = 1024, cols = 2048;
    const auto bits = static_cast<uint32_t>(state.range(0));
    const auto weights = random_weights(rows * cols);
    std::vector<uint8_t> codes(rows * cols), zeros(rows * cols / 128), out;
    std::vector<float> scales(zeros.size());
    for (auto _ : state) {
        if (!quantize_rtn(weights.data(), rows, cols, bits, 128, ScaleType::kFloat16, false, codes.data(),
                          scales.data(), zeros)
                 .ok())
            state.SkipWithError("quantize_rtn");
        MatrixInput in;
        in.format = 1;
        in.rows = rows;
        in.cols = cols;
        in.bits = static_cast<uint8_t>(bits);
        in.group = 128;
        in.scale_dtype = static_cast<uint8_t>(ScaleType::kFloat16);
        in.codes = codes;
        in.scales = scales;
        in.zeros = zeros;
        if (!build_record({&in, 1}, out).ok()) state.SkipWithError("build_record");
        benchmark::DoNotOptimize(out.data());
    }
    state.SetItemsProcessed(static_cast<int64_t>(state.iterations() * rows * cols));
    state.counters["bits_per_weight"] = 8.0 * static_cast<double>(out.size()) / static_cast<double>(rows * cols);
}
BENCHMARK(rtn_and_pack)->ArgName("bits")->Arg(2)->Arg(3)->Arg(4)->Arg(8)->Unit(benchmark::kMillisecond);

struct TernarySample {
    std::vector<int8_t> trits;
    std::vector<float> levels;
    MatrixInput input;
    std::vector<uint8_t> record;

    explicit TernarySample(double zeros, uint64_t rows = kRows, uint64_t cols = kCols)
        : trits(random_trits(rows * cols, zeros)), levels(random_levels(rows)) {
        input.format = kTernaryId;
        input.rows = rows;
        input.cols = cols;
        input.trits = trits;
        input.levels = levels;
    }
    bool encode() { return build_record({&input, 1}, record).ok(); }
    void report(benchmark::State& state) const {
        const double weights = static_cast<double>(trits.size());
        const double entropy = empirical_entropy(trits), code = 8.0 * static_cast<double>(record.size()) / weights;
        state.SetItemsProcessed(static_cast<int64_t>(static_cast<double>(state.iterations()) * weights));
        state.counters["entropy_bits"] = entropy;
        state.counters["code_bits"] = code;
        state.counters["code_over_entropy_pct"] = 100.0 * (code / entropy - 1.0);
    }
};

void ternary_encode(benchmark::State& state) {
    TernarySample sample(static_cast<double>(state.range(0)) / 1000.0);
    for (auto _ : state) {
        if (!sample.encode()) state.SkipWithError("build_record");
        benchmark::DoNotOptimize(sample.record.data());
    }
    sample.report(state);
}
BENCHMARK(ternary_encode)
    ->ArgName("zeros_permille")
    ->Arg(600)
    ->Arg(800)
    ->Arg(885)
    ->Arg(950)
    ->Unit(benchmark::kMillisecond);

// Trits out, one byte each: the reference decoder, no vector instructions.
void ternary_decode_scalar(benchmark::State& state) {
    TernarySample sample(static_cast<double>(state.range(0)) / 1000.0);
    Record record;
    if (!sample.encode() || !Record::open(sample.record, record).ok()) return state.SkipWithError("encode");
    const MatrixView view = record.matrix(0);
    const TernaryLayout layout(view.spec.data(), view.rows, view.cols);
    const auto table = ternary_table(view.spec.data());
    std::vector<int8_t> out(layout.rows_in_block(0) * layout.padded_cols());
    for (auto _ : state)
        for (uint64_t b = 0; b < layout.blocks; ++b) {
            ternary_decode_block(layout, *table, view.data.data(), b, out.data(), nullptr);
            benchmark::DoNotOptimize(out.data());
        }
    sample.report(state);
}
BENCHMARK(ternary_decode_scalar)
    ->ArgName("zeros_permille")
    ->Arg(600)
    ->Arg(800)
    ->Arg(885)
    ->Arg(950)
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace qmoe::bench
