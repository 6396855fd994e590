// Parsing of a safetensors header that is already in memory; safetensors.cpp brings it there.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "qmoe/safetensors.h"
#include "qmoe/status.h"

namespace qmoe {

struct SafetensorsHeader {
    std::vector<TensorInfo> tensors;  // in file order; begin and end from the start of the file
    std::vector<uint32_t> by_name;    // indices of `tensors` in the order of their names
    std::vector<std::pair<std::string, std::string>> metadata;
};

inline constexpr uint64_t kHeaderAt = 8;  // behind the u64 length

// `json`: the header's bytes; `data_bytes`: how many follow it in the file. Offsets in refusals count from the start of
// the file. The name of the tensor at fault, if it is one, goes to `tensor`. May throw std::bad_alloc.
Status parse_safetensors_header(std::span<const uint8_t> json, uint64_t data_bytes, SafetensorsHeader& out,
                                std::string& tensor);

// E_NAME or E_LIMIT unless `name` can neither leave a directory nor confuse a terminal. Also for shard names in an
// index.
Status check_name(std::string_view name, uint64_t offset) noexcept;

}  // namespace qmoe
