// The part of JSON that safetensors headers and shard indexes use, read strictly and without recursion.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "qmoe/status.h"

namespace qmoe {

// Reads one text from left to right. Offsets in refusals count from the start of the file, `base` bytes before the
// text. Malformed text is E_CORRUPT; a string that is no UTF-8 or holds raw control characters is E_NAME; a number over
// 64 bits is E_OVERFLOW; nesting over 32 levels is E_LIMIT.
class JsonScanner {
  public:
    explicit JsonScanner(std::span<const uint8_t> text, uint64_t base = 0) noexcept : text_(text), base_(base) {}

    uint64_t offset() const noexcept { return base_ + at_; }

    // Skips white space, then takes `c` if it comes next.
    bool accept(char c) noexcept;
    Status expect(char c) noexcept;
    // A string, unescaped. May throw std::bad_alloc.
    Status string(std::string& out);
    // A whole number >= 0 without sign, leading zero, fraction or exponent.
    Status number(uint64_t& out) noexcept;
    // Any value. May throw std::bad_alloc.
    Status skip_value();
    // Nothing but white space is left.
    Status end() noexcept;

  private:
    Status refuse(const char* what) const noexcept { return Status::error(Code::kCorrupt, what, offset()); }
    void skip_space() noexcept;
    Status escape(std::string& out);
    Status hex4(uint32_t& out) noexcept;
    Status plain_character(std::string& out);
    Status skip_scalar();

    std::span<const uint8_t> text_;
    uint64_t base_ = 0;
    size_t at_ = 0;
};

}  // namespace qmoe
