// `ternary`: every weight is low, 0 or high of its row; the trits are entropy-coded without loss.
//
// Six trits make a symbol, coded by tANS with 4096 states. The matrix is cut into blocks of 32 lanes that decode in
// lock-step; all lanes of a block draw 16-bit words from one shared sequence, in the order in which they need them. See
// FORMAT.md for the bit diagrams, for the order of words and for the codes this one was measured against.
#include "formats/ternary.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace qmoe {
namespace {

Status validate(const MatrixView& view, bool values) noexcept {
    QMOE_TRY(check_ternary_spec(view.spec.data()));
    const TernaryLayout layout(view.spec.data(), view.rows, view.cols);
    QMOE_TRY(layout.check_geometry());
    const uint8_t* const data = view.data.data();
    if (view.data.size() < layout.payload_at)
        return Status::mismatch(Code::kTruncated, "ternary: too short for its tables", 0, layout.payload_at,
                                view.data.size());
    uint32_t previous = 0;
    for (uint64_t b = 0; b <= layout.blocks; ++b) {
        const uint64_t at = layout.offsets_at + b * 4;
        const uint32_t offset = load<uint32_t>(data + at);
        if ((b == 0 && offset != 0) || offset < previous)
            return Status::mismatch(Code::kCorrupt, "ternary: block offsets do not ascend from 0", at, previous,
                                    offset);
        if (b > 0 && offset - previous < layout.live_groups(b - 1, 0) * layout.segments)
            return Status::mismatch(Code::kCorrupt, "ternary: a block has fewer words than lanes", at, kLanes,
                                    offset - previous);
        previous = offset;
    }
    const uint64_t end = layout.payload_at + uint64_t{previous} * 2, padded = ceil_div(end, 16) * 16;
    if (view.data.size() != padded)
        return Status::mismatch(Code::kShape, "ternary: data size does not match the block offsets", 0, padded,
                                view.data.size());
    if (!all_zero(data + end, padded - end)) return Status::error(Code::kCorrupt, "ternary: padding is not zero", end);
    for (uint64_t r = 0; values && r < layout.rows; ++r)
        if (!std::isfinite(layout.high(data, r)) || !std::isfinite(layout.low(data, r)))
            return Status::mismatch(Code::kCorrupt, "ternary: a level is not finite; row", layout.highs.bits * r / 8, 0,
                                    r);
    return {};
}

// Whether nothing follows the last level up to `end`.
bool stream_ends_in_zeros(const LevelStream& stream, uint64_t rows, uint64_t end, const uint8_t* data) noexcept {
    const uint64_t bit = rows * stream.bits, last = stream.at + bit / 8;
    return (bit % 8 == 0 || data[last] >> (bit % 8) == 0) &&
           all_zero(data + last + (bit % 8 != 0), end - last - (bit % 8 != 0));
}

Status verify(const MatrixView& view) noexcept {
    const TernaryLayout layout(view.spec.data(), view.rows, view.cols);
    const uint64_t stride = layout.padded_cols();
    if (!stream_ends_in_zeros(layout.highs, layout.rows, layout.lows.at, view.data.data()) ||
        !stream_ends_in_zeros(layout.lows, layout.rows, layout.offsets_at, view.data.data()))
        return Status::error(Code::kCorrupt, "ternary: bits left over after the levels", layout.lows.at);
    try {
        const auto table = ternary_table(view.spec.data());
        std::vector<int8_t> trits(layout.rows_in_block(0) * stride);
        for (uint64_t b = 0; b < layout.blocks; ++b) {
            bool clean = true;
            ternary_decode_block(layout, *table, view.data.data(), b, trits.data(), &clean);
            for (uint64_t r = 0; r < layout.rows_in_block(b) && clean; ++r)
                clean = all_zero(reinterpret_cast<const uint8_t*>(trits.data() + r * stride + layout.cols),
                                 stride - layout.cols);
            if (!clean)
                return Status::error(Code::kCorrupt, "ternary: a block is not a stream that the encoder writes",
                                     layout.offsets_at + b * 4);
        }
    } catch (const std::bad_alloc&) {
        return Status::error(Code::kNoSpace, "ternary: out of memory");
    }
    return {};
}

Status decode_rows(const MatrixView& view, uint64_t first, uint64_t count, float* out) noexcept {
    const TernaryLayout layout(view.spec.data(), view.rows, view.cols);
    const uint8_t* const data = view.data.data();
    const uint64_t stride = layout.padded_cols();
    try {
        const auto table = ternary_table(view.spec.data());
        std::vector<int8_t> trits(layout.rows_in_block(0) * stride);
        for (uint64_t b = first / layout.block_rows; b * layout.block_rows < first + count; ++b) {
            ternary_decode_block(layout, *table, data, b, trits.data(), nullptr);
            const uint64_t base = b * layout.block_rows;
            const uint64_t begin = std::max(base, first);
            const uint64_t end = std::min({base + layout.block_rows, first + count});
            for (uint64_t r = begin; r < end; ++r) {
                const float value[3] = {layout.low(data, r), 0.0f, layout.high(data, r)};
                const int8_t* const row = trits.data() + (r - base) * stride;
                for (uint64_t k = 0; k < layout.cols; ++k) *out++ = value[row[k] + 1];
            }
        }
    } catch (const std::bad_alloc&) {
        return Status::error(Code::kNoSpace, "ternary: out of memory");
    }
    return {};
}

}  // namespace

// Encoder: ternary_encode.cpp.
Status ternary_make_spec(std::span<const MatrixInput* const> inputs, SpecBytes& spec, int threads);
Status ternary_encode(const MatrixInput& in, const SpecBytes& spec, std::vector<uint8_t>& out);

extern constinit const Format format_ternary{kTernaryId, "ternary", ternary_make_spec, ternary_encode,
                                             validate,   verify,    decode_rows};

}  // namespace qmoe
