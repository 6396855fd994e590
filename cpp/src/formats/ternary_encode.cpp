// Encoder of `ternary`: chooses the slots of the 4096 states and the geometry of the lanes, then codes block by block.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "cpu/pool.h"
#include "formats/ternary.h"
#include "formats/ternary_spec.h"

namespace qmoe {
namespace {

// Packed trits (two bits each) to symbol number; unused patterns map to the escape and never occur.
constexpr std::array<uint16_t, 1u << kRawBits> kSymbolOfPacked = [] {
    std::array<uint16_t, 1u << kRawBits> table{};
    table.fill(kSymbols);
    for (uint32_t v = 0; v < kSymbols; ++v) table[kSymbolTable[v].packed] = static_cast<uint16_t>(v);
    return table;
}();

// The same to classes: what the census counts.
constexpr std::array<uint8_t, 1u << kRawBits> kClassOfPacked = [] {
    std::array<uint8_t, 1u << kRawBits> table{};
    for (const SymbolInfo& symbol : kSymbolTable) table[symbol.packed] = symbol.cls;
    return table;
}();

// Six signed bytes -1, 0, 1 (and two more that are ignored) to twelve bits.
inline uint32_t pack_trits(const int8_t* p) noexcept {
    uint64_t x = load<uint64_t>(reinterpret_cast<const uint8_t*>(p)) & 0xFFFFFFFFFFFFu;
    x = (x & 0x010101010101u) + ((x >> 1) & 0x010101010101u);  // 0, 1, 2 in every byte
    x = (x | x >> 6) & 0x000F000F000Fu;
    return static_cast<uint32_t>((x | x >> 12 | x >> 24) & 0xFFFu);
}

// Copies one row, cut into segments, with zeros to the full length plus slack for eight-byte loads. False on a bad
// trit.
bool pad_row(const int8_t* row, uint64_t cols, std::vector<int8_t>& padded) noexcept {
    uint8_t bad = 0;
    for (uint64_t k = 0; k < cols; ++k) {
        padded[k] = row[k];
        bad |= static_cast<uint8_t>(row[k] + 1) > 2;
    }
    return !bad;
}

// How many symbols of each class the inputs hold. Counted on whole rows, since the geometry is chosen later: segments
// cut between symbols, and what their last one is filled up with are zero symbols, which always have slots.
Status count_symbols(const MatrixInput& in, TernaryCensus& census) {
    if (in.trits.size() != in.rows * in.cols)
        return Status::mismatch(Code::kShape, "ternary: number of trits", 0, in.rows * in.cols, in.trits.size());
    std::vector<int8_t> padded(ceil_div(in.cols, kTrits) * kTrits + 2);
    for (uint64_t r = 0; r < in.rows; ++r) {
        if (!pad_row(in.trits.data() + r * in.cols, in.cols, padded))
            return Status::mismatch(Code::kValue, "ternary: a trit is not -1, 0 or 1; row", 0, 0, r);
        for (uint64_t k = 0; k < in.cols; k += kTrits) ++census.count[kClassOfPacked[pack_trits(padded.data() + k)]];
    }
    census.symbols = in.rows * ceil_div(in.cols, kTrits);
    census.weights = in.rows * in.cols;
    return {};
}

Status take_census(std::span<const MatrixInput* const> inputs, TernaryCensus& census, int threads) {
    std::vector<TernaryCensus> parts(inputs.size());
    std::vector<Status> statuses(inputs.size());
    parallel_for(inputs.size(), threads, [&](uint64_t i) {
        try {
            statuses[i] = count_symbols(*inputs[i], parts[i]);
        } catch (const std::bad_alloc&) {
            statuses[i] = Status::error(Code::kNoSpace, "ternary: out of memory");
        }
    });
    for (size_t i = 0; i < inputs.size(); ++i) {
        QMOE_TRY(statuses[i]);
        for (uint32_t c = 0; c < kClasses; ++c) census.count[c] += parts[i].count[c];
        census.symbols += parts[i].symbols;
        census.weights += parts[i].weights;
    }
    return {};
}

struct Slots {
    std::array<uint16_t, kClasses> cls{};
    uint16_t escape = 0;
    double bits = std::numeric_limits<double>::infinity();  // expected total
};

// Best slots when exactly the classes in `kept` have codes of their own. Starts from the rounded-down ideal, then
// spends (or takes back) slots where a slot is worth most (least). Class 0 has one member, so every remainder can be
// placed.
Slots fit_slots(const TernaryCensus& census, std::span<const uint32_t> kept) {
    Slots slots;
    uint64_t escaped = census.symbols;
    int64_t left = kStates;
    const double per_symbol = static_cast<double>(kStates) / static_cast<double>(census.symbols);
    for (const uint32_t c : kept) {
        escaped -= census.count[c];
        slots.cls[c] = static_cast<uint16_t>(
            std::max(1.0, std::floor(static_cast<double>(census.count[c]) * per_symbol / kTernaryMembers[c])));
        left -= int64_t{slots.cls[c]} * kTernaryMembers[c];
    }
    if (escaped > 0)
        slots.escape = static_cast<uint16_t>(std::max(1.0, std::round(static_cast<double>(escaped) * per_symbol)));
    left -= slots.escape;
    while (left != 0) {
        double best = left > 0 ? -1.0 : std::numeric_limits<double>::infinity();
        uint32_t chosen = kClasses;
        for (const uint32_t c : kept) {
            if (left > 0 ? kTernaryMembers[c] > left : slots.cls[c] == 1) continue;
            const double f = slots.cls[c], count = static_cast<double>(census.count[c]);
            const double worth = count * std::log2(left > 0 ? (f + 1) / f : f / (f - 1)) / kTernaryMembers[c];
            if (left > 0 ? worth > best : worth < best) {
                best = worth;
                chosen = c;
            }
        }
        if (chosen == kClasses) return slots;  // more classes than states can hold: infinite cost
        slots.cls[chosen] = static_cast<uint16_t>(slots.cls[chosen] + (left > 0 ? 1 : -1));
        left += left > 0 ? -int64_t{kTernaryMembers[chosen]} : int64_t{kTernaryMembers[chosen]};
    }
    slots.bits = escaped == 0 ? 0.0 : static_cast<double>(escaped) * (kStateBits - std::log2(slots.escape) + kRawBits);
    for (const uint32_t c : kept)
        slots.bits += static_cast<double>(census.count[c]) * (kStateBits - std::log2(slots.cls[c]));
    return slots;
}

// Classes by how often one of their members occurs; all prefixes are tried and the cheapest wins.
Slots choose_slots(const TernaryCensus& census) {
    std::array<uint32_t, kClasses> order;
    for (uint32_t c = 0; c < kClasses; ++c) order[c] = c;
    std::stable_sort(order.begin() + 1, order.end(), [&](uint32_t a, uint32_t b) {
        return census.count[a] * kTernaryMembers[b] > census.count[b] * kTernaryMembers[a];
    });
    Slots best;
    for (size_t n = 1; n <= kClasses; ++n) {
        const Slots slots = fit_slots(census, {order.data(), n});
        if (slots.bits < best.bits) best = slots;
    }
    return best;
}

// The smallest pattern of one level over all inputs and the bits that hold what the others exceed it by.
Status choose_levels(std::span<const MatrixInput* const> inputs, uint32_t per_row, uint32_t which, SpecBytes& spec) {
    uint32_t least = UINT16_MAX, most = 0;
    for (const MatrixInput* in : inputs) {
        if (in->levels.size() != in->rows * per_row)
            return Status::mismatch(Code::kShape, "ternary: number of levels", 0, in->rows * per_row,
                                    in->levels.size());
        for (uint64_t r = 0; r < in->rows; ++r) {
            const float level = in->levels[r * per_row + (per_row - 1 - which)];
            const uint16_t pattern = float_to_bfloat(level);
            if (!std::isfinite(level) || bfloat_to_float(pattern) != level)
                return Status::mismatch(
                    Code::kValue, "ternary: a level is not finite or not representable in bfloat16; row", 0, 0, r);
            least = std::min<uint32_t>(least, pattern);
            most = std::max<uint32_t>(most, pattern);
        }
    }
    store<uint16_t>(spec.data() + kLevelBaseAt + 2 * which, static_cast<uint16_t>(least));
    spec[kLevelBitsAt + which] = static_cast<uint8_t>(32 - (most == least ? 32 : __builtin_clz(most - least)));
    return {};
}

void put_levels(const MatrixInput& in, const LevelStream& stream, uint32_t per_row, uint32_t which,
                uint8_t* out) noexcept {
    for (uint64_t r = 0; r < in.rows; ++r) {
        const uint32_t excess = float_to_bfloat(in.levels[r * per_row + (per_row - 1 - which)]) - stream.base;
        uint8_t* const p = out + stream.at + r * stream.bits / 8;
        store(p, load<uint32_t>(p) | excess << (r * stream.bits % 8));
    }
}

// Every lane costs its 12-bit state and on average half a word of padding. Short lanes are what a GPU hides latency
// with and what lets a CPU decode a few rows alone, so lanes are made only just long enough: levels and lane ends
// together may cost 3 % of the payload, but lane ends always get 1.25 %.
constexpr double kLaneBits = kStateBits + 7.5, kOverhead = 0.03, kLeastLaneShare = 0.0125;

void choose_geometry(uint64_t rows, uint64_t cols, double bits_per_weight, SpecBytes& spec) {
    const double bits = std::max(bits_per_weight, 1e-3), level_bits = spec[kLevelBitsAt] + spec[kLevelBitsAt + 1];
    const double share = std::max(kOverhead - level_bits / (static_cast<double>(cols) * bits), kLeastLaneShare);
    const double wanted = std::clamp(kLaneBits / (share * bits), 256.0, double{kMaxLaneWeights} / 2);
    const auto padding = [&](uint64_t s) { return ceil_div(ceil_div(cols, s), kTrits) * kTrits * s - cols; };
    const auto fits = [&](uint64_t s) { return (s - 1) * ceil_div(ceil_div(cols, s), kTrits) * kTrits < cols; };
    // Four segments a row (the four lanes that share a row of a tensor-core tile) unless rows are too short to cut or
    // so long that more segments still leave every lane its length.
    uint64_t segments = 1;
    for (uint64_t s = 4; s <= kLanes; s *= 2)
        if (fits(s) && padding(s) * 100 <= cols &&
            (s == 4 || static_cast<double>(cols) / static_cast<double>(s) >= wanted))
            segments = s;
    // Rows longer than the lane limit are cut however much padding that takes.
    while (segments < kLanes && ceil_div(cols, segments) > kMaxLaneWeights) segments *= 2;
    const uint64_t segment_cols = ceil_div(ceil_div(cols, segments), kTrits) * kTrits, groups = kLanes / segments;
    uint64_t per_lane =
        std::max<uint64_t>(1, static_cast<uint64_t>(std::ceil(wanted / static_cast<double>(segment_cols))));
    per_lane = std::min(per_lane, std::max<uint64_t>(1, kMaxLaneWeights / segment_cols));
    // Spread the rows evenly over the blocks, so that the last block is not a short one.
    const uint64_t blocks = std::max<uint64_t>(1, rows / (groups * per_lane));
    const uint64_t even = ceil_div(rows, groups * blocks);
    if (even * segment_cols <= kMaxLaneWeights) per_lane = even;
    spec[kSegmentsAt] = static_cast<uint8_t>(segments);
    store<uint16_t>(spec.data() + kRowsPerLaneAt, static_cast<uint16_t>(per_lane));
}

// Codes blocks in three passes: every lane backwards (tANS), every lane's bits into the words that its reader will want
// in turn, and the words of all lanes into the order in which a reader asks for them. Chains of dependent steps are what
// this costs, and branches that go either way: lanes go several at a time, and what may or may not be written is written
// always, and the place moved on only if it counts.
class BlockEncoder {
  public:
    BlockEncoder(const TernaryLayout& layout, const uint8_t* spec)
        : layout_(layout),
          table_(spec),
          lane_steps_(layout.rows_per_lane * layout.steps),
          padded_(layout.padded_cols() + 2),
          packed_(kLanes * lane_steps_),
          bits_(kLanes * lane_steps_),
          counts_(kLanes * lane_steps_),
          escapes_(lane_steps_) {}

    Status encode(const MatrixInput& in, uint64_t block, std::vector<uint8_t>& out) {
        const uint32_t groups = kLanes / layout_.segments, lanes = layout_.live_groups(block, 0) * layout_.segments;
        for (uint64_t r = 0; r < layout_.rows_in_block(block); ++r) {
            if (!pad_row(in.trits.data() + (block * layout_.block_rows + r) * in.cols, in.cols, padded_))
                return Status::mismatch(Code::kValue, "ternary: a trit is not -1, 0 or 1; row", 0, 0,
                                        block * layout_.block_rows + r);
            for (uint32_t s = 0; s < layout_.segments; ++s) {
                uint16_t* const lane =
                    packed_.data() + (r % groups * layout_.segments + s) * lane_steps_ + r / groups * layout_.steps;
                const int8_t* const trits = padded_.data() + s * layout_.segment_cols;
                for (uint64_t step = 0; step < layout_.steps; ++step)
                    lane[step] = static_cast<uint16_t>(pack_trits(trits + step * kTrits));
            }
        }
        std::fill(escapes_.begin(), escapes_.end(), false);
        std::array<uint32_t, kLanes> state;
        for (uint32_t first = 0; first < lanes; first += kAtOnce)
            code_lanes(block, first, std::min(first + kAtOnce, lanes), state.data() + first);
        size_t total = 0;
        words_.resize(lanes);
        for (uint32_t l = 0; l < lanes; ++l) {
            fill_words(l, steps_of(block, l), state[l]);
            total += words_[l].size() - 1;
        }
        interleave(block, lanes, total, out);
        return {};
    }

  private:
    static constexpr uint32_t kAtOnce = 4;

    // Symbols of a lane of this block.
    uint64_t steps_of(uint64_t block, uint32_t lane) const noexcept {
        const uint64_t rows = layout_.rows_in_block(block), groups = kLanes / layout_.segments;
        return (rows - lane / layout_.segments + groups - 1) / groups * layout_.steps;
    }

    QMOE_INLINE void code(uint32_t lane, uint64_t t, uint32_t& x) noexcept {
        const uint32_t v = table_.symbol_of[packed_[lane * lane_steps_ + t]];
        const uint32_t count = (x + table_.delta[v]) >> 16;
        bits_[lane * lane_steps_ + t] = static_cast<uint16_t>(x & ((1u << count) - 1));
        counts_[t * kLanes + lane] = static_cast<uint8_t>(count | (v == kSymbols ? kEscaped : 0u));
        escapes_[t] = static_cast<uint8_t>(escapes_[t] | (v == kSymbols));
        x = table_.next[static_cast<size_t>(table_.start[v] + static_cast<int32_t>(x >> count))];
    }

    // Lanes [first, last), at most kAtOnce, from their ends; `state` is what their readers begin with.
    void code_lanes(uint64_t block, uint32_t first, uint32_t last, uint32_t* state) noexcept {
        uint64_t common = lane_steps_;
        for (uint32_t l = first; l < last; ++l) common = std::min(common, steps_of(block, l));
        std::array<uint32_t, kAtOnce> x;
        x.fill(kStates);  // readers end in state 0
        for (uint32_t l = first; l < last; ++l)
            for (uint64_t t = steps_of(block, l); t-- > common;) code(l, t, x[l - first]);
        if (last - first == kAtOnce)
            for (uint64_t t = common; t-- > 0;)
                for (uint32_t i = 0; i < kAtOnce; ++i) code(first + i, t, x[i]);
        else
            for (uint32_t l = first; l < last; ++l)
                for (uint64_t t = common; t-- > 0;) code(l, t, x[l - first]);
        std::copy_n(x.begin(), last - first, state);
    }

    // The bits of one lane, low bit first, in words, and one word more that is never handed out.
    void fill_words(uint32_t lane, uint64_t steps, uint32_t state) {
        std::vector<uint16_t>& words = words_[lane];
        words.resize(steps * 2 + 3);  // at most twelve bits a step, and twelve more of an escape
        uint16_t* at = words.data();
        uint32_t buffer = state - kStates, filled = kStateBits;
        const auto put = [&](uint32_t bits, uint32_t count) {
            buffer |= bits << filled;
            filled += count;
            const uint32_t full = filled >> 4;
            *at = static_cast<uint16_t>(buffer);
            at += full;
            buffer >>= 16 * full;
            filled &= 15;
        };
        const uint16_t *const bits = bits_.data() + lane * lane_steps_, *const raw =
                                                                            packed_.data() + lane * lane_steps_;
        const uint8_t* const counts = counts_.data() + lane;
        for (uint64_t t = 0; t < steps; ++t) {
            const uint32_t count = counts[t * kLanes];
            put(bits[t], count & ~kEscaped);
            if (count & kEscaped) put(raw[t], kRawBits);
        }
        if (filled > 0) *at++ = static_cast<uint16_t>(buffer);
        words.resize(static_cast<size_t>(at - words.data()) + 1);
    }

    // Replays the reader: words leave in the order in which its lanes ask for them.
    void interleave(uint64_t block, uint32_t lanes, size_t total, std::vector<uint8_t>& out) {
        std::array<const uint16_t*, kLanes> next;
        std::array<uint32_t, kLanes> available;
        ordered_.resize(total + 1);
        uint16_t* at = ordered_.data();
        for (uint32_t l = 0; l < lanes; ++l) {
            next[l] = words_[l].data();
            *at++ = *next[l]++;
            available[l] = 16 - kStateBits;
        }
        const auto hand_out = [&](uint32_t l, uint32_t count) {
            const uint32_t wanted = available[l] < count;
            *at = *next[l];
            at += wanted;
            next[l] += wanted;
            available[l] += 16 * wanted - count;
        };
        uint64_t t = 0;
        for (uint32_t j = 0; j < layout_.rows_per_lane; ++j) {
            const uint32_t live = layout_.live_groups(block, j) * layout_.segments;
            for (uint64_t step = 0; step < layout_.steps; ++step, ++t) {
                const uint8_t* const counts = counts_.data() + t * kLanes;
                for (uint32_t l = 0; l < live; ++l) hand_out(l, counts[l] & ~kEscaped);
                for (uint32_t l = 0; escapes_[t] && l < live; ++l)
                    if (counts[l] & kEscaped) hand_out(l, kRawBits);
            }
        }
        const auto* const bytes = reinterpret_cast<const uint8_t*>(ordered_.data());
        out.insert(out.end(), bytes, bytes + 2 * total);
    }

    static constexpr uint32_t kEscaped = 0x80;

    const TernaryLayout& layout_;
    TernaryEncodingTables table_;
    uint64_t lane_steps_;  // symbols of a full lane
    std::vector<int8_t> padded_;
    std::vector<uint16_t> packed_, bits_;  // by lane, then step: packed trits, and the state bits of the step
    std::vector<uint8_t> counts_,
        escapes_;  // by step, then lane: how many bits, kEscaped; by step: whether any escapes
    std::vector<std::vector<uint16_t>> words_;
    std::vector<uint16_t> ordered_;
};

}  // namespace

TernaryEncodingTables::TernaryEncodingTables(const uint8_t* spec) noexcept {
    const auto freq = ternary_frequencies(spec);
    std::array<uint16_t, kStates> symbol_of_state;
    ternary_spread(freq, symbol_of_state);
    std::array<uint32_t, kSymbols + 1> fill;
    uint32_t sum = 0;
    for (uint32_t v = 0; v <= kSymbols; ++v) {
        const uint32_t f = freq[v];
        fill[v] = sum;
        delta[v] = 0, start[v] = 0;
        if (f == 1) {
            delta[v] = (kStateBits << 16) - kStates, start[v] = static_cast<int32_t>(sum) - 1;
        } else if (f != 0) {
            const uint32_t most = kStateBits - (31u - static_cast<uint32_t>(__builtin_clz(f - 1)));
            delta[v] = (most << 16) - (f << most), start[v] = static_cast<int32_t>(sum) - static_cast<int32_t>(f);
        }
        sum += f;
    }
    for (uint32_t state = 0; state < kStates; ++state)
        next[fill[symbol_of_state[state]]++] = static_cast<uint16_t>(state + kStates);
    for (uint32_t p = 0; p < kStates; ++p)
        symbol_of[p] = freq[kSymbolOfPacked[p]] != 0 ? kSymbolOfPacked[p] : static_cast<uint16_t>(kSymbols);
}

Status ternary_describe_levels(std::span<const MatrixInput* const> inputs, SpecBytes& spec) {
    const MatrixInput& first = *inputs.front();
    spec = {};
    if (first.rows == 0 || (first.levels.size() != first.rows && first.levels.size() != 2 * first.rows))
        return Status::mismatch(Code::kShape, "ternary: number of levels", 0, 2 * first.rows, first.levels.size());
    store<uint16_t>(spec.data(), kTernaryId);
    const auto per_row = static_cast<uint32_t>(first.levels.size() / first.rows);
    spec[kLevelsAt] = static_cast<uint8_t>(per_row);
    for (uint32_t which = 0; which < per_row; ++which) QMOE_TRY(choose_levels(inputs, per_row, which, spec));
    return {};
}

void ternary_describe_code(const TernaryCensus& census, uint64_t rows, uint64_t cols, SpecBytes& spec) {
    const Slots slots = choose_slots(census);
    for (uint32_t c = 0; c < kClasses; ++c) store<uint16_t>(spec.data() + kClassFreqAt + 2 * c, slots.cls[c]);
    store<uint16_t>(spec.data() + kEscapeFreqAt, slots.escape);
    choose_geometry(rows, cols, slots.bits / static_cast<double>(census.weights), spec);
}

void ternary_put_levels(const MatrixInput& in, const TernaryLayout& layout, uint8_t* out) noexcept {
    put_levels(in, layout.highs, layout.levels, 0, out);
    if (layout.levels == 2) put_levels(in, layout.lows, 2, 1, out);
}

Status ternary_make_spec(std::span<const MatrixInput* const> inputs, SpecBytes& spec, int threads) {
    QMOE_TRY(ternary_describe_levels(inputs, spec));
    TernaryCensus census;
    QMOE_TRY(take_census(inputs, census, threads));
    ternary_describe_code(census, inputs.front()->rows, inputs.front()->cols, spec);
    return {};
}

Status ternary_encode(const MatrixInput& in, const SpecBytes& spec, std::vector<uint8_t>& out) {
    const TernaryLayout layout(spec.data(), in.rows, in.cols);
    const size_t begin = out.size();
    out.resize(begin + layout.payload_at);
    ternary_put_levels(in, layout, out.data() + begin);
    BlockEncoder encoder(layout, spec.data());
    for (uint64_t block = 0; block < layout.blocks; ++block) {
        QMOE_TRY(encoder.encode(in, block, out));
        const uint64_t words = (out.size() - begin - layout.payload_at) / 2;
        if (words > UINT32_MAX) return Status::error(Code::kLimit, "ternary: payload over 8 GiB");
        store<uint32_t>(out.data() + begin + layout.offsets_at + (block + 1) * 4, static_cast<uint32_t>(words));
    }
    return {};
}

}  // namespace qmoe
