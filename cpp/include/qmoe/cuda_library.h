// Opens libqmoe_cuda at run time. Needs no CUDA to build or to run.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "qmoe/format.h"
#include "qmoe/record.h"

namespace qmoe::cuda {

struct Api;

// The library's functions (qmoe/cuda.h), or null with the reason in words. Looked for once: at $QMOE_CUDA_LIBRARY if
// set, else beside the file that holds this code, else by the loader.
const Api* library(std::string& reason);

// The 4096-entry decoding table that the ternary kernels want in device memory (see FORMAT.md). E_UNKNOWN: not a
// ternary spec.
Status ternary_decoding_table(std::span<const uint8_t, kSpecBytes> spec, std::span<uint32_t> out) noexcept;

// The encoder's tables for the device, bytes of a size that the spec does not change (src/formats/ternary.h). E_UNKNOWN:
// not a ternary spec.
Status ternary_encoding_tables(std::span<const uint8_t, kSpecBytes> spec, std::vector<uint8_t>& out);

// How the ternary matrices of a stack are laid out on a device (src/formats/ternary_streams.h).
struct StreamsShape {
    uint64_t rows, cols;  // N, K
    uint32_t gap_bits;    // of a symbol, 3 to 7
    uint32_t segments;    // lanes that share a row: 1, 2, 4, 8, 16 or 32
};

// A shape that suits a record's matrices, from what its first one is like. E_NO_KERNEL where one is not ternary or has
// more columns or rows than the layout can count.
Status ternary_streams_shape(const Record& record, StreamsShape& out);

// The layout of a whole record: u64 offsets of its matrices from the start, up to a multiple of 16 bytes, and behind them
// the matrices, each at a multiple of 16. The bytes are the same for any number of threads.
Status ternary_streams(const Record& record, const StreamsShape& shape, std::vector<uint8_t>& out, int threads = 1);

}  // namespace qmoe::cuda
