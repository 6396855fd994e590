// What the operations over prepacked weights share: the choice of kernels, activations in the form that an expert wants,
// and one unit times some tokens.
#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "cpu/activations.h"
#include "cpu/prepacked.h"

namespace qmoe {

// The kernels in use, or null where QMOE_FORCE_ISA names a set that has none.
const PanelKernels* panel_kernels() noexcept;

// Rows of activations of one expert, in the form that its chunks want. A row in int8 has one or two terms: the second
// rounds what the first leaves, kernels take it for a row of its own, and their products are added.
class Rows {
  public:
    // Room for `rows` rows for `expert`; keeps what it has. Floats have one term whatever `terms` says.
    void resize(const Prepacked& weights, const Prepacked::Expert& expert, uint64_t rows, Precision precision,
                uint64_t terms = 1);
    void set(const PanelKernels& kernels, uint64_t row, const float* values) noexcept;  // `cols` values
    void copy(uint64_t row, const Rows& from, uint64_t from_row) noexcept;              // of as many terms
    Precision precision() const noexcept { return precision_; }
    uint64_t terms() const noexcept { return terms_; }
    QuantizedView quantized(uint64_t first) const noexcept;  // from term `first` on, all rows' terms counted
    const float* floats(uint64_t first) const noexcept { return floats_.data() + first * stride_; }
    uint64_t stride() const noexcept { return stride_; }

  private:
    Precision precision_ = Precision::kInt8;
    uint64_t cols_ = 0, stride_ = 0, chunks_ = 0, terms_ = 1;
    uint32_t chunk_ = 0;
    float offset_ = 0.0f;
    std::vector<int8_t> values_;
    std::vector<ActivationChunk> scales_;  // rows x terms x chunks
    std::vector<float> floats_;
};

// y (tokens, 64) = a unit of `expert` times terms [first, first + tokens) of `rows`.
void multiply_unit(const PanelKernels& kernels, const Prepacked& weights, uint64_t expert, uint64_t unit,
                   const Rows& rows, uint64_t first, uint64_t tokens, float* y);

// Asks for the beginning of a unit that will be multiplied next: kernels ask for what lies behind, which for the last unit
// of an expert is another expert.
void prefetch_unit(const Prepacked& weights, uint64_t expert, uint64_t unit) noexcept;

// Calls use(first, tokens, y) with the products (tokens, 64) of a unit and rows [first, first + tokens), for all of
// `count` rows. The products of one call are in the second-level cache: 128 KiB at most.
template <typename Use>
void multiply_rows(const PanelKernels& kernels, const Prepacked& weights, uint64_t expert, uint64_t unit,
                   const Rows& rows, uint64_t count, Use&& use) {
    constexpr uint64_t kBlock = 504;  // divides into the tokens that tiles take at a time
    thread_local std::vector<float> products;
    const uint64_t terms = rows.terms(), all = count * terms, most = std::min(all, kBlock) * kUnitRows;
    if (products.size() < most) products.resize(most);
    float* const y = products.data();
    for (uint64_t first = 0; first < all; first += kBlock) {
        const uint64_t tokens = std::min(kBlock, all - first) / terms;
        multiply_unit(kernels, weights, expert, unit, rows, first, tokens * terms, y);
        if (terms == 2)
            for (uint64_t t = 0; t < tokens; ++t)
                for (uint64_t r = 0; r < kUnitRows; ++r)
                    y[t * kUnitRows + r] = y[2 * t * kUnitRows + r] + y[(2 * t + 1) * kUnitRows + r];
        use(first / terms, tokens, y);
    }
}

}  // namespace qmoe
