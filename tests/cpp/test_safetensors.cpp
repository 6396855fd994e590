// The safetensors reader on files that are in order, and on a system that interrupts it.
#include <unistd.h>

#include <cerrno>
#include <numeric>

#include "qmoe/safetensors.h"
#include "read_exactly.h"
#include "testing.h"

using namespace qmoe;
using test::Buffer, test::TemporaryDirectory;

namespace {

Buffer counting(size_t n) {
    Buffer out(n);
    std::iota(out.begin(), out.end(), uint8_t{0});
    return out;
}

int calls = 0;
ssize_t one_byte_at_a_time(int fd, void* out, size_t n, off_t offset) {
    ++calls;
    return ::pread(fd, out, n == 0 ? 0 : 1, offset);
}
ssize_t interrupted_every_other_time(int fd, void* out, size_t n, off_t offset) {
    if (++calls % 2 == 1) {
        errno = EINTR;
        return -1;
    }
    return ::pread(fd, out, n < 7 ? n : 7, offset);
}
ssize_t broken_disk(int, void*, size_t, off_t) {
    errno = EIO;
    return -1;
}

}  // namespace

TEST_SUITE("safetensors") {
    TEST_CASE("names, dtypes, shapes and bytes; the order of the JSON does not matter, that of the data does") {
        const TemporaryDirectory directory;
        const std::string path =
            directory.write("a.safetensors",
                            test::safetensors(R"( {"second" : {"shape":[3], "data_offsets":[6,9], "dtype":"U8"},
                "__metadata__":{"format":"pt","\u00e9":""},
                "first":{"dtype":"BF16","shape":[1,3,1,1],"data_offsets":[0,6]},
                "empty":{"dtype":"F32","shape":[0,7],"data_offsets":[6,6]},
                "scalar":{"dtype":"I8","shape":[],"data_offsets":[9,10]},
                "four":{"dtype":"F4","shape":[2,3],"data_offsets":[10,13]}}   )" +
                                                  1,  // the header must begin with its brace
                                              counting(13)));
        SafetensorsFile file;
        REQUIRE(SafetensorsFile::open(path, file).code == Code::kOk);
        REQUIRE(file.tensors().size() == 5);
        const char* const order[] = {"first", "empty", "second", "scalar", "four"};
        for (size_t i = 0; i < 5; ++i) CHECK(file.tensors()[i].name == order[i]);
        const TensorInfo* const first = file.find("first");
        REQUIRE(first != nullptr);
        CHECK(std::string(first->dtype) == "BF16");
        CHECK(std::vector<uint64_t>(first->shape().begin(), first->shape().end()) == std::vector<uint64_t>{1, 3, 1, 1});
        CHECK(file.find("third") == nullptr);
        CHECK(file.find("") == nullptr);
        REQUIRE(file.metadata().size() == 2);
        CHECK(file.metadata()[0] == std::pair<std::string, std::string>("format", "pt"));
        CHECK(file.metadata()[1].first == "\xC3\xA9");
        Buffer out(3);
        REQUIRE(file.read(*file.find("second"), 0, out).code == Code::kOk);
        CHECK(out == Buffer{6, 7, 8});
        REQUIRE(file.read(*first, 4, std::span(out).first(2)).code == Code::kOk);
        CHECK(out == Buffer{4, 5, 8});
        CHECK(file.read(*file.find("empty"), 0, {}).code == Code::kOk);
        CHECK(file.read(*first, 4, out).code == Code::kValue);
        CHECK(file.read(*first, ~0ull, out).code == Code::kValue);
        file.close();
        CHECK(file.read(*first, 0, out).code == Code::kIo);
    }

    TEST_CASE("a file without tensors, and a header padded with spaces") {
        const TemporaryDirectory directory;
        SafetensorsFile file;
        CHECK(SafetensorsFile::open(directory.write("a", test::safetensors("{}", {})), file).code == Code::kOk);
        CHECK(file.tensors().empty());
        CHECK(SafetensorsFile::open(directory.write("b", test::safetensors("{}      ", {})), file).code == Code::kOk);
    }

    TEST_CASE("moving keeps the file open, assigning closes the old one") {
        const TemporaryDirectory directory;
        const std::string path = directory.write(
            "a", test::safetensors(R"({"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", counting(4)));
        SafetensorsFile a, b;
        REQUIRE(SafetensorsFile::open(path, a).ok());
        REQUIRE(SafetensorsFile::open(path, b).ok());
        SafetensorsFile c(std::move(a));
        b = std::move(c);
        Buffer out(4);
        REQUIRE(b.read(*b.find("x"), 0, out).ok());
        CHECK(out == counting(4));
    }

    TEST_CASE("E_IO: a file that shrinks after it was opened, without a bus error") {
        const TemporaryDirectory directory;
        const std::string path = directory.write(
            "a", test::safetensors(R"({"x":{"dtype":"U8","shape":[9000],"data_offsets":[0,9000]}})", counting(9000)));
        SafetensorsFile file;
        REQUIRE(SafetensorsFile::open(path, file).ok());
        REQUIRE(truncate(path.c_str(), 5000) == 0);
        Buffer out(9000);
        const Status status = file.read(*file.find("x"), 0, out);
        CHECK(status.code == Code::kIo);
        CHECK(status.offset == 5000);
    }

    TEST_CASE("short and interrupted reads are continued; a failing disk is E_IO with its errno") {
        const TemporaryDirectory directory;
        const std::string path = directory.write("a", counting(200));
        FILE* const file = fopen(path.c_str(), "rb");
        REQUIRE(file != nullptr);
        for (const auto read : {&one_byte_at_a_time, &interrupted_every_other_time}) {
            Buffer out(150);
            calls = 0;
            REQUIRE(read_exactly(fileno(file), 30, out, read).code == Code::kOk);
            CHECK(calls >= 40);
            for (size_t i = 0; i < out.size(); ++i) CHECK(out[i] == 30 + i);
        }
        Buffer out(150);
        const Status status = read_exactly(fileno(file), 0, out, &broken_disk);
        CHECK(status.code == Code::kIo);
        CHECK(status.actual == EIO);
        CHECK(read_exactly(fileno(file), 100, out).code == Code::kIo);  // beyond the end
        fclose(file);
    }

    TEST_CASE(
        "load_record: opens packed records; E_DTYPE, E_SHAPE and refusals of the record count from the start of the "
        "file") {
        const TemporaryDirectory directory;
        Buffer record = test::small_int_record();
        const auto header = [&](const char* dtype, const std::string& shape) {
            return std::string("{\"r\":{\"dtype\":\"") + dtype + "\",\"shape\":[" + shape + "],\"data_offsets\":[0," +
                   std::to_string(record.size()) + "]}}";
        };
        const std::string n = std::to_string(record.size());
        SafetensorsFile file;
        Buffer bytes;
        Record out;
        REQUIRE(SafetensorsFile::open(directory.write("good", test::safetensors(header("U8", n), record)), file).ok());
        REQUIRE(load_record(file, file.tensors()[0], bytes, out).code == Code::kOk);
        CHECK(out.experts() == 2);
        REQUIRE(
            SafetensorsFile::open(directory.write("signed", test::safetensors(header("I8", n), record)), file).ok());
        CHECK(load_record(file, file.tensors()[0], bytes, out).code == Code::kDtype);
        REQUIRE(SafetensorsFile::open(directory.write("flat", test::safetensors(header("U8", "1," + n), record)), file)
                    .ok());
        CHECK(load_record(file, file.tensors()[0], bytes, out).code == Code::kShape);
        record[6] = 1;
        REQUIRE(SafetensorsFile::open(directory.write("bad", test::safetensors(header("U8", n), record)), file).ok());
        const Status status = load_record(file, file.tensors()[0], bytes, out);
        CHECK(status.code == Code::kUnknown);
        CHECK(status.offset == file.tensors()[0].begin + 6);
    }
}
