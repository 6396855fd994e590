// The error type of the noexcept core: a code, where, and the two numbers that disagree.
//
// Nothing in the library prints, exits or aborts on bad input; every function that can refuse returns a Status.
#pragma once

#include <cstdint>

namespace qmoe {

enum class Code : uint16_t {
    kOk = 0,
    kTruncated,  // the file or section ends before its declared end
    kMagic,      // not a packed record / safetensors file
    kVersion,    // version zero or newer than this library
    kUnknown,    // unknown format, dtype or flag bit
    kLimit,      // a count or size over the documented limit
    kOverflow,   // a product, sum or padding does not fit 64 bits
    kOffset,     // gap, overlap, wrong order or trailing bytes
    kShape,      // size and shape contradict each other
    kName,       // duplicate, non-UTF-8 or path-like name
    kChecksum,   // CRC32C mismatch
    kCorrupt,    // content violates the format
    kDtype,      // wrong element type
    kValue,      // value out of range, NaN or infinite
    kMissing,    // file or tensor absent
    kNoSpace,    // disk or memory full
    kIo,         // input/output error
    kNoKernel,   // no kernel for this shape, type or device
};

// "E_TRUNCATED", "E_MAGIC", ...: the stable identifier that programs may compare.
const char* code_name(Code code) noexcept;

struct Status {
    Code code = Code::kOk;
    uint64_t offset = 0;    // bytes from the start of the file or record
    const char* what = "";  // static text, never owned
    uint64_t expected = 0;  // meaningful where has_values
    uint64_t actual = 0;
    bool has_values = false;

    constexpr bool ok() const noexcept { return code == Code::kOk; }

    static constexpr Status error(Code code, const char* what, uint64_t offset = 0) noexcept {
        return Status{code, offset, what, 0, 0, false};
    }
    static constexpr Status mismatch(Code code, const char* what, uint64_t offset, uint64_t expected,
                                     uint64_t actual) noexcept {
        return Status{code, offset, what, expected, actual, true};
    }
    // The same refusal, seen from a frame that begins `base` bytes earlier.
    constexpr Status shifted(uint64_t base) const noexcept {
        Status s = *this;
        s.offset += base;
        return s;
    }
};

#define QMOE_TRY(expression)                             \
    do {                                                 \
        const ::qmoe::Status qmoe_status = (expression); \
        if (!qmoe_status.ok()) return qmoe_status;       \
    } while (false)

}  // namespace qmoe
