// The strict reader of safetensors files (https://github.com/huggingface/safetensors#format): the only code that reads
// tensors from files it does not trust. Limits and refusals: cpp/FORMAT.md.
//
//   u64 header length | JSON header {name: {dtype, shape, data_offsets}, "__metadata__": {text: text}} | data
//
// Stricter than the format: at most four dimensions, names that are no paths, no unknown fields, a header of at most 16
// MiB. As the format demands, the tensors tile the data exactly: no gap, no overlap, no byte before, between or behind
// them.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "qmoe/record.h"
#include "qmoe/status.h"

namespace qmoe {

inline constexpr uint64_t kMaxHeaderBytes = uint64_t{16} << 20;
inline constexpr uint64_t kMaxTensors = 1'000'000;
inline constexpr uint64_t kMaxMetadata = 1u << 16;  // entries of __metadata__
inline constexpr size_t kMaxNameBytes = 512;
inline constexpr uint32_t kMaxRank = 4;

struct TensorInfo {
    std::string name;
    const char* dtype = "";  // as the file spells it: "F32", "BF16", "U8", ...
    uint32_t rank = 0;
    std::array<uint64_t, kMaxRank> dims{};  // the first `rank` count
    uint64_t begin = 0, end = 0;            // bytes from the start of the file

    std::span<const uint64_t> shape() const noexcept { return {dims.data(), rank}; }
    uint64_t bytes() const noexcept { return end - begin; }
};

// One open file. Reads with pread, never mmap: a file that another process shrinks gives E_IO instead of a bus error.
// Reading is safe from several threads at once.
class SafetensorsFile {
  public:
    SafetensorsFile() = default;
    SafetensorsFile(SafetensorsFile&& other) noexcept { *this = std::move(other); }
    SafetensorsFile& operator=(SafetensorsFile&& other) noexcept;
    ~SafetensorsFile() { close(); }

    // Opens `path`, reads and checks the whole header. Costs at most 64 MiB of memory and time linear in the header's
    // size (times a logarithm for sorting). On a refusal that concerns one tensor, its name goes to `tensor`.
    //
    // E_MISSING: no such file. E_IO: not readable, not a regular file. E_TRUNCATED: ends before its header or data.
    // E_MAGIC: not safetensors. E_LIMIT: header, rank or name too long, too many tensors. E_CORRUPT: malformed header.
    // E_UNKNOWN: dtype or field. E_NAME: duplicate, non-UTF-8, empty or path-like name. E_OVERFLOW: a product exceeds
    // 64 bits. E_SHAPE: size against shape and dtype. E_OFFSET: gap, overlap, reversed range or trailing bytes.
    static Status open(const std::string& path, SafetensorsFile& out, std::string* tensor = nullptr) noexcept;
    void close() noexcept;

    std::span<const TensorInfo> tensors() const noexcept { return tensors_; }  // in file order
    const TensorInfo* find(std::string_view name) const noexcept;              // null: absent
    std::span<const std::pair<std::string, std::string>> metadata() const noexcept { return metadata_; }
    const std::string& path() const noexcept { return path_; }

    // Bytes [offset, offset + out.size()) of a tensor of this file.
    // E_VALUE: outside the tensor. E_IO: reading failed, or the file shrank since it was opened.
    Status read(const TensorInfo& tensor, uint64_t offset, std::span<uint8_t> out) const noexcept;

  private:
    int fd_ = -1;
    std::string path_;
    std::vector<TensorInfo> tensors_;
    std::vector<uint32_t> by_name_;  // indices of tensors_ in the order of their names
    std::vector<std::pair<std::string, std::string>> metadata_;
};

// Reads a packed record (uint8, one dimension) into `bytes` and opens it with its checksums. Offsets in refusals count
// from the start of the file. E_DTYPE, E_SHAPE: the tensor cannot be a record; otherwise as SafetensorsFile::read and
// Record::open.
Status load_record(const SafetensorsFile& file, const TensorInfo& tensor, std::vector<uint8_t>& bytes,
                   Record& record) noexcept;

}  // namespace qmoe
