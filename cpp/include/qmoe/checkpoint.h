// A compressed model on disk, for C++ programs: a Hugging Face directory of safetensors shards, read strictly.
//
//   const auto checkpoint = qmoe::Checkpoint::open("OUT");
//   const auto experts = checkpoint.packed("model.layers.0.mlp.experts.gate_up_proj_qmoe");  // E matrices (2I, H)
//   qmoe::grouped_linear(experts.record(), ...);                                             // matmul.h
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "qmoe/error.h"
#include "qmoe/record.h"
#include "qmoe/safetensors.h"

namespace qmoe {

inline constexpr uint64_t kMaxIndexBytes = uint64_t{64} << 20;  // of model.safetensors.index.json

// A packed record together with its bytes. Its checksums have been compared and its structure validated.
class PackedTensor {
  public:
    PackedTensor(PackedTensor&&) noexcept = default;
    PackedTensor& operator=(PackedTensor&&) noexcept = default;

    const Record& record() const noexcept { return record_; }

  private:
    friend class Checkpoint;
    PackedTensor() = default;
    std::vector<uint8_t> bytes_;  // moving a vector leaves its bytes in place, so the record stays valid
    Record record_;
};

// An open checkpoint. Reading is safe from several threads at once. Every refusal is a qmoe::Error that names file and
// tensor.
class Checkpoint {
  public:
    // Opens model.safetensors.index.json and the shards that it names, or else model.safetensors, and checks all
    // headers. E_MISSING: no such files, or the index names a tensor that its shard lacks. E_NAME: a shard's name is a
    // path, or two shards hold one tensor. Otherwise as SafetensorsFile::open.
    static Checkpoint open(const std::string& directory);

    std::vector<std::string> names() const;         // all tensors, sorted
    std::vector<std::string> packed_names() const;  // the packed records among them: names that end in "_qmoe"

    bool contains(std::string_view name) const noexcept { return find(name) != nullptr; }
    const TensorInfo& info(std::string_view name) const;     // E_MISSING
    std::vector<uint8_t> read(std::string_view name) const;  // the raw bytes of any tensor. E_MISSING, E_IO
    PackedTensor packed(std::string_view name) const;        // E_MISSING, E_DTYPE, E_IO, or as Record::open

  private:
    struct Located {
        const TensorInfo* info;  // inside files_[file]
        uint32_t file;
    };
    void add(const std::string& path);
    void index_names();
    const Located* find(std::string_view name) const noexcept;
    const Located& locate(std::string_view name) const;

    std::string directory_;
    std::vector<SafetensorsFile> files_;
    std::vector<Located> tensors_;  // sorted by name
};

}  // namespace qmoe
