// Where everything of a prepacked stack is. See panels.h for what a panel holds.
#pragma once

#include "cpu/panels.h"
#include "qmoe/checked.h"
#include "qmoe/prepacked.h"

namespace qmoe {

// One expert: the fields that are stored in the table, and what follows from them.
struct Prepacked::Expert {
    Codes codes = Codes::kInt4;
    Scales scales = Scales::kFloat16;
    Zeros zeros = Zeros::kConstant;
    uint32_t chunk = 0;   // columns that share an activation scale
    uint32_t repeat = 0;  // chunks that share a weight scale
    float offset = 0.0f;  // of the zero: all of it where constant, else what is added to the stored one
    uint64_t at = 0;      // bytes from the start of the prepacked bytes, a multiple of 64

    bool trits() const noexcept { return codes == Codes::kTrits; }
    // Bytes of 16 scales; two vectors for trits.
    uint64_t scale_bytes() const noexcept {
        return trits() ? 2 * 4 * kPanelRows : (scales == Scales::kFloat16 ? 2 : 4) * uint64_t{kPanelRows};
    }
};

// Sizes of one unit of an expert of `cols` columns: groups one behind the other, each its scales and zeros (`meta` bytes)
// and its codes, step by step, four panels a step.
struct UnitSizes {
    uint64_t chunks, steps, last_steps, groups;
    uint64_t all_steps, group_steps;  // of the unit, and of all its groups but the last
    uint64_t step_bytes, meta, group_bytes, bytes;

    UnitSizes(const Prepacked::Expert& e, uint64_t cols) noexcept {
        const uint64_t step = step_cols(e.codes);
        chunks = ceil_div(cols, e.chunk);
        steps = e.chunk / step;
        last_steps = ceil_div(cols - (chunks - 1) * e.chunk, step);
        groups = ceil_div(chunks, e.repeat);
        all_steps = (chunks - 1) * steps + last_steps;
        group_steps = groups == 1 ? all_steps : e.repeat * steps;
        step_bytes = kUnitPanels * step_lines(e.codes) * kLine;
        meta = kUnitPanels * (e.scale_bytes() + (e.zeros == Zeros::kStored ? kPanelRows : 0));
        group_bytes = meta + group_steps * step_bytes;
        bytes = groups * meta + all_steps * step_bytes;
    }
    // Columns that codes and activations are filled up to.
    uint64_t padded_cols(const Prepacked::Expert& e) const noexcept { return all_steps * step_cols(e.codes); }
};

// Panels of a stack, units whole. In a gated order even panels are of the gate and odd ones of up.
inline uint64_t panels_of(uint64_t rows, RowOrder order) noexcept {
    const uint64_t panels = order == RowOrder::kPlain ? ceil_div(rows, kPanelRows) : 2 * ceil_div(rows / 2, kPanelRows);
    return ceil_div(panels, kUnitPanels) * kUnitPanels;
}

// The record's row that is row r of a panel, or `rows` where there is none.
inline uint64_t row_of(uint64_t panel, uint32_t r, uint64_t rows, RowOrder order) noexcept {
    if (order == RowOrder::kPlain) {
        const uint64_t row = panel * kPanelRows + r;
        return row < rows ? row : rows;
    }
    const uint64_t half = rows / 2, row = panel / 2 * kPanelRows + r;
    if (row >= half) return rows;
    return order == RowOrder::kHalves ? panel % 2 * half + row : 2 * row + panel % 2;
}

// How many bytes ahead weights are asked for: into the second-level cache, and into the first.
struct Ahead {
    uint32_t far = 0, near = 0;
};

inline UnitView unit_view(const Prepacked& weights, uint64_t expert, uint64_t unit, Ahead ahead) noexcept {
    const Prepacked::Expert& e = weights.expert(expert);
    const UnitSizes sizes(e, weights.cols());
    const uint8_t* const scales = weights.data() + e.at + unit * sizes.bytes;
    return {scales + sizes.meta,
            uint64_t{step_lines(e.codes)} * kLine,
            scales,
            e.scale_bytes(),
            sizes.group_bytes,
            e.zeros == Zeros::kStored ? scales + kUnitPanels * e.scale_bytes() : nullptr,
            uint64_t{kPanelRows},
            sizes.group_bytes,
            static_cast<uint32_t>(sizes.chunks),
            static_cast<uint32_t>(sizes.steps),
            static_cast<uint32_t>(sizes.last_steps),
            e.repeat,
            static_cast<uint32_t>(sizes.meta),
            ahead.far,
            ahead.near};
}

}  // namespace qmoe
