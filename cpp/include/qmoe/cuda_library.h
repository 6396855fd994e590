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

// Ternary matrices that a device encodes, as the host knows them.
struct TernaryMatrices {
    uint64_t matrices, rows, cols;  // E, N, K
    std::span<const float> levels;  // (E, N, 1) [high] or (E, N, 2) [low, high]
};

// The spec that build_record() gives such matrices. counts (29): what Api::ternary_census counted over all of them.
// E_SHAPE: nothing, or another number of levels or counts; E_LIMIT: too many; E_VALUE: a trit that is none, or a level that
// is not a finite bfloat16.
Status ternary_spec(const TernaryMatrices& in, std::span<const uint64_t> counts, SpecBytes& spec);

// Of a matrix (N, K): its blocks, and one more. The spec must be one.
uint64_t ternary_offsets(const SpecBytes& spec, uint64_t rows, uint64_t cols) noexcept;

// Where the words of some of them are to be, numbered from where the first one's bytes begin in the record, and how many
// bytes they take there. offsets (matrices, blocks + 1) and misfits (matrices): from Api::ternary_code. E_VALUE: matrices
// that the spec is not of; E_LIMIT: more than 8 GiB of words.
Status ternary_places(const SpecBytes& spec, const TernaryMatrices& in, std::span<const uint32_t> offsets,
                      std::span<const uint32_t> misfits, std::vector<uint64_t>& first_words, uint64_t& bytes);

// Bytes of their record that are in front of the first matrix.
uint64_t ternary_head_bytes(uint64_t matrices) noexcept;

// Makes the record, that of build_record() bit for bit, of bytes in which the words are where they belong, with zeros
// around them behind the head. E_SHAPE: another number of bytes.
Status ternary_finish(const SpecBytes& spec, const TernaryMatrices& in, std::span<const uint32_t> offsets,
                      std::span<uint8_t> record, int threads = 1);

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
