// Reading a range of a file, whole or not at all.
#pragma once

#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <span>

#include "qmoe/status.h"

namespace qmoe {

// Fills `out` from `offset` on, however many calls that takes. Refusals report the errno as the actual value. `read` is
// a parameter so that tests can interrupt and shorten reads.
inline Status read_exactly(int fd, uint64_t offset, std::span<uint8_t> out,
                           ssize_t (*read)(int, void*, size_t, off_t) = ::pread) noexcept {
    while (!out.empty()) {
        const ssize_t got = read(fd, out.data(), out.size(), static_cast<off_t>(offset));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0)
            return Status::mismatch(Code::kIo, "the system could not read the file (errno)", offset, 0,
                                    static_cast<uint64_t>(errno));
        if (got == 0) return Status::error(Code::kIo, "the file shrank while it was read", offset);
        out = out.subspan(static_cast<size_t>(got));
        offset += static_cast<uint64_t>(got);
    }
    return {};
}

}  // namespace qmoe
