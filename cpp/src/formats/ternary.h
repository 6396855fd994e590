// Layout and decoding tables of the `ternary` format, shared by the codec and the kernels. See ternary.cpp and
// FORMAT.md.
#pragma once

#include <array>
#include <cstdint>
#include <memory>

#include "bytes.h"
#include "half.h"
#include "qmoe/checked.h"
#include "qmoe/format.h"

namespace qmoe {

inline constexpr uint16_t kTernaryId = 2;
inline constexpr uint32_t kTrits = 6;      // trits per symbol
inline constexpr uint32_t kSymbols = 729;  // 3^6
inline constexpr uint32_t kStateBits = 12;
inline constexpr uint32_t kStates = 1u << kStateBits;
inline constexpr uint32_t kClasses = 28;  // (plus, minus) counts with plus + minus <= 6
inline constexpr uint32_t kLanes = 32;
inline constexpr uint32_t kRawBits = 2 * kTrits;  // an escaped symbol: six trits of two bits

// Spec fields behind the u16 format id.
inline constexpr size_t kLevelsAt = 2, kSegmentsAt = 3, kRowsPerLaneAt = 4, kClassFreqAt = 8, kEscapeFreqAt = 64;
inline constexpr size_t kLevelBaseAt = 66, kLevelBitsAt = 70, kSpecEnd = 72;  // two u16 and two u8: high, then low

// One level of every row: bfloat16 patterns, stored as what they exceed the smallest by, in as few bits as the largest
// needs. Rows of a matrix are alike, so 16 bits become 5 to 8, without loss.
struct LevelStream {
    uint32_t base = 0, bits = 0;
    uint64_t at = 0;  // bytes from the start of the matrix

    // Reads four bytes; the block offsets behind the levels keep that in bounds.
    QMOE_INLINE float value(const uint8_t* data, uint64_t row) const noexcept {
        const uint64_t bit = row * bits;
        const uint32_t excess = (load<uint32_t>(data + at + bit / 8) >> (bit % 8)) & ((1u << bits) - 1);
        return bfloat_to_float(static_cast<uint16_t>(base + excess));
    }
    uint64_t bytes(uint64_t rows) const noexcept { return ceil_div(rows * bits, 8); }
};

// Index of the class with `plus` ones and `minus` minus-ones: rows of a triangle.
constexpr uint32_t ternary_class(uint32_t plus, uint32_t minus) noexcept {
    const uint32_t nonzero = plus + minus;
    return nonzero * (nonzero + 1) / 2 + minus;
}

// Symbol v = sum of digit_i * 3^i, digit 0 = zero, 1 = plus, 2 = minus; trit i is column i of the six.
struct SymbolInfo {
    uint8_t cls;
    uint16_t packed;  // two bits a trit, trit 0 lowest
};
constexpr std::array<SymbolInfo, kSymbols> make_symbols() noexcept {
    std::array<SymbolInfo, kSymbols> table{};
    for (uint32_t v = 0; v < kSymbols; ++v) {
        uint32_t rest = v, plus = 0, minus = 0, packed = 0;
        for (uint32_t i = 0; i < kTrits; ++i, rest /= 3) {
            plus += rest % 3 == 1;
            minus += rest % 3 == 2;
            packed |= (rest % 3) << (2 * i);
        }
        table[v] = {static_cast<uint8_t>(ternary_class(plus, minus)), static_cast<uint16_t>(packed)};
    }
    return table;
}
inline constexpr std::array<SymbolInfo, kSymbols> kSymbolTable = make_symbols();

inline constexpr std::array<uint16_t, kClasses> kTernaryMembers = [] {  // symbols per class
    std::array<uint16_t, kClasses> members{};
    for (const SymbolInfo& symbol : kSymbolTable) ++members[symbol.cls];
    return members;
}();

// Slots of the 4096 given to every symbol; entry 729 is the escape. Sums to 4096 in a valid spec.
std::array<uint16_t, kSymbols + 1> ternary_frequencies(const uint8_t* spec) noexcept;

// For every state the symbol (729 = escape), in the order that both coders share.
void ternary_spread(const std::array<uint16_t, kSymbols + 1>& freq, std::array<uint16_t, kStates>& symbol_of) noexcept;

// Decoding table. Entry: bits 0-11 packed trits | 12-15 bits to read | 16-27 next state before adding them | 28 escape.
struct TernaryTable {
    std::array<uint32_t, kStates> entry;
    explicit TernaryTable(const uint8_t* spec) noexcept;
};
// tANS encoding. For symbol v in state x (4096..8191), (x + delta[v]) >> 16 bits leave, then next[start[v] + (x >> bits)]
// is the state. symbol_of: by packed trits; those without slots are the escape's.
struct TernaryEncodingTables {
    std::array<uint32_t, kSymbols + 1> delta;
    std::array<int32_t, kSymbols + 1> start;
    std::array<uint16_t, kStates> next, symbol_of;
    explicit TernaryEncodingTables(const uint8_t* spec) noexcept;
};
// A cache of the tables of recently used specs; safe to call from any thread.
std::shared_ptr<const TernaryTable> ternary_table(const uint8_t* spec);

// A lane codes at most this many weights, and a block's worth of bytes stays small, unless one row alone is longer than
// 32 such lanes. Bounds what a few bytes of a hostile file can make a reader do.
inline constexpr uint64_t kMaxLaneWeights = 16384;

// E_UNKNOWN: not a spec that a `ternary` record may have. The layout below is for those that are.
inline Status check_ternary_spec(const uint8_t* spec) noexcept {
    if (load<uint16_t>(spec) != kTernaryId)
        return Status::mismatch(Code::kUnknown, "not a ternary spec", 0, kTernaryId, load<uint16_t>(spec));
    if (spec[kLevelsAt] != 1 && spec[kLevelsAt] != 2)
        return Status::error(Code::kUnknown, "ternary: levels must be 1 or 2", 2);
    const uint32_t segments = spec[kSegmentsAt], rows_per_lane = load<uint16_t>(spec + kRowsPerLaneAt);
    if (segments == 0 || segments > kLanes || (segments & (segments - 1)) != 0)
        return Status::error(Code::kUnknown, "ternary: segments must be 1, 2, 4, 8, 16 or 32", kSegmentsAt);
    if (rows_per_lane == 0 || rows_per_lane > 4096)
        return Status::error(Code::kUnknown, "ternary: rows per lane must be 1 to 4096", kRowsPerLaneAt);
    if (spec[kLevelBitsAt] > 16 || spec[kLevelBitsAt + 1] > 16)
        return Status::error(Code::kUnknown, "ternary: more than 16 bits for a level", kLevelBitsAt);
    if (spec[kLevelsAt] == 1 && (load<uint16_t>(spec + kLevelBaseAt + 2) != 0 || spec[kLevelBitsAt + 1] != 0))
        return Status::error(Code::kUnknown, "ternary: low levels described where there are none", kLevelBaseAt);
    if (!all_zero(spec + 6, 2) || !all_zero(spec + kSpecEnd, kSpecBytes - kSpecEnd))
        return Status::error(Code::kUnknown, "ternary: reserved spec bytes are not zero", 6);
    uint64_t total = load<uint16_t>(spec + kEscapeFreqAt);
    for (uint32_t c = 0; c < kClasses; ++c)
        total += uint64_t{load<uint16_t>(spec + kClassFreqAt + 2 * c)} * kTernaryMembers[c];
    if (total != kStates)
        return Status::mismatch(Code::kUnknown, "ternary: slots do not sum to 4096", kClassFreqAt, kStates, total);
    return {};
}

// Where everything is in one stored matrix, and which lane codes what.
struct TernaryLayout {
    uint32_t levels = 0;  // 1 (low = -high) or 2
    LevelStream highs, lows;
    uint32_t segments = 0;       // a row is cut into this many segments, one lane each
    uint32_t rows_per_lane = 0;  // rows that follow each other in one lane's stream
    uint64_t rows = 0, cols = 0;
    uint64_t segment_cols = 0;  // multiple of 6
    uint64_t steps = 0;         // symbols per segment
    uint64_t block_rows = 0, blocks = 0;
    uint64_t offsets_at = 0, payload_at = 0;

    TernaryLayout(const uint8_t* spec, uint64_t n, uint64_t k) noexcept
        : levels(spec[kLevelsAt]),
          segments(spec[kSegmentsAt]),
          rows_per_lane(load<uint16_t>(spec + kRowsPerLaneAt)),
          rows(n),
          cols(k) {
        segment_cols = ceil_div(ceil_div(k, segments), kTrits) * kTrits;
        steps = segment_cols / kTrits;
        block_rows = uint64_t{kLanes / segments} * rows_per_lane;
        blocks = ceil_div(n, block_rows);
        highs = {load<uint16_t>(spec + kLevelBaseAt), spec[kLevelBitsAt], 0};
        lows = {load<uint16_t>(spec + kLevelBaseAt + 2), spec[kLevelBitsAt + 1], highs.bytes(n)};
        offsets_at = ceil_div(lows.at + lows.bytes(n), 4) * 4;
        payload_at = offsets_at + (blocks + 1) * 4;
    }

    // E_SHAPE, E_LIMIT: matrices of this shape are not cut so.
    Status check_geometry() const noexcept {
        if (segments > 1 && padded_cols() - segment_cols >= cols)
            return Status::mismatch(Code::kShape, "ternary: a segment lies wholly beyond the last column", 0, cols,
                                    padded_cols());
        if (rows_per_lane * segment_cols > kMaxLaneWeights && (segments != kLanes || rows_per_lane != 1))
            return Status::mismatch(Code::kLimit, "ternary: too many weights in a lane", 0, kMaxLaneWeights,
                                    rows_per_lane * segment_cols);
        return {};
    }

    // Row of the matrix that `lane` codes as its j-th.
    QMOE_INLINE uint64_t row(uint64_t block, uint32_t lane, uint32_t j) const noexcept {
        return block * block_rows + uint64_t{j} * (kLanes / segments) + lane / segments;
    }
    QMOE_INLINE uint64_t col(uint32_t lane) const noexcept { return lane % segments * segment_cols; }
    // Row groups of a block that still have a row in round j; each has `segments` lanes at work.
    QMOE_INLINE uint32_t live_groups(uint64_t block, uint32_t j) const noexcept {
        const uint64_t base = row(block, 0, j), groups = kLanes / segments;
        return base >= rows ? 0u : static_cast<uint32_t>(rows - base < groups ? rows - base : groups);
    }
    QMOE_INLINE uint64_t rows_in_block(uint64_t block) const noexcept {
        const uint64_t left = rows - block * block_rows;
        return left < block_rows ? left : block_rows;
    }
    uint64_t padded_cols() const noexcept { return segments * segment_cols; }
    QMOE_INLINE float high(const uint8_t* data, uint64_t r) const noexcept { return highs.value(data, r); }
    QMOE_INLINE float low(const uint8_t* data, uint64_t r) const noexcept {
        return levels == 1 ? -highs.value(data, r) : lows.value(data, r);
    }
    // Payload words of one block.
    const uint8_t* words(const uint8_t* data, uint64_t block) const noexcept {
        return data + payload_at + uint64_t{load<uint32_t>(data + offsets_at + block * 4)} * 2;
    }
    uint64_t word_count(const uint8_t* data, uint64_t block) const noexcept {
        return load<uint32_t>(data + offsets_at + block * 4 + 4) - load<uint32_t>(data + offsets_at + block * 4);
    }
};

// Decodes one block to signed bytes -1, 0, 1: out[r * padded_cols + k] for the block's rows r and k < padded_cols.
// Columns from K on receive the padding of the stream, which an encoder sets to zero. Reads past the block's last word
// give zero bits, so every payload decodes in bounds to something. `clean` (may be null) becomes false unless the
// stream is one that the encoder writes.
void ternary_decode_block(const TernaryLayout& layout, const TernaryTable& table, const uint8_t* data, uint64_t block,
                          int8_t* out, bool* clean) noexcept;

}  // namespace qmoe
