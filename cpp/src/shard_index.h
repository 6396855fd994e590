// model.safetensors.index.json: which shard holds which tensor.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "qmoe/status.h"

namespace qmoe {

// Reads {"weight_map": {tensor: shard}, ...}; every other member is skipped. The result is sorted by tensor. Shard
// names and tensor names obey check_name, so that joining one to a directory stays in that directory. May throw
// std::bad_alloc. E_CORRUPT: malformed, or no weight_map. E_NAME: path-like name, or a tensor twice. E_LIMIT: over a
// million tensors.
Status parse_shard_index(std::span<const uint8_t> json, std::vector<std::pair<std::string, std::string>>& out);

}  // namespace qmoe
