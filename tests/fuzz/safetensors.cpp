// Fuzz target: safetensors files and shard indexes. Every input is tried as a file as it is, once more with the
// header's length put right, and as an index.
#include "qmoe/safetensors.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>

#include "fuzz.h"
#include "shard_index.h"

namespace qmoe::fuzz {

uint64_t accepted = 0;

namespace {

Buffer file(const std::string& json, size_t data) {
    Buffer out(8 + json.size() + data);
    const uint64_t length = json.size();
    std::memcpy(out.data(), &length, 8);
    std::copy(json.begin(), json.end(), out.begin() + 8);
    return out;
}
Buffer text(const std::string& s) {
    return Buffer(s.begin(), s.end());
}

// A file in memory, opened by its name in /proc: the reader sees a regular file.
class MemoryFile {
  public:
    MemoryFile() : fd_(memfd_create("fuzz", MFD_CLOEXEC)), path_("/proc/self/fd/" + std::to_string(fd_)) {
        expect(fd_ >= 0, "memfd_create");
    }
    const std::string& write(const Buffer& bytes) {
        expect(ftruncate(fd_, 0) == 0, "ftruncate");
        expect(pwrite(fd_, bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()), "pwrite");
        return path_;
    }

  private:
    int fd_;
    std::string path_;
};

bool try_file(const Buffer& bytes) {
    static MemoryFile memory;
    SafetensorsFile opened;
    std::string tensor;
    const Status status = SafetensorsFile::open(memory.write(bytes), opened, &tensor);
    if (!status.ok()) {
        expect(status.what[0] != 0 && status.offset <= bytes.size(), "a refusal without reason or place");
        expect(status.code != Code::kIo && status.code != Code::kMissing, "the file itself could not be read");
        return false;
    }
    uint64_t covered = opened.tensors().empty() ? bytes.size() : opened.tensors().front().begin;
    Buffer out;
    for (const TensorInfo& info : opened.tensors()) {
        expect(info.begin == covered && info.end >= info.begin, "the tensors do not tile the data");
        covered = info.end;
        expect(opened.find(info.name) == &info, "a name is not found, or found twice");
        expect(info.rank <= kMaxRank && info.name.size() <= kMaxNameBytes, "a limit is not kept");
        expect(info.name.find('/') == std::string::npos && info.name.find("..") == std::string::npos,
               "a path got through");
        out.resize(info.bytes());
        expect(opened.read(info, 0, out).ok(), "a listed tensor does not read");
        expect(std::equal(out.begin(), out.end(), bytes.begin() + static_cast<ptrdiff_t>(info.begin)),
               "other bytes were read");
    }
    expect(covered == bytes.size(), "bytes after the last tensor got through");
    return true;
}

}  // namespace

std::vector<Buffer> seeds() {
    std::vector<Buffer> out = {
        file("{}", 0),
        file(R"({"a":{"dtype":"U8","shape":[16],"data_offsets":[0,16]}})", 16),
        file(R"({"__metadata__":{"format":"pt","k":"\u00e9\n"},)"
             R"("a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},)"
             R"("b.c":{"dtype":"F32","shape":[],"data_offsets":[12,16]},)"
             R"("e":{"dtype":"I64","shape":[0,4],"data_offsets":[12,12]}})",
             16),
        file(R"({ "x" : { "shape" : [ 1 , 2 , 1 , 2 ] , "data_offsets" : [ 4 , 12 ] , "dtype" : "F16" } , )"
             R"("\ud83d\ude00" : { "dtype" : "F4" , "shape" : [ 8 ] , "data_offsets" : [ 0 , 4 ] } }   )",
             12),
        text(R"({"metadata":{"total_size":123.5e2,"x":[1,null,{"y":true}]},)"
             R"("weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors"}})"),
        text(R"({"weight_map":{}})"),
    };
    std::string many = "{";
    for (int i = 0; i < 20; ++i)
        many += "\"model.layers." + std::to_string(i) +
                ".mlp.experts.gate_up_proj_qmoe\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[" +
                std::to_string(4 * i) + "," + std::to_string(4 * i + 4) + "]},";
    many.back() = '}';
    out.push_back(file(many, 80));
    return out;
}

}  // namespace qmoe::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace qmoe::fuzz;
    Buffer bytes(data, data + size);
    bool opened = try_file(bytes);
    if (size > 8) {
        // The header ends with the last brace, whatever length the mutant claims.
        const auto brace = std::find(bytes.rbegin(), bytes.rend() - 8, uint8_t{'}'});
        const auto length = static_cast<uint64_t>(bytes.rend() - 8 - brace);
        std::memcpy(bytes.data(), &length, 8);
        opened |= try_file(bytes);
    }
    const auto exact = std::make_unique<uint8_t[]>(size);
    std::copy(data, data + size, exact.get());
    std::vector<std::pair<std::string, std::string>> index;
    if (qmoe::parse_shard_index({exact.get(), size}, index).ok()) {
        opened = true;
        for (const auto& [tensor, shard] : index)
            expect(shard.find('/') == std::string::npos && shard != "..", "a path got through");
    }
    accepted += opened;
    return 0;
}
