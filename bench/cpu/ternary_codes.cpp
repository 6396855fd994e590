// The codes that were candidates for `ternary`, in plain one-stream-per-row form: rate and scalar decoding speed.
//
//   rice     gaps between nonzeros in Rice code (parameter per matrix), each followed by a sign bit; a row ends with an
//            explicit end gap
//   huffman  blocks of six trits, canonical Huffman limited to 12, 13 or 14 bits, decoded by one table look-up
//   tans     the code that was chosen, through the real format (bench_codec has it in detail)
//
// Rates count the streams, byte-aligned ends and a 16-bit length per row, but no levels; tans counts everything, levels
// included.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <numeric>

#include "formats/ternary.h"
#include "qmoe/record.h"
#include "samples.h"

namespace qmoe::bench {
namespace {

constexpr uint64_t kRows = 1366, kCols = 768;

class BitWriter {
  public:
    void put(uint64_t bits, uint32_t count) {
        buffer_ |= bits << filled_;
        filled_ += count;
        while (filled_ >= 8) {
            bytes.push_back(static_cast<uint8_t>(buffer_));
            buffer_ >>= 8;
            filled_ -= 8;
        }
    }
    void align() {
        if (filled_ > 0) bytes.push_back(static_cast<uint8_t>(buffer_));
        buffer_ = filled_ = 0;
    }
    std::vector<uint8_t> bytes;

  private:
    uint64_t buffer_ = 0;
    uint32_t filled_ = 0;
};

// Reads at any bit position; the bytes behind the last are readable.
struct BitReader {
    const uint8_t* p;
    uint64_t position = 0;
    uint64_t peek() const { return load<uint64_t>(p + position / 8) >> (position % 8); }
};

struct Coded {
    std::vector<uint8_t> bytes;
    std::vector<uint64_t> row_at;
};

void report(benchmark::State& state, const std::vector<int8_t>& trits, double bits) {
    const double entropy = empirical_entropy(trits), weights = static_cast<double>(trits.size());
    state.SetItemsProcessed(static_cast<int64_t>(static_cast<double>(state.iterations()) * weights));
    state.counters["entropy_bits"] = entropy;
    state.counters["code_bits"] = bits / weights;
    state.counters["code_over_entropy_pct"] = 100.0 * (bits / weights / entropy - 1.0);
}
double stream_bits(const Coded& coded) {
    return 8.0 * static_cast<double>(coded.bytes.size()) + 16.0 * kRows;
}

Coded rice_encode(const std::vector<int8_t>& trits, uint32_t parameter) {
    Coded coded;
    BitWriter writer;
    const auto put_gap = [&](uint64_t gap) {
        for (uint64_t q = gap >> parameter; q > 0; --q) writer.put(0, 1);
        writer.put(1, 1);
        writer.put(gap & ((1u << parameter) - 1), parameter);
    };
    for (uint64_t r = 0; r < kRows; ++r) {
        coded.row_at.push_back(writer.bytes.size());
        uint64_t gap = 0;
        for (uint64_t k = 0; k < kCols; ++k, ++gap)
            if (const int8_t t = trits[r * kCols + k]; t != 0) {
                put_gap(gap);
                writer.put(t < 0, 1);
                gap = UINT64_MAX;
            }
        put_gap(gap);
        writer.align();
    }
    writer.bytes.resize(writer.bytes.size() + 8);
    coded.bytes = std::move(writer.bytes);
    return coded;
}

void rice(benchmark::State& state) {
    const auto trits = random_trits(kRows * kCols, static_cast<double>(state.range(0)) / 1000.0);
    Coded coded;
    uint32_t parameter = 0;
    for (uint32_t p = 0; p < 8; ++p) {
        Coded tried = rice_encode(trits, p);
        if (coded.bytes.empty() || tried.bytes.size() < coded.bytes.size()) {
            coded = std::move(tried);
            parameter = p;
        }
    }
    std::vector<int8_t> out(kRows * kCols);
    for (auto _ : state) {
        std::fill(out.begin(), out.end(), int8_t{0});
        for (uint64_t r = 0; r < kRows; ++r) {
            BitReader reader{coded.bytes.data() + coded.row_at[r]};
            for (uint64_t k = 0;; ++k) {
                const uint64_t window = reader.peek();
                const auto quotient = static_cast<uint32_t>(__builtin_ctzll(window | uint64_t{1} << 48));
                const uint64_t rest = window >> (quotient + 1);
                k += (uint64_t{quotient} << parameter) + (rest & ((1u << parameter) - 1));
                if (k >= kCols) break;
                out[r * kCols + k] = (rest >> parameter & 1) ? int8_t{-1} : int8_t{1};
                reader.position += quotient + parameter + 2;
            }
        }
        benchmark::DoNotOptimize(out.data());
    }
    if (out != trits) state.SkipWithError("round trip");
    report(state, trits, stream_bits(coded));
}

// Code lengths by package-merge, the optimal length-limited code.
std::vector<uint8_t> limited_lengths(const std::vector<uint64_t>& counts, uint32_t limit) {
    struct Package {
        uint64_t weight;
        std::vector<uint16_t> symbols;
    };
    std::vector<Package> singles, previous;
    for (uint16_t s = 0; s < counts.size(); ++s) singles.push_back({counts[s] + 1, {s}});
    const auto lighter = [](const Package& a, const Package& b) { return a.weight < b.weight; };
    std::stable_sort(singles.begin(), singles.end(), lighter);
    for (uint32_t level = 0; level < limit; ++level) {
        std::vector<Package> merged = singles;
        for (size_t i = 0; i + 1 < previous.size(); i += 2) {
            Package p{previous[i].weight + previous[i + 1].weight, previous[i].symbols};
            p.symbols.insert(p.symbols.end(), previous[i + 1].symbols.begin(), previous[i + 1].symbols.end());
            merged.push_back(std::move(p));
        }
        std::stable_sort(merged.begin(), merged.end(), lighter);
        previous = std::move(merged);
    }
    std::vector<uint8_t> lengths(counts.size(), 0);
    for (size_t i = 0; i < 2 * counts.size() - 2; ++i)
        for (const uint16_t s : previous[i].symbols) ++lengths[s];
    return lengths;
}

uint32_t symbol_at(const int8_t* p) {
    uint32_t v = 0;
    for (int i = 5; i >= 0; --i) v = v * 3 + (p[i] == 0 ? 0u : p[i] > 0 ? 1u : 2u);
    return v;
}

void huffman(benchmark::State& state) {
    const auto trits = random_trits(kRows * kCols, static_cast<double>(state.range(0)) / 1000.0);
    const auto limit = static_cast<uint32_t>(state.range(1));
    std::vector<uint64_t> counts(kSymbols);
    for (uint64_t i = 0; i < trits.size(); i += kTrits) ++counts[symbol_at(&trits[i])];
    const auto lengths = limited_lengths(counts, limit);
    std::vector<uint16_t> order(kSymbols), code(kSymbols);
    std::iota(order.begin(), order.end(), uint16_t{0});
    std::stable_sort(order.begin(), order.end(), [&](uint16_t a, uint16_t b) { return lengths[a] < lengths[b]; });
    struct Entry {
        uint64_t bytes;
        uint32_t length;
    };
    std::vector<Entry> table(size_t{1} << limit);
    uint32_t next = 0;
    for (const uint16_t s : order) {
        const uint32_t length = lengths[s];
        for (uint32_t b = 0; b < length; ++b)  // low bit first
            code[s] = static_cast<uint16_t>(code[s] | (next >> (limit - 1 - b) & 1) << b);
        Entry entry{0, length};
        for (uint32_t i = 0, rest = s; i < kTrits; ++i, rest /= 3)
            entry.bytes |= uint64_t{rest % 3 == 0 ? 0u : rest % 3 == 1 ? 1u : 255u} << (8 * i);
        for (uint32_t high = 0; high < 1u << (limit - length); ++high) table[code[s] | high << length] = entry;
        next += 1u << (limit - length);
    }
    Coded coded;
    BitWriter writer;
    for (uint64_t r = 0; r < kRows; ++r) {
        coded.row_at.push_back(writer.bytes.size());
        for (uint64_t k = 0; k < kCols; k += kTrits) {
            const uint32_t s = symbol_at(&trits[r * kCols + k]);
            writer.put(code[s], lengths[s]);
        }
        writer.align();
    }
    writer.bytes.resize(writer.bytes.size() + 8);
    coded.bytes = std::move(writer.bytes);
    std::vector<int8_t> out(kRows * kCols + 8);
    for (auto _ : state) {
        for (uint64_t r = 0; r < kRows; ++r) {
            BitReader reader{coded.bytes.data() + coded.row_at[r]};
            for (uint64_t k = 0; k < kCols; k += kTrits) {
                const Entry entry = table[reader.peek() & ((1u << limit) - 1)];
                store(reinterpret_cast<uint8_t*>(&out[r * kCols + k]), entry.bytes);
                reader.position += entry.length;
            }
        }
        benchmark::DoNotOptimize(out.data());
    }
    out.resize(kRows * kCols);
    if (out != trits) state.SkipWithError("round trip");
    report(state, trits, stream_bits(coded) + 8.0 * kSymbols / 2);  // four bits a code length
}

void tans(benchmark::State& state) {
    const auto trits = random_trits(kRows * kCols, static_cast<double>(state.range(0)) / 1000.0);
    const std::vector<float> levels = random_levels(kRows);
    MatrixInput in;
    in.format = kTernaryId;
    in.rows = kRows;
    in.cols = kCols;
    in.trits = trits;
    in.levels = levels;
    std::vector<uint8_t> bytes;
    Record record;
    if (!build_record({&in, 1}, bytes).ok() || !Record::open(bytes, record).ok()) return state.SkipWithError("encode");
    const MatrixView view = record.matrix(0);
    const TernaryLayout layout(view.spec.data(), view.rows, view.cols);
    const auto table = ternary_table(view.spec.data());
    std::vector<int8_t> out((layout.blocks * layout.block_rows) * layout.padded_cols());
    for (auto _ : state) {
        for (uint64_t b = 0; b < layout.blocks; ++b)
            ternary_decode_block(layout, *table, view.data.data(), b,
                                 &out[b * layout.block_rows * layout.padded_cols()], nullptr);
        benchmark::DoNotOptimize(out.data());
    }
    for (uint64_t r = 0; r < kRows; ++r)
        if (!std::equal(&trits[r * kCols], &trits[r * kCols] + kCols, &out[r * layout.padded_cols()]))
            state.SkipWithError("round trip");
    report(state, trits, 8.0 * static_cast<double>(bytes.size()));
}

void zero_fractions(benchmark::internal::Benchmark* b) {
    for (const int zeros : {600, 800, 885, 950}) b->Arg(zeros);
}
void zero_fractions_and_limits(benchmark::internal::Benchmark* b) {
    for (const int limit : {12, 13, 14})
        for (const int zeros : {600, 800, 885, 950}) b->Args({zeros, limit});
}
BENCHMARK(rice)->ArgName("zeros_permille")->Apply(zero_fractions)->Unit(benchmark::kMillisecond);
BENCHMARK(huffman)
    ->ArgNames({"zeros_permille", "limit"})
    ->Apply(zero_fractions_and_limits)
    ->Unit(benchmark::kMillisecond);
BENCHMARK(tans)->ArgName("zeros_permille")->Apply(zero_fractions)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace qmoe::bench
