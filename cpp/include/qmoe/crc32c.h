// CRC-32C (Castagnoli, polynomial 0x1EDC6F41 reflected, RFC 3720 section B.4): detects accidents, not attackers.
#pragma once

#include <cstdint>
#include <span>

namespace qmoe {

// Continues from `seed` (0 to begin): crc32c(b, crc32c(a)) == crc32c(a + b).
uint32_t crc32c(std::span<const uint8_t> bytes, uint32_t seed = 0) noexcept;

}  // namespace qmoe
