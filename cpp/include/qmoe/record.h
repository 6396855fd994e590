// Packed record: one stack of E matrices (N, K) as one run of bytes. See cpp/FORMAT.md.
//
//   header 64 B | specs 80 B each | entries 16 B each | matrix data, each 16-byte aligned
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "qmoe/format.h"

namespace qmoe {

inline constexpr uint16_t kRecordVersion = 1;
inline constexpr size_t kRecordAlign = 16;
inline constexpr uint64_t kMaxExperts = 1u << 16;

struct RecordEntry {
    uint64_t offset = 0;  // bytes from the start of the record
    uint64_t bytes = 0;   // padding included
    uint32_t spec = 0;
    uint32_t crc32c = 0;
};

// A parsed record. Borrows the bytes: they must outlive it and must not change.
class Record {
  public:
    // Parses the header and tables and validates every matrix structurally. After success all reads by decoders and
    // kernels are in bounds. With check_crc (the default, for bytes not seen before), also compares every matrix's
    // CRC32C and refuses scales that are not finite; without it the cost is microseconds.
    static Status open(std::span<const uint8_t> bytes, Record& out, bool check_crc = true);

    // CRCs, full decode of everything, padding: refuses whatever an encoder would not have written.
    Status verify() const noexcept;

    uint64_t experts() const noexcept { return entries_.size(); }
    uint64_t rows() const noexcept { return rows_; }
    uint64_t cols() const noexcept { return cols_; }
    std::span<const uint8_t> bytes() const noexcept { return bytes_; }
    std::span<const RecordEntry> entries() const noexcept { return entries_; }
    size_t spec_count() const noexcept { return spec_count_; }
    std::span<const uint8_t, kSpecBytes> spec(size_t index) const noexcept;
    const Format& format_of_spec(size_t index) const noexcept;
    const Format& format_of(uint64_t expert) const noexcept { return format_of_spec(entries_[expert].spec); }
    MatrixView matrix(uint64_t expert) const noexcept;

    // Rows [first, first + count) of one expert to float32 (count, K) by the readable scalar decoder.
    Status decode_rows(uint64_t expert, uint64_t first, uint64_t count, float* out) const noexcept;

    // A new record with experts [first, first + count): copies bytes, decodes nothing (expert parallelism).
    Status slice_experts(uint64_t first, uint64_t count, std::vector<uint8_t>& out) const;

  private:
    std::span<const uint8_t> bytes_;
    std::vector<RecordEntry> entries_;
    size_t spec_count_ = 0;
    uint64_t rows_ = 0, cols_ = 0;
};

// Encodes a stack of matrices of equal shape, on up to `threads` threads: the bytes are the same for any number of them.
// Matrices of one format with equal parameters share one spec.
Status build_record(std::span<const MatrixInput> inputs, std::vector<uint8_t>& out, int threads = 1);

// What stands before the matrices of several records, all (N, K), where these are to lie one behind the other as one
// record: its header and tables, up to the first matrix. Equal specs become one. So where specs are parameters only
// (`int`), it is the record that was built of all matrices at once.
Status join_records(std::span<const Record> records, std::vector<uint8_t>& head);

}  // namespace qmoe
