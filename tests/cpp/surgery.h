// Repairs the checksums of a record that was tampered with, so that tests reach what lies behind them. Shared with the
// fuzzers, so it must itself be safe on any bytes.
#pragma once

#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "qmoe/crc32c.h"
#include "qmoe/format.h"

namespace qmoe::test {

inline constexpr size_t kHeader = 64, kEntry = 16;

template <class T>
T peek(std::span<const uint8_t> bytes, size_t at) {
    T value;
    std::memcpy(&value, bytes.data() + at, sizeof value);
    return value;
}

// Matrix checksums where the entries allow, then the header's.
inline void repair_checksums(std::vector<uint8_t>& bytes) {
    if (bytes.size() < kHeader) return;
    const uint64_t experts = peek<uint32_t>(bytes, 8), specs = peek<uint32_t>(bytes, 12);
    const uint64_t entries = kHeader + specs * kSpecBytes, end = entries + experts * kEntry;
    if (end > bytes.size()) return;
    for (uint64_t e = 0; e < experts; ++e) {
        const uint64_t from = peek<uint64_t>(bytes, entries + e * kEntry);
        const uint64_t to = e + 1 < experts ? peek<uint64_t>(bytes, entries + (e + 1) * kEntry) : bytes.size();
        if (from > to || to > bytes.size()) continue;
        const uint32_t crc = crc32c(std::span<const uint8_t>(bytes).subspan(from, to - from));
        std::memcpy(bytes.data() + entries + e * kEntry + 12, &crc, sizeof crc);
    }
    std::memset(bytes.data() + 40, 0, 4);
    const uint32_t crc = crc32c(std::span<const uint8_t>(bytes).first(end));
    std::memcpy(bytes.data() + 40, &crc, sizeof crc);
}

}  // namespace qmoe::test
