// The head of a record, for whoever puts one together.
#pragma once

#include <cstdint>
#include <span>

#include "qmoe/record.h"

namespace qmoe {

// Up to the first matrix: header, tables and what aligns them.
uint64_t record_head_bytes(uint64_t specs, uint64_t experts) noexcept;

// Lays out the head in front of the already padded matrices, which end at `total`. What aligns it must be zero.
void write_record_head(uint8_t* out, uint64_t rows, uint64_t cols, std::span<const SpecBytes> specs,
                       std::span<const RecordEntry> entries, uint64_t total);

}  // namespace qmoe
