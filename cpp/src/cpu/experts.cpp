// A layer's experts over prepacked weights: four loops over threads, nothing of which depends on their number.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>

#include "cpu/multiply.h"
#include "cpu/pool.h"

namespace qmoe {
namespace {

// A form of activations: what Rows::resize takes from an expert.
struct Form {
    uint32_t chunk;
    float offset;
    bool operator==(const Form&) const = default;
};

// Who computes what: the (token, choice) pairs sorted by expert, in order of tokens.
struct Schedule {
    std::vector<uint32_t> active;  // experts with tokens
    std::vector<uint64_t> first;   // of active expert i: its rows are [first[i], first[i + 1])
    std::vector<uint64_t> token;   // of every row
    std::vector<uint64_t> row;     // of every pair (token * top_k + j); `none` for other ranks' experts
    static constexpr uint64_t none = ~uint64_t{0};

    void build(uint64_t experts, const int64_t* ids, uint64_t tokens, uint64_t top_k) {
        std::vector<uint64_t> count(experts + 1, 0);
        const auto valid = [&](int64_t id) { return id >= 0 && static_cast<uint64_t>(id) < experts; };
        for (uint64_t i = 0; i < tokens * top_k; ++i)
            if (valid(ids[i])) ++count[static_cast<uint64_t>(ids[i])];
        active.clear();
        first.assign(1, 0);
        std::vector<uint64_t> next(experts, 0);
        for (uint64_t e = 0; e < experts; ++e) {
            if (count[e] == 0) continue;
            next[e] = first.back();
            active.push_back(static_cast<uint32_t>(e));
            first.push_back(first.back() + count[e]);
        }
        token.resize(first.back());
        row.resize(tokens * top_k);
        for (uint64_t i = 0; i < tokens * top_k; ++i) {
            row[i] = none;
            if (!valid(ids[i])) continue;
            row[i] = next[static_cast<uint64_t>(ids[i])]++;
            token[row[i]] = i / top_k;
        }
    }
};

// Products of two projections' outputs have a wider tail than a normal distribution: rounded once, they would leave
// more of an error (1.3 % of the layer's outputs, in norm) than all else.
constexpr uint64_t kHiddenTerms = 2;

// The inputs of all rows of a stack, one Rows per active expert.
void resize_inputs(std::vector<Rows>& inputs, const Prepacked& weights, const Schedule& schedule, Precision precision,
                   uint64_t terms) {
    if (inputs.size() < schedule.active.size()) inputs.resize(schedule.active.size());
    for (size_t i = 0; i < schedule.active.size(); ++i)
        inputs[i].resize(weights, weights.expert(schedule.active[i]), schedule.first[i + 1] - schedule.first[i],
                         precision, terms);
}

Status check(const Prepacked& first, const Prepacked& second, const ExpertsSpec& spec) noexcept {
    if (first.experts() != second.experts())
        return Status::mismatch(Code::kShape, "experts: the projections differ in experts", 0, first.experts(),
                                second.experts());
    const uint64_t width = spec.gated ? first.rows() / 2 : first.rows();
    if (second.cols() != width)
        return Status::mismatch(Code::kShape, "experts: columns of the second projection", 0, width, second.cols());
    if (second.rows() != first.cols())
        return Status::mismatch(Code::kShape, "experts: rows of the second projection", 0, first.cols(), second.rows());
    if (spec.gated != (first.order() != RowOrder::kPlain) || second.order() != RowOrder::kPlain)
        return Status::error(Code::kValue,
                             "experts: gated first projections are prepacked in a gated order, others not");
    if (spec.clamped && !spec.gated) return Status::error(Code::kValue, "experts: a clamped activation needs a gate");
    return {};
}

// A call keeps its buffers for the next one of the same thread.
struct Buffers {
    Schedule schedule;
    std::vector<Rows> forms, first, second;
    std::vector<Form> kinds;
    std::vector<float> hidden, results;
    std::vector<uint32_t> position;  // index among the active of every row
};

// Results of the first projection for one unit: bias, activation, and to `hidden` (rows, width).
void finish_first(const PanelKernels& kernels, const Prepacked& weights, const ExpertsSpec& spec, uint64_t expert,
                  uint64_t unit, float* results, uint64_t tokens, float* hidden, uint64_t width) noexcept {
    const uint64_t rows = weights.rows();
    const uint32_t pairs = spec.gated ? 2 : 1;
    for (uint32_t panel = 0; panel < kUnitPanels; panel += pairs) {
        const uint64_t column = (unit * kUnitPanels + panel) / pairs * kPanelRows;
        if (column >= width) break;
        const uint64_t count = std::min<uint64_t>(kPanelRows, width - column);
        for (uint64_t t = 0; t < tokens; ++t) {
            float* const gate = results + t * kUnitRows + panel * kPanelRows;
            if (spec.first_bias != nullptr)
                for (uint32_t p = 0; p < pairs; ++p)
                    for (uint32_t r = 0; r < count; ++r)
                        gate[p * kPanelRows + r] +=
                            spec.first_bias[expert * rows +
                                            row_of(unit * kUnitPanels + panel + p, r, rows, weights.order())];
            kernels.activate(spec, gate, spec.gated ? gate + kPanelRows : nullptr, count, hidden + t * width + column);
        }
    }
}

}  // namespace

Status experts(const Prepacked& first, const Prepacked& second, const ExpertsSpec& spec, const void* x,
               ActivationType type, uint64_t tokens, const int64_t* ids, const float* weights, uint64_t top_k,
               void* out, int threads) noexcept {
    QMOE_TRY(check(first, second, spec));
    const PanelKernels* const kernels = panel_kernels();
    if (kernels == nullptr)
        return Status::error(Code::kNoKernel, "experts: QMOE_FORCE_ISA names an instruction set that is not available");
    if (tokens == 0) return {};
    const uint64_t cols = first.cols(), width = second.cols();
    const uint64_t first_units = panels_of(first.rows(), first.order()) / kUnitPanels,
                   second_units = panels_of(second.rows(), second.order()) / kUnitPanels;
    try {
        thread_local Buffers buffers;
        Buffers& b = buffers;  // of the calling thread; workers see it through this reference
        Schedule& schedule = b.schedule;
        schedule.build(first.experts(), ids, tokens, top_k);
        const uint64_t rows = schedule.token.size(), active = schedule.active.size();
        b.position.resize(rows);
        for (uint64_t i = 0; i < active; ++i)
            std::fill(b.position.begin() + static_cast<ptrdiff_t>(schedule.first[i]),
                      b.position.begin() + static_cast<ptrdiff_t>(schedule.first[i + 1]), static_cast<uint32_t>(i));
        // Each token is quantized once for every form that some expert wants, which is one form in nearly all layers.
        b.kinds.clear();
        for (const uint32_t e : schedule.active) {
            const Form form{first.expert(e).chunk, first.expert(e).offset};
            if (std::find(b.kinds.begin(), b.kinds.end(), form) != b.kinds.end()) continue;
            b.kinds.push_back(form);
            if (b.forms.size() < b.kinds.size()) b.forms.emplace_back();
            b.forms[b.kinds.size() - 1].resize(first, first.expert(e), tokens, spec.precision);
        }
        const auto kind_of = [&](uint64_t i) {
            const Prepacked::Expert& e = first.expert(schedule.active[i]);
            return static_cast<size_t>(std::find(b.kinds.begin(), b.kinds.end(), Form{e.chunk, e.offset}) -
                                       b.kinds.begin());
        };
        // A single token serves all of its experts as it is, unless it chose one of them twice.
        const bool gather = tokens > 1 || rows != active;
        if (gather) resize_inputs(b.first, first, schedule, spec.precision, 1);
        resize_inputs(b.second, second, schedule, spec.precision, kHiddenTerms);
        if (b.hidden.size() < rows * width) b.hidden.resize(rows * width);
        if (b.results.size() < rows * cols) b.results.resize(rows * cols);

        std::atomic<bool> failed{false};
        const auto loop = [&](uint64_t count, auto&& body) {
            parallel_for(count, threads, [&](uint64_t i) {
                try {
                    body(i);
                } catch (const std::bad_alloc&) {
                    failed = true;
                }
            });
            return !failed;
        };
        const auto no_memory = [] { return Status::error(Code::kNoSpace, "experts: out of memory"); };

        const bool quantized = loop(tokens, [&](uint64_t t) {
            thread_local std::vector<float> values;
            if (values.size() < cols) values.resize(cols);
            load_row(x, type, t * cols, cols, values.data());
            for (size_t k = 0; k < b.kinds.size(); ++k) b.forms[k].set(*kernels, t, values.data());
            if (!gather) return;
            for (uint64_t j = 0; j < top_k; ++j) {
                const uint64_t row = schedule.row[t * top_k + j];
                if (row == Schedule::none) continue;
                const uint32_t i = b.position[row];
                b.first[i].copy(row - schedule.first[i], b.forms[kind_of(i)], t);
            }
        });
        if (!quantized) return no_memory();

        const bool projected = loop(active * first_units, [&](uint64_t task) {
            const uint64_t i = task / first_units, unit = task % first_units, expert = schedule.active[i];
            if (unit + 1 == first_units && i + 1 < active) prefetch_unit(first, schedule.active[i + 1], 0);
            const Rows& inputs = gather ? b.first[i] : b.forms[kind_of(i)];
            multiply_rows(*kernels, first, expert, unit, inputs, schedule.first[i + 1] - schedule.first[i],
                          [&](uint64_t t, uint64_t some, float* results) {
                              finish_first(*kernels, first, spec, expert, unit, results, some,
                                           b.hidden.data() + (schedule.first[i] + t) * width, width);
                          });
        });
        if (!projected) return no_memory();

        loop(rows, [&](uint64_t row) {
            const uint32_t i = b.position[row];
            b.second[i].set(*kernels, row - schedule.first[i], b.hidden.data() + row * width);
        });

        const bool returned = loop(active * second_units, [&](uint64_t task) {
            const uint64_t i = task / second_units, unit = task % second_units, expert = schedule.active[i];
            if (unit + 1 == second_units && i + 1 < active) prefetch_unit(second, schedule.active[i + 1], 0);
            const uint64_t column = unit * kUnitRows, some_cols = std::min<uint64_t>(kUnitRows, cols - column);
            multiply_rows(*kernels, second, expert, unit, b.second[i], schedule.first[i + 1] - schedule.first[i],
                          [&](uint64_t t, uint64_t some, const float* results) {
                              for (uint64_t j = 0; j < some; ++j)
                                  std::memcpy(b.results.data() + (schedule.first[i] + t + j) * cols + column,
                                              results + j * kUnitRows, some_cols * sizeof(float));
                          });
        });
        if (!returned) return no_memory();

        // One token is one row of the output, so it is cut into pieces.
        const uint64_t pieces = tokens >= 16 ? 1 : ceil_div(cols, 512), piece = ceil_div(cols, pieces);
        const bool combined = loop(tokens * pieces, [&](uint64_t task) {
            thread_local std::vector<float> sum;
            const uint64_t t = task / pieces, begin = task % pieces * piece;
            if (begin >= cols) return;
            const uint64_t count = std::min(piece, cols - begin);
            sum.assign(count, 0.0f);
            for (uint64_t j = 0; j < top_k; ++j) {
                const uint64_t row = schedule.row[t * top_k + j];
                if (row == Schedule::none) continue;
                const float weight = weights[t * top_k + j];
                const float* const from = b.results.data() + row * cols + begin;
                if (spec.second_bias == nullptr) {
                    for (uint64_t k = 0; k < count; ++k) sum[k] += weight * from[k];
                } else {
                    const float* const bias =
                        spec.second_bias + static_cast<uint64_t>(ids[t * top_k + j]) * cols + begin;
                    for (uint64_t k = 0; k < count; ++k) sum[k] += weight * (from[k] + bias[k]);
                }
            }
            store_row(sum.data(), count, type, out, t * cols + begin);
        });
        return combined ? Status{} : no_memory();
    } catch (const std::bad_alloc&) {
        return Status::error(Code::kNoSpace, "experts: out of memory");
    }
}

}  // namespace qmoe
