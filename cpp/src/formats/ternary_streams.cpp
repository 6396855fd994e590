// Encoder and readable decoder of the streams that GPU products read.
#include "formats/ternary_streams.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "cpu/pool.h"

namespace qmoe {
namespace {

// Trits of a stored matrix, block by block of its format: calls row(r, trits) for every row.
template <typename Row>
void for_each_row(const TernaryLayout& stored, const uint8_t* data, const uint8_t* spec, uint64_t blocks, Row row) {
    const auto table = ternary_table(spec);
    std::vector<int8_t> trits(stored.block_rows * stored.padded_cols());
    for (uint64_t block = 0; block < blocks; ++block) {
        ternary_decode_block(stored, *table, data, block, trits.data(), nullptr);
        for (uint64_t r = 0; r < stored.rows_in_block(block); ++r)
            row(block * stored.block_rows + r, trits.data() + r * stored.padded_cols());
    }
}

// Symbols that lead from `from` (one behind the last slot) to `to`, but the last one: calls visit(slots - 1) for each.
template <typename Visit>
inline uint32_t hop(uint32_t from, uint32_t to, uint32_t step, Visit visit) {
    while (to - from >= step) {
        const uint32_t last = from + step - 1;            // the farthest that one symbol gets
        const uint32_t empty = last - (last + 1) % step;  // on the way there is one empty slot
        visit(empty - from);
        from = empty + 1;
    }
    return from;
}

uint64_t count_symbols(const TernaryStreams& layout, const int8_t* trits) noexcept {
    uint64_t count = 0;
    uint32_t at = 0;
    for (uint32_t k = 0; k < layout.cols; ++k) {
        if (trits[k] == 0) continue;
        const uint32_t slot = layout.slot(k);
        hop(at, slot, layout.step(), [&](uint32_t) { ++count; });
        ++count;
        at = slot + 1;
    }
    return count;
}

// A row's symbols as quads, and where each of them begins.
struct RowStream {
    std::vector<uint32_t> words;
    std::vector<uint16_t> starts;
};

class RowEncoder {
  public:
    explicit RowEncoder(const TernaryStreams& layout) : layout_(layout) {}

    void encode(const int8_t* trits, RowStream& out) {
        out.words.clear(), out.starts.clear();
        out_ = &out, symbols_ = 0, at_ = 0;
        for (uint32_t k = 0; k < layout_.cols; ++k) {
            if (trits[k] == 0) continue;
            const uint32_t slot = layout_.slot(k);
            hop(at_, slot, layout_.step(), [&](uint32_t gap) { put(gap, false); });
            put(slot - at_, trits[k] < 0);
        }
        while (symbols_ != 0) {  // to the end of the quad
            const uint32_t empty = at_ | (layout_.step() - 1);
            put(at_ >= layout_.slots() ? 0 : empty - at_, false);
        }
    }

  private:
    void put(uint32_t gap, bool minus) {
        if (symbols_ == 0) {
            out_->starts.push_back(static_cast<uint16_t>(at_));
            out_->words.resize(out_->words.size() + 4, 0);
        }
        const uint32_t bits = layout_.gap_bits + 1, symbol = gap << 1 | (minus ? 1 : 0), bit = symbols_ * bits;
        uint32_t* const word = out_->words.data() + out_->words.size() - 4 + bit / 32;
        const uint64_t placed = uint64_t{symbol} << (64 - bits - bit % 32);
        word[0] |= static_cast<uint32_t>(placed >> 32);
        if (static_cast<uint32_t>(placed) != 0) word[1] |= static_cast<uint32_t>(placed);
        at_ += gap + 1;
        symbols_ = symbols_ + 1 == layout_.symbols() ? 0 : symbols_ + 1;
    }

    const TernaryStreams& layout_;
    RowStream* out_ = nullptr;
    uint32_t symbols_ = 0, at_ = 0;  // of the quad; one behind the last slot
};

bool is_ternary(const MatrixView& view) noexcept {
    return load<uint16_t>(view.spec.data()) == kTernaryId;
}

template <typename T>
void put(std::vector<uint8_t>& out, uint64_t at, T value) noexcept {
    std::memcpy(out.data() + at, &value, sizeof value);
}

void encode_matrix(const MatrixView& view, const TernaryStreams& layout, std::vector<uint8_t>& out) {
    const TernaryLayout stored(view.spec.data(), view.rows, view.cols);
    std::vector<RowStream> streams(view.rows);
    RowEncoder encoder(layout);
    for_each_row(stored, view.data.data(), view.spec.data(), stored.blocks,
                 [&](uint64_t row, const int8_t* trits) { encoder.encode(trits, streams[row]); });
    std::vector<uint32_t> order(view.rows);
    std::iota(order.begin(), order.end(), 0u);
    const auto quads_of = [&](uint32_t row) { return streams[row].starts.size(); };
    for (uint64_t first = 0; first < view.rows; first += TernaryStreams::kWindow)
        std::stable_sort(order.begin() + static_cast<int64_t>(first),
                         order.begin() + static_cast<int64_t>(std::min(first + TernaryStreams::kWindow, view.rows)),
                         [&](uint32_t a, uint32_t b) { return quads_of(a) > quads_of(b); });

    out.assign(layout.quads_at, 0);
    uint64_t quads = 0;
    for (uint64_t group = 0; group < layout.groups; ++group) {
        put(out, layout.bases_at + group * 4, static_cast<uint32_t>(quads));
        const uint64_t first = group * layout.group_rows;
        const uint64_t most = quads_of(order[first]);  // they are sorted
        out.resize(layout.quads_at + (quads + most * layout.group_rows) * 16, 0);
        for (uint64_t r = 0; r < layout.group_rows; ++r) {
            const uint64_t at = first + r;
            if (at >= view.rows) {
                put(out, at * 4, static_cast<uint32_t>(view.rows));
                continue;
            }
            const uint32_t row = order[at];
            const uint64_t count = quads_of(row);
            put(out, at * 4, static_cast<uint32_t>(row | count << TernaryStreams::kRowBits));
            const uint32_t high = float_to_bfloat(stored.high(view.data.data(), row));
            put(out, layout.levels_at + at * 4,
                high | uint32_t{float_to_bfloat(stored.low(view.data.data(), row))} << 16);
            for (uint64_t s = 0; s < layout.segments; ++s) {
                const uint64_t quad = s * count / layout.segments;
                put(out, layout.starts_at + (at * layout.segments + s) * 2,
                    quad < count ? streams[row].starts[quad] : uint16_t{0});
            }
            for (uint64_t k = 0; k < count; ++k)
                std::memcpy(out.data() + layout.quads_at + (quads + k * layout.group_rows + r) * 16,
                            streams[row].words.data() + 4 * k, 16);
        }
        quads += most * layout.group_rows;
    }
    put(out, layout.bases_at + layout.groups * 4, static_cast<uint32_t>(quads));
}

}  // namespace

void ternary_streams_decode(const TernaryStreams& layout, std::span<const uint8_t> bytes, int8_t* trits,
                            float* levels) noexcept {
    std::fill_n(trits, layout.rows * layout.cols, int8_t{0});
    const uint32_t bits = layout.gap_bits + 1;
    for (uint64_t at = 0; at < layout.padded_rows(); ++at) {
        const uint32_t info = load<uint32_t>(bytes.data() + at * 4), count = info >> TernaryStreams::kRowBits;
        const uint64_t row = info & ((1u << TernaryStreams::kRowBits) - 1), group = at / layout.group_rows;
        if (row >= layout.rows) continue;
        const uint32_t of_row = load<uint32_t>(bytes.data() + layout.levels_at + at * 4);
        levels[2 * row + 1] = bfloat_to_float(static_cast<uint16_t>(of_row));
        levels[2 * row] = bfloat_to_float(static_cast<uint16_t>(of_row >> 16));
        const uint64_t base = load<uint32_t>(bytes.data() + layout.bases_at + group * 4);
        for (uint32_t s = 0; s < layout.segments; ++s) {
            uint32_t next = load<uint16_t>(bytes.data() + layout.starts_at + (at * layout.segments + s) * 2);
            for (uint32_t k = s * count / layout.segments; k < (s + 1) * count / layout.segments; ++k) {
                const uint8_t* const quad =
                    bytes.data() + layout.quads_at + (base + k * layout.group_rows + at % layout.group_rows) * 16;
                for (uint32_t i = 0; i < layout.symbols(); ++i) {
                    uint32_t symbol = 0;
                    for (uint32_t bit = i * bits; bit < (i + 1) * bits; ++bit)
                        symbol = symbol << 1 | (load<uint32_t>(quad + bit / 32 * 4) >> (31 - bit % 32) & 1);
                    const uint32_t slot = next + (symbol >> 1);
                    if (!layout.is_empty(slot))
                        trits[row * layout.cols + layout.col(slot)] = (symbol & 1) != 0 ? -1 : 1;
                    next = slot + 1;
                }
            }
        }
    }
}

namespace cuda {

Status ternary_streams_shape(const Record& record, StreamsShape& out) {
    for (uint64_t e = 0; e < record.experts(); ++e)
        if (!is_ternary(record.matrix(e))) return Status::error(Code::kNoKernel, "streams are of ternary matrices");
    const MatrixView view = record.matrix(0);
    if (view.rows >= 1u << TernaryStreams::kRowBits)
        return Status::mismatch(Code::kNoKernel, "streams: rows", 0, (1u << TernaryStreams::kRowBits) - 1, view.rows);
    const TernaryLayout stored(view.spec.data(), view.rows, view.cols);
    // Some hundred rows tell how far nonzeros are from each other.
    const uint64_t blocks = std::min(stored.blocks, ceil_div(uint64_t{512}, stored.block_rows));
    uint64_t best = 0, best_quads = ~uint64_t{0}, seen = 0;
    std::array<uint64_t, TernaryStreams::kMaxGapBits + 1> symbols{};
    for_each_row(stored, view.data.data(), view.spec.data(), blocks, [&](uint64_t, const int8_t* trits) {
        ++seen;
        for (uint32_t bits = TernaryStreams::kMinGapBits; bits <= TernaryStreams::kMaxGapBits; ++bits)
            symbols[bits] += count_symbols(TernaryStreams({view.rows, view.cols, bits, 1}), trits);
    });
    for (uint32_t bits = TernaryStreams::kMinGapBits; bits <= TernaryStreams::kMaxGapBits; ++bits) {
        const TernaryStreams layout({view.rows, view.cols, bits, 1});
        if (layout.all_slots() > 0xffff) continue;
        const uint64_t quads = ceil_div(symbols[bits], layout.symbols());
        if (quads <= best_quads) best = bits, best_quads = quads;  // of equals the one with fewer symbols
    }
    if (best == 0) return Status::mismatch(Code::kNoKernel, "streams: columns", 0, 0xffff, view.cols);
    // Two and a half to five quads a lane: enough to be worth its start, few enough that all lanes have something to do.
    uint32_t segments = 1;
    while (segments < kLanes && 5 * segments * seen <= best_quads) segments *= 2;
    // A group's slots fit into shared memory, with two bits each.
    const uint64_t slots = TernaryStreams({view.rows, view.cols, static_cast<uint32_t>(best), 1}).all_slots();
    while (kLanes / segments * slots > 1 << 19) segments *= 2;
    out = {view.rows, view.cols, static_cast<uint32_t>(best), segments};
    return {};
}

Status ternary_streams(const Record& record, const StreamsShape& shape, std::vector<uint8_t>& out, int threads) {
    const bool sound = shape.gap_bits >= TernaryStreams::kMinGapBits && shape.gap_bits <= TernaryStreams::kMaxGapBits &&
                       shape.segments > 0 && shape.segments <= kLanes && (shape.segments & (shape.segments - 1)) == 0;
    if (!sound) return Status::error(Code::kValue, "streams: no such shape");
    if (shape.rows != record.rows() || shape.cols != record.cols())
        return Status::error(Code::kShape, "streams: the shape is of other matrices");
    for (uint64_t e = 0; e < record.experts(); ++e)
        if (!is_ternary(record.matrix(e))) return Status::error(Code::kNoKernel, "streams are of ternary matrices");
    const TernaryStreams layout(shape);
    if (layout.all_slots() > 0xffff || shape.rows >= 1u << TernaryStreams::kRowBits)
        return Status::error(Code::kNoKernel, "streams: too many rows or columns");
    std::vector<std::vector<uint8_t>> matrices(record.experts());
    parallel_for(matrices.size(), threads, [&](uint64_t e) { encode_matrix(record.matrix(e), layout, matrices[e]); });
    uint64_t at = ceil_div(matrices.size() * 8, 16) * 16;
    out.assign(at, 0);
    for (uint64_t e = 0; e < matrices.size(); ++e) {
        put(out, e * 8, at);
        at += matrices[e].size();
    }
    out.reserve(at);
    for (std::vector<uint8_t>& matrix : matrices) {
        out.insert(out.end(), matrix.begin(), matrix.end());
        std::vector<uint8_t>().swap(matrix);
    }
    return {};
}

}  // namespace cuda
}  // namespace qmoe
