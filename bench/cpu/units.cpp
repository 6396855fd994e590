// The generated kernels on their own: one unit (64 rows) whose weights and activations stay in the second-level cache,
// so that nothing but instructions is measured. units.py puts it beside the generator's predictions.
//
//   unit/KIND/WAY/tokens:M   WAY: packed (reading packed lines) or unpacked; counter `lines`: packed lines of 64 bytes
//                            per second, each read once for every call
//   clock                    counter `cycles` per second: a chain of dependent additions takes one each
//
// CPU time, not wall time: other work on the machine then matters less.
#include "cpu/multiply.h"
#include "ours.h"

namespace qmoe::bench {
namespace {

void measure_unit(benchmark::State& state, const Kind& kind, uint64_t tokens, bool packed) {
    const Shape shape = {"unit", kUnitRows, 2048, 1, false, {}};
    const Weights weights(random_record(kind, shape));
    const Prepacked& matrix = weights.prepacked();
    const PanelKernels* const kernels = panel_kernels();
    if (kernels == nullptr) throw std::runtime_error("no kernels");
    Rows rows;
    rows.resize(matrix, matrix.expert(0), tokens, Precision::kInt8);
    const auto x = random_activations(tokens * shape.cols);
    for (uint64_t t = 0; t < tokens; ++t) rows.set(*kernels, t, x.data() + t * shape.cols);
    std::vector<float> y(tokens * kUnitRows);
    const Tuning before = tuning();
    Tuning way = before;
    way.direct_tokens = packed ? 1024 : 0;
    must(set_tuning(way), "set_tuning");
    for (auto _ : state) {
        multiply_unit(*kernels, matrix, 0, 0, rows, 0, tokens, y.data());
        benchmark::ClobberMemory();
    }
    must(set_tuning(before), "set_tuning");
    const UnitSizes sizes(matrix.expert(0), shape.cols);
    const double lines = static_cast<double>(sizes.all_steps * sizes.step_bytes) / kLine;
    state.counters["lines"] =
        benchmark::Counter(lines * static_cast<double>(state.iterations()), benchmark::Counter::kIsRate);
}

void measure_clock(benchmark::State& state) {
    constexpr int kChain = 1000;
    uint64_t sum = 1;
    for (auto _ : state) {
        for (int i = 0; i < kChain; ++i) {
            sum += 3;
            asm volatile("" : "+r"(sum));
        }
    }
    benchmark::DoNotOptimize(sum);
    state.counters["cycles"] =
        benchmark::Counter(kChain * static_cast<double>(state.iterations()), benchmark::Counter::kIsRate);
}

}  // namespace
}  // namespace qmoe::bench

int main(int argc, char** argv) {
    using namespace qmoe::bench;
    benchmark::AddCustomContext("isa", qmoe::panel_kernels() == nullptr ? "none" : qmoe::panel_kernels()->isa);
    benchmark::RegisterBenchmark("clock", measure_clock);
    const auto name = [](const Kind& kind, const char* way, uint64_t tokens) {
        return "unit/" + std::string(kind.name) + "/" + way + "/tokens:" + std::to_string(tokens);
    };
    for (const Kind& kind : kKinds) {
        for (const uint64_t tokens : {1, 2, 4})
            benchmark::RegisterBenchmark(
                name(kind, "packed", tokens).c_str(),
                [&kind, tokens](benchmark::State& state) { measure_unit(state, kind, tokens, true); });
        benchmark::RegisterBenchmark(name(kind, "unpacked", 168).c_str(),
                                     [&kind](benchmark::State& state) { measure_unit(state, kind, 168, false); });
    }
    return run(argc, argv);
}
