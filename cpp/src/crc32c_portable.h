// The table-driven CRC-32C of machines without the instruction, by name so that tests can compare both.
#pragma once

#include <cstdint>
#include <span>

namespace qmoe {

uint32_t crc32c_portable(std::span<const uint8_t> bytes, uint32_t seed = 0) noexcept;

}  // namespace qmoe
