// Files opened for reading, by path or as a whole.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "qmoe/status.h"

namespace qmoe {

// Opens a regular file; the caller closes `fd` (-1 on failure). E_MISSING, E_IO.
Status open_file(const std::string& path, int& fd, uint64_t& size) noexcept;

// The whole file. E_LIMIT: larger than `limit`. May throw std::bad_alloc.
Status read_file(const std::string& path, uint64_t limit, std::vector<uint8_t>& out);

}  // namespace qmoe
