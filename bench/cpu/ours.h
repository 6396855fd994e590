// The one place that knows how our kernels are called: bench_kernels sees nothing but Kind and Weights.
#pragma once

#include <sys/mman.h>

#include <array>
#include <cstdlib>
#include <memory>

#include "cpu/pool.h"
#include "harness.h"
#include "qmoe/prepacked.h"
#include "qmoe/quantize.h"
#include "samples.h"

namespace qmoe::bench {

inline void must(const Status& status, const char* what) {
    if (!status.ok()) throw std::runtime_error(what);
}

// The instruction set in use; with "none" every call below throws.
inline std::string isa() {
    const char* name = active_isa();
    return name != nullptr ? name : "none";
}

// A way to store weights.
struct Kind {
    const char* name;
    uint8_t bits;    // 0: ternary
    uint32_t group;  // columns per scale
    double zeros;    // ternary: share of zeros
};

inline constexpr std::array<Kind, 10> kKinds = {{
    {"int2_g64", 2, 64, 0},
    {"int2_g128", 2, 128, 0},
    {"int3_g64", 3, 64, 0},
    {"int3_g128", 3, 128, 0},
    {"int4_g64", 4, 64, 0},
    {"int4_g128", 4, 128, 0},
    {"int8_g64", 8, 64, 0},
    {"int8_g128", 8, 128, 0},
    {"ternary", 0, 0, 0.5},
    {"ternary_z885", 0, 0, 0.885},
}};

// A record of E equal matrices (N, K) of random weights: neither their values nor their being equal changes the time.
inline std::vector<uint8_t> random_record(const Kind& kind, const Shape& shape) {
    const uint64_t count = shape.rows * shape.cols, groups = kind.bits ? shape.cols / kind.group : 1;
    std::mt19937 generator(3);
    MatrixInput in;
    in.rows = shape.rows;
    in.cols = shape.cols;
    std::vector<uint8_t> codes, zeros(shape.rows * groups);
    std::vector<float> scales(shape.rows * groups, 1.0f / 256), levels;
    std::vector<int8_t> trits;
    if (kind.bits > 0) {
        const auto mask = static_cast<uint8_t>((1u << kind.bits) - 1);
        codes.resize(count);
        for (uint8_t& code : codes) code = static_cast<uint8_t>(generator() >> 8) & mask;
        for (uint8_t& zero : zeros) zero = static_cast<uint8_t>(generator() >> 8) & mask;
        in.format = 1;
        in.bits = kind.bits;
        in.group = kind.group;
        in.scale_dtype = static_cast<uint8_t>(ScaleType::kFloat16);
        in.codes = codes;
        in.scales = scales;
        in.zeros = zeros;
    } else {
        trits = random_trits(count, kind.zeros);
        levels = random_levels(shape.rows);
        in.format = 2;
        in.trits = trits;
        in.levels = levels;
    }
    std::vector<uint8_t> record;
    const std::vector<MatrixInput> all(shape.experts, in);
    must(build_record(all, record), "build_record");
    return record;
}

// Memory on huge pages where the system has them, as a model loader would ask for it.
struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
};
using Memory = std::unique_ptr<uint8_t, Free>;
inline Memory huge_pages(uint64_t bytes) {
    constexpr uint64_t kPage = uint64_t{2} << 20;
    const uint64_t size = (bytes + kPage - 1) / kPage * kPage;
    Memory memory(static_cast<uint8_t*>(std::aligned_alloc(kPage, size)));
    if (memory == nullptr) throw std::bad_alloc();
    madvise(memory.get(), size, MADV_HUGEPAGE);
    return memory;
}

// One copy of the weights, as the kernels want them.
class Weights {
  public:
    explicit Weights(const std::vector<uint8_t>& bytes, RowOrder order = RowOrder::kPlain) {
        Record record;
        must(Record::open(bytes, record, false), "Record::open");
        must(Prepacked::size(record, order, bytes_), "Prepacked::size");
        memory_ = huge_pages(bytes_);
        must(Prepacked::prepack(record, order, {memory_.get(), bytes_}, 2), "prepack");
        must(Prepacked::open({memory_.get(), bytes_}, weights_), "Prepacked::open");
    }
    Weights(const Weights&) = delete;
    Weights& operator=(const Weights&) = delete;

    uint64_t bytes() const { return bytes_; }  // that one pass over all weights reads
    const Prepacked& prepacked() const { return weights_; }

    // y (M, N) = x (M, K) W^T.
    void linear(const float* x, uint64_t tokens, float* y, int threads) const {
        const int64_t offsets[2] = {0, static_cast<int64_t>(tokens)};
        must(grouped_linear(weights_, x, ActivationType::kFloat32, tokens, offsets, y, Precision::kInt8, threads),
             "grouped_linear");
    }

    // Gate or up: y (T * top_k, N), every choice's product with its token's row of x (T, K).
    void experts_up(const float* x, const Routing& routing, float* y, int threads) const {
        const uint64_t n = weights_.rows();
        sort_and_multiply(x, routing, threads, false);
        parallel_for(order_.size(), threads, [&](uint64_t i) { std::copy_n(y_.data() + i * n, n, y + order_[i] * n); });
    }

    // Down: y (T, N), the choices' products with their own rows of x (T * top_k, K) summed by routing weight.
    void experts_down(const float* x, const Routing& routing, float* y, int threads) const {
        const uint64_t n = weights_.rows();
        sort_and_multiply(x, routing, threads, true);
        place_.resize(order_.size());
        for (uint64_t i = 0; i < order_.size(); ++i) place_[order_[i]] = i;
        parallel_for(routing.tokens, threads, [&](uint64_t t) {
            std::fill_n(y + t * n, n, 0.0f);
            for (uint64_t i = t * kTopK; i < (t + 1) * kTopK; ++i)
                for (uint64_t j = 0; j < n; ++j) y[t * n + j] += routing.weights[i] * y_[place_[i] * n + j];
        });
    }

  private:
    // grouped_linear wants the rows of x sorted by expert.
    void sort_and_multiply(const float* x, const Routing& routing, int threads, bool per_choice) const {
        const uint64_t k = weights_.cols(), choices = routing.ids.size();
        order_.resize(choices);
        std::iota(order_.begin(), order_.end(), uint64_t{0});
        std::stable_sort(order_.begin(), order_.end(),
                         [&](uint64_t a, uint64_t b) { return routing.ids[a] < routing.ids[b]; });
        offsets_.assign(weights_.experts() + 1, 0);
        for (const int32_t id : routing.ids) ++offsets_[static_cast<size_t>(id) + 1];
        std::partial_sum(offsets_.begin(), offsets_.end(), offsets_.begin());
        x_.resize(choices * k);
        y_.resize(choices * weights_.rows());
        parallel_for(choices, threads, [&](uint64_t i) {
            std::copy_n(x + (per_choice ? order_[i] : order_[i] / kTopK) * k, k, x_.data() + i * k);
        });
        must(grouped_linear(weights_, x_.data(), ActivationType::kFloat32, choices, offsets_, y_.data(),
                            Precision::kInt8, threads),
             "grouped_linear");
    }

    uint64_t bytes_ = 0;
    Memory memory_;
    Prepacked weights_;
    // What is around grouped_linear is not what is measured: the memory for it is the same for all copies of the weights.
    inline static std::vector<uint64_t> order_, place_;
    inline static std::vector<int64_t> offsets_;
    inline static std::vector<float> x_, y_;
};

}  // namespace qmoe::bench
