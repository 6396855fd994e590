#include "qmoe/safetensors.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "bytes.h"
#include "open_file.h"
#include "read_exactly.h"
#include "safetensors_header.h"

namespace qmoe {
namespace {

Status read_header(int fd, uint64_t size, SafetensorsHeader& header, std::string& tensor) {
    uint8_t head[kHeaderAt + 1] = {};
    const uint64_t available = std::min<uint64_t>(size, sizeof head);
    QMOE_TRY(read_exactly(fd, 0, {head, static_cast<size_t>(available)}));
    if (size < kHeaderAt)
        return Status::mismatch(Code::kTruncated, "safetensors: shorter than its header's length", 0, kHeaderAt, size);
    const uint64_t length = load<uint64_t>(head);
    if (length == 0 || (size > kHeaderAt && head[kHeaderAt] != '{'))
        return Status::error(Code::kMagic, "safetensors: the header is not a JSON object", kHeaderAt);
    if (length > kMaxHeaderBytes)
        return Status::mismatch(Code::kLimit, "safetensors: the header is too long", 0, kMaxHeaderBytes, length);
    if (length > size - kHeaderAt)
        return Status::mismatch(Code::kTruncated, "safetensors: ends inside its header", 0, length, size - kHeaderAt);
    std::vector<uint8_t> json(length);
    QMOE_TRY(read_exactly(fd, kHeaderAt, json));
    return parse_safetensors_header(json, size - kHeaderAt - length, header, tensor);
}

}  // namespace

SafetensorsFile& SafetensorsFile::operator=(SafetensorsFile&& other) noexcept {
    if (this == &other) return *this;
    close();
    fd_ = std::exchange(other.fd_, -1);
    path_ = std::move(other.path_);
    tensors_ = std::move(other.tensors_);
    by_name_ = std::move(other.by_name_);
    metadata_ = std::move(other.metadata_);
    return *this;
}

void SafetensorsFile::close() noexcept {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
}

Status SafetensorsFile::open(const std::string& path, SafetensorsFile& out, std::string* tensor) noexcept {
    try {
        SafetensorsFile file;
        uint64_t size = 0;
        QMOE_TRY(open_file(path, file.fd_, size));
        SafetensorsHeader header;
        std::string at_fault;
        const Status status = read_header(file.fd_, size, header, at_fault);
        if (!status.ok()) {
            if (tensor != nullptr) *tensor = std::move(at_fault);
            return status;
        }
        file.path_ = path;
        file.tensors_ = std::move(header.tensors);
        file.by_name_ = std::move(header.by_name);
        file.metadata_ = std::move(header.metadata);
        out = std::move(file);
        return {};
    } catch (const std::bad_alloc&) {
        return Status::error(Code::kNoSpace, "safetensors: out of memory");
    }
}

const TensorInfo* SafetensorsFile::find(std::string_view name) const noexcept {
    const auto found =
        std::lower_bound(by_name_.begin(), by_name_.end(), name,
                         [this](uint32_t i, std::string_view wanted) { return tensors_[i].name < wanted; });
    return found != by_name_.end() && tensors_[*found].name == name ? &tensors_[*found] : nullptr;
}

Status SafetensorsFile::read(const TensorInfo& tensor, uint64_t offset, std::span<uint8_t> out) const noexcept {
    if (fd_ < 0) return Status::error(Code::kIo, "safetensors: the file is closed");
    if (offset > tensor.bytes() || out.size() > tensor.bytes() - offset)
        return Status::mismatch(Code::kValue, "safetensors: range outside the tensor", tensor.begin, tensor.bytes(),
                                offset + out.size());
    return read_exactly(fd_, tensor.begin + offset, out);
}

Status load_record(const SafetensorsFile& file, const TensorInfo& tensor, std::vector<uint8_t>& bytes,
                   Record& record) noexcept {
    if (std::strcmp(tensor.dtype, "U8") != 0)
        return Status::error(Code::kDtype, "packed records are stored as U8", tensor.begin);
    if (tensor.rank != 1)
        return Status::mismatch(Code::kShape, "packed records have one dimension", tensor.begin, 1, tensor.rank);
    try {
        bytes.resize(tensor.bytes());
        QMOE_TRY(file.read(tensor, 0, bytes));
        const Status status = Record::open(bytes, record);
        return status.ok() ? status : status.shifted(tensor.begin);
    } catch (const std::bad_alloc&) {
        return Status::error(Code::kNoSpace, "safetensors: out of memory", tensor.begin);
    }
}

}  // namespace qmoe
