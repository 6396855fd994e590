// The tANS tables of `ternary` and the readable scalar decoder of one block.
#include <algorithm>
#include <cstring>
#include <mutex>

#include "formats/ternary.h"

namespace qmoe {

std::array<uint16_t, kSymbols + 1> ternary_frequencies(const uint8_t* spec) noexcept {
    std::array<uint16_t, kSymbols + 1> freq;
    for (uint32_t v = 0; v < kSymbols; ++v) freq[v] = load<uint16_t>(spec + kClassFreqAt + 2 * kSymbolTable[v].cls);
    freq[kSymbols] = load<uint16_t>(spec + kEscapeFreqAt);
    return freq;
}

void ternary_spread(const std::array<uint16_t, kSymbols + 1>& freq, std::array<uint16_t, kStates>& symbol_of) noexcept {
    // An odd step visits every state once; this one, near 5/8 of the states, keeps a symbol's states evenly apart.
    constexpr uint32_t kStep = (kStates >> 1) + (kStates >> 3) + 3;
    uint32_t position = 0;
    for (uint32_t v = 0; v <= kSymbols; ++v)
        for (uint32_t i = 0; i < freq[v]; ++i) {
            symbol_of[position] = static_cast<uint16_t>(v);
            position = (position + kStep) % kStates;
        }
}

TernaryTable::TernaryTable(const uint8_t* spec) noexcept {
    const auto freq = ternary_frequencies(spec);
    std::array<uint16_t, kStates> symbol_of;
    ternary_spread(freq, symbol_of);
    auto next = freq;
    for (uint32_t state = 0; state < kStates; ++state) {
        const uint32_t v = symbol_of[state];
        const uint32_t x = next[v]++;  // in [freq, 2 freq)
        const uint32_t bits = static_cast<uint32_t>(__builtin_clz(x)) - (31 - kStateBits);
        const uint32_t base = (x << bits) - kStates;
        const uint32_t packed = v == kSymbols ? 0 : kSymbolTable[v].packed;
        entry[state] = packed | bits << 12 | base << 16 | static_cast<uint32_t>(v == kSymbols) << 28;
    }
}

std::shared_ptr<const TernaryTable> ternary_table(const uint8_t* spec) {
    // Models have a spec per packed record; a small ring of the latest tables serves a whole layer.
    constexpr size_t kSlots = 16, kKeyBytes = kEscapeFreqAt + 2 - kClassFreqAt;
    struct Slot {
        std::array<uint8_t, kKeyBytes> key;
        std::shared_ptr<const TernaryTable> table;
    };
    static std::mutex mutex;
    static std::array<Slot, kSlots> slots;
    static size_t oldest = 0;
    const std::lock_guard lock(mutex);
    for (const Slot& slot : slots)
        if (slot.table && std::memcmp(slot.key.data(), spec + kClassFreqAt, kKeyBytes) == 0) return slot.table;
    Slot& slot = slots[oldest];
    slot.table = std::make_shared<const TernaryTable>(spec);
    std::memcpy(slot.key.data(), spec + kClassFreqAt, kKeyBytes);
    oldest = (oldest + 1) % kSlots;
    return slot.table;
}

namespace {

// One lane of a block: its coder state and up to 27 bits read ahead.
struct Lane {
    uint32_t state = 0, buffer = 0, available = 0;
};

// The words that the lanes of a block share.
struct Words {
    const uint8_t* next;
    const uint8_t* end;
    bool overrun = false;

    uint32_t take() noexcept {
        if (next == end) {
            overrun = true;
            return 0;
        }
        const uint32_t word = load<uint16_t>(next);
        next += 2;
        return word;
    }
};

// With kNear the end of the words may be within reach of this step. Far from it no bound needs checking, and then the
// word is loaded whether needed or not: whether it is needed is as good as random, so a branch would be mispredicted a
// quarter of the time.
template <bool kNear>
inline uint32_t read_bits(Lane& lane, Words& words, uint32_t count) noexcept {
    if constexpr (kNear) {
        if (lane.available < count) {
            lane.buffer |= words.take() << lane.available;
            lane.available += 16;
        }
    } else {
        const uint32_t needed = lane.available < count;
        lane.buffer |= (load<uint16_t>(words.next) & (0u - needed)) << lane.available;
        lane.available += needed * 16;
        words.next += needed * 2;
    }
    const uint32_t bits = lane.buffer & ((1u << count) - 1);
    lane.buffer >>= count;
    lane.available -= count;
    return bits;
}

// Six two-bit trits to eight bytes (the last two zero): 0 -> 0, 1 -> 1, 2 -> -1, and 3, which no encoder writes, -> 0.
constexpr auto make_spread_bytes() {
    std::array<uint64_t, 1u << kRawBits> table{};
    for (uint32_t packed = 0; packed < table.size(); ++packed)
        for (uint32_t i = 0; i < kTrits; ++i) {
            const uint32_t t = (packed >> (2 * i)) & 3;
            table[packed] |= uint64_t{t == 1 ? 1u : t == 2 ? 255u : 0u} << (8 * i);
        }
    return table;
}
constexpr auto kSpreadBytes = make_spread_bytes();

constexpr bool has_bad_trit(uint32_t packed) noexcept {
    return (packed & (packed >> 1) & 0x555u) != 0;
}

// One symbol of every lane of the first `live_groups` row groups, to `row` and the rows behind it. False if a raw
// symbol holds a bit pattern that is no trit.
template <bool kNear>
inline bool decode_step(const TernaryLayout& layout, const TernaryTable& table, Lane* lanes, uint32_t live_groups,
                        Words& words, int8_t* row) noexcept {
    const uint64_t stride = layout.padded_cols();
    uint32_t escapes = 0;
    for (uint32_t g = 0, l = 0; g < live_groups; ++g) {
        int8_t* out = row + g * stride;
        for (const uint32_t end = l + layout.segments; l < end; ++l, out += layout.segment_cols) {
            Lane& lane = lanes[l];
            const uint32_t entry = table.entry[lane.state];
            lane.state = (entry >> 16 & (kStates - 1)) + read_bits<kNear>(lane, words, entry >> 12 & 15);
            escapes |= (entry >> 28) << l;
            std::memcpy(out, &kSpreadBytes[entry % kStates], kTrits);
        }
    }
    bool sound = true;
    for (; escapes != 0; escapes &= escapes - 1) {
        const uint32_t l = static_cast<uint32_t>(__builtin_ctz(escapes));
        const uint32_t packed = read_bits<kNear>(lanes[l], words, kRawBits);
        sound &= !has_bad_trit(packed);
        std::memcpy(row + l / layout.segments * stride + l % layout.segments * layout.segment_cols,
                    &kSpreadBytes[packed], kTrits);
    }
    return sound;
}

}  // namespace

void ternary_decode_block(const TernaryLayout& layout, const TernaryTable& table, const uint8_t* data, uint64_t block,
                          int8_t* out, bool* clean) noexcept {
    Lane lanes[kLanes];
    const uint8_t* const begin = layout.words(data, block);
    Words words{begin, begin + 2 * layout.word_count(data, block)};
    bool bad = false;

    const uint32_t groups = kLanes / layout.segments;
    const uint64_t stride = layout.padded_cols();

    for (uint32_t g = 0; g < layout.live_groups(block, 0); ++g)
        for (uint32_t s = 0; s < layout.segments; ++s) {
            Lane& lane = lanes[g * layout.segments + s];
            const uint32_t word = words.take();
            lane = {word % kStates, word / kStates, 16 - kStateBits};
        }
    for (uint32_t j = 0; j < layout.rows_per_lane; ++j) {
        const uint32_t live_groups = layout.live_groups(block, j);
        int8_t* row = out + uint64_t{j} * groups * stride;
        for (uint64_t step = 0; step < layout.steps && live_groups > 0; ++step, row += kTrits) {
            // A step takes at most two words a lane.
            const bool far = words.end - words.next >= static_cast<ptrdiff_t>(2 * kLanes * sizeof(uint16_t));
            bad |= !(far ? decode_step<false>(layout, table, lanes, live_groups, words, row)
                         : decode_step<true>(layout, table, lanes, live_groups, words, row));
        }
    }
    if (clean == nullptr) return;
    for (const Lane& lane : lanes)
        bad |= lane.state != 0 || lane.buffer != 0;  // the encoder starts at 0 and pads with 0
    *clean = !bad && !words.overrun && words.next == words.end;
}

}  // namespace qmoe
