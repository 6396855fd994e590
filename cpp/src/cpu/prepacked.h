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

// Sizes of one expert of `cols` columns.
struct PanelSizes {
    uint64_t chunks, steps, last_steps, groups;
    uint64_t codes_bytes, scales_bytes, zeros_bytes;  // of one panel, multiples of 64

    PanelSizes(const Prepacked::Expert& e, uint64_t cols) noexcept {
        const uint64_t step = step_cols(e.codes);
        chunks = ceil_div(cols, e.chunk);
        steps = e.chunk / step;
        last_steps = ceil_div(cols - (chunks - 1) * e.chunk, step);
        groups = ceil_div(chunks, e.repeat);
        codes_bytes = ((chunks - 1) * steps + last_steps) * step_lines(e.codes) * kLine;
        scales_bytes = ceil_div(groups * e.scale_bytes(), kLine) * kLine;
        zeros_bytes = e.zeros == Zeros::kStored ? ceil_div(groups * kPanelRows, kLine) * kLine : 0;
    }
    // Columns that codes and activations are filled up to.
    uint64_t padded_cols(const Prepacked::Expert& e) const noexcept {
        return ((chunks - 1) * steps + last_steps) * step_cols(e.codes);
    }
    uint64_t panel_bytes() const noexcept { return codes_bytes + scales_bytes + zeros_bytes; }
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

// Codes of all panels come first, then scales, then zeros: kernels walk through each in order.
inline UnitView unit_view(const Prepacked& weights, uint64_t expert, uint64_t unit, uint32_t prefetch) noexcept {
    const Prepacked::Expert& e = weights.expert(expert);
    const PanelSizes sizes(e, weights.cols());
    const uint64_t panels = panels_of(weights.rows(), weights.order()), panel = unit * kUnitPanels;
    const uint8_t* const codes = weights.data() + e.at;
    const uint8_t* const scales = codes + panels * sizes.codes_bytes;
    const uint8_t* const zeros = scales + panels * sizes.scales_bytes;
    return {codes + panel * sizes.codes_bytes,
            sizes.codes_bytes,
            scales + panel * sizes.scales_bytes,
            sizes.scales_bytes,
            e.scale_bytes(),
            e.zeros == Zeros::kStored ? zeros + panel * sizes.zeros_bytes : nullptr,
            sizes.zeros_bytes,
            uint64_t{kPanelRows},
            static_cast<uint32_t>(sizes.chunks),
            static_cast<uint32_t>(sizes.steps),
            static_cast<uint32_t>(sizes.last_steps),
            e.repeat,
            prefetch};
}

}  // namespace qmoe
