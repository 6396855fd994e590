#include "open_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "read_exactly.h"

namespace qmoe {
namespace {

Status failed(const char* what) noexcept {
    return Status::mismatch(Code::kIo, what, 0, 0, static_cast<uint64_t>(errno));
}

Status check_regular(int fd, uint64_t& size) noexcept {
    struct stat info;
    if (::fstat(fd, &info) != 0) return failed("the system could not inspect the file (errno)");
    if (!S_ISREG(info.st_mode)) return Status::error(Code::kIo, "not a regular file");
    size = static_cast<uint64_t>(info.st_size);
    return {};
}

}  // namespace

Status open_file(const std::string& path, int& fd, uint64_t& size) noexcept {
    // Without O_NONBLOCK a named pipe in place of the file would block for ever.
    do fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    while (fd < 0 && errno == EINTR);
    if (fd < 0)
        return errno == ENOENT || errno == ENOTDIR ? Status::error(Code::kMissing, "no such file")
                                                   : failed("the system could not open the file (errno)");
    const Status status = check_regular(fd, size);
    if (!status.ok()) {
        ::close(fd);
        fd = -1;
    }
    return status;
}

Status read_file(const std::string& path, uint64_t limit, std::vector<uint8_t>& out) {
    struct Closer {
        int fd = -1;
        ~Closer() {
            if (fd >= 0) ::close(fd);
        }
    } file;
    uint64_t size = 0;
    QMOE_TRY(open_file(path, file.fd, size));
    if (size > limit) return Status::mismatch(Code::kLimit, "the file is too long", 0, limit, size);
    out.resize(size);
    return read_exactly(file.fd, 0, out);
}

}  // namespace qmoe
