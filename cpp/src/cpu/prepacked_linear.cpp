// Grouped multiplication by prepacked weights.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "cpu/multiply.h"
#include "cpu/pool.h"

namespace qmoe {
namespace {

struct Task {
    uint64_t expert, unit;
};

// A call keeps its buffers for the next one of the same thread. Activations of one token are a few hundred kilobytes with
// the rows behind them that a kernel may read: fresh, each of their pages would be a fault and be zeroed at every call.
struct Buffers {
    std::vector<Task> tasks;
    std::vector<Rows> inputs;         // of every expert
    std::vector<uint32_t> expert_of;  // every token
};

}  // namespace

Status grouped_linear(const Prepacked& weights, const void* x, ActivationType type, uint64_t tokens,
                      std::span<const int64_t> offsets, void* y, Precision precision, int threads) noexcept {
    QMOE_TRY(check_offsets(weights.experts(), tokens, offsets));
    const PanelKernels* const kernels = panel_kernels();
    if (kernels == nullptr)
        return Status::error(Code::kNoKernel, "linear: QMOE_FORCE_ISA names an instruction set that is not available");
    if (tokens == 0) return {};  // x and y may then be null
    const uint64_t rows = weights.rows(), cols = weights.cols();
    const uint64_t units = panels_of(rows, weights.order()) / kUnitPanels;
    try {
        const auto from = static_cast<uint64_t>(offsets.front()), to = static_cast<uint64_t>(offsets.back());
        const uint64_t row_bytes = rows * activation_bytes(type);
        std::memset(y, 0, from * row_bytes);
        std::memset(static_cast<uint8_t*>(y) + to * row_bytes, 0, (tokens - to) * row_bytes);
        thread_local Buffers buffers;
        auto& [tasks, inputs, expert_of] = buffers;  // of the calling thread; workers see it through these references
        tasks.clear();
        if (inputs.size() < weights.experts()) inputs.resize(weights.experts());
        expert_of.resize(to - from);
        for (uint64_t e = 0; e < weights.experts(); ++e) {
            const auto begin = static_cast<uint64_t>(offsets[e]), end = static_cast<uint64_t>(offsets[e + 1]);
            if (begin == end) continue;
            inputs[e].resize(weights, weights.expert(e), end - begin, precision);
            std::fill(expert_of.begin() + static_cast<ptrdiff_t>(begin - from),
                      expert_of.begin() + static_cast<ptrdiff_t>(end - from), static_cast<uint32_t>(e));
            for (uint64_t unit = 0; unit < units; ++unit) tasks.push_back({e, unit});
        }
        std::atomic<bool> failed{false};
        parallel_for(to - from, threads, [&](uint64_t i) {
            thread_local std::vector<float> values;
            try {
                if (values.size() < cols) values.resize(cols);
                load_row(x, type, (from + i) * cols, cols, values.data());
                const uint32_t e = expert_of[i];
                inputs[e].set(*kernels, from + i - static_cast<uint64_t>(offsets[e]), values.data());
            } catch (const std::bad_alloc&) {
                failed = true;
            }
        });
        parallel_for(tasks.size(), threads, [&](uint64_t i) {
            const auto [e, unit] = tasks[i];
            if (unit + 1 == units && i + 1 < tasks.size())
                prefetch_unit(weights, tasks[i + 1].expert, tasks[i + 1].unit);
            const auto begin = static_cast<uint64_t>(offsets[e]), count = static_cast<uint64_t>(offsets[e + 1]) - begin;
            const uint64_t first = unit * kUnitRows, last = std::min(rows, first + kUnitRows);
            const auto keep = [&](uint64_t t, uint64_t some, const float* results) {
                for (uint64_t j = 0; j < some; ++j) {
                    const float* const result = results + j * kUnitRows;
                    const uint64_t at = (begin + t + j) * rows;
                    if (weights.order() == RowOrder::kPlain) {
                        store_row(result, last - first, type, y, at + first);
                        continue;
                    }
                    for (uint64_t r = 0; r < kUnitRows; ++r)
                        if (const uint64_t row =
                                row_of(unit * kUnitPanels + r / kPanelRows, r % kPanelRows, rows, weights.order());
                            row < rows)
                            store_row(result + r, 1, type, y, at + row);
                }
            };
            try {
                multiply_rows(*kernels, weights, e, unit, inputs[e], count, keep);
            } catch (const std::bad_alloc&) {
                failed = true;
            }
        });
        return failed ? Status::error(Code::kNoSpace, "linear: out of memory") : Status{};
    } catch (const std::bad_alloc&) {
        return Status::error(Code::kNoSpace, "linear: out of memory");
    }
}

}  // namespace qmoe
