// One named test per refusal of safetensors files, each with the exact code.
#include <sys/stat.h>
#include <unistd.h>

#include "qmoe/safetensors.h"
#include "testing.h"

using namespace qmoe;
using test::Buffer, test::TemporaryDirectory;

namespace {

Code file_code(const Buffer& bytes, std::string* tensor = nullptr) {
    const TemporaryDirectory directory;
    SafetensorsFile file;
    return SafetensorsFile::open(directory.write("model.safetensors", bytes), file, tensor).code;
}
Code code(const std::string& json, size_t data = 0) {
    return file_code(test::safetensors(json, Buffer(data)));
}

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
    return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":[" + shape + "],\"data_offsets\":[" + offsets +
           "]}";
}
std::string one(const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return "{" + entry("w", dtype, shape, offsets) + "}";
}
std::string named(const std::string& name) {
    return "{" + entry(name, "U8", "4", "0,4") + "}";
}

}  // namespace

TEST_SUITE("safetensors refusals") {
    TEST_CASE("the file that all others are changed from is accepted") {
        CHECK(code(one("U8", "4", "0,4"), 4) == Code::kOk);
    }

    TEST_CASE("E_MISSING: no such file, or a file where a directory should be") {
        const TemporaryDirectory directory;
        SafetensorsFile file;
        CHECK(SafetensorsFile::open(directory.path() + "/absent", file).code == Code::kMissing);
        const std::string path = directory.write("plain", {});
        CHECK(SafetensorsFile::open(path + "/x", file).code == Code::kMissing);
    }
    TEST_CASE("E_IO: a directory, a named pipe") {
        const TemporaryDirectory directory;
        SafetensorsFile file;
        CHECK(SafetensorsFile::open(directory.path(), file).code == Code::kIo);
        const std::string pipe = directory.path() + "/pipe";
        REQUIRE(mkfifo(pipe.c_str(), 0600) == 0);
        CHECK(SafetensorsFile::open(pipe, file).code == Code::kIo);
    }
    TEST_CASE("E_TRUNCATED: zero to seven bytes") {
        for (size_t n = 0; n < 8; ++n) CHECK(file_code(Buffer(n, 1)) == Code::kTruncated);
    }
    TEST_CASE("E_TRUNCATED: every shorter length of a sound file") {
        const Buffer whole = test::safetensors(one("U8", "4", "0,4"), Buffer(4));
        for (size_t n = 0; n < whole.size(); ++n)
            REQUIRE(file_code(Buffer(whole.begin(), whole.begin() + static_cast<ptrdiff_t>(n))) == Code::kTruncated);
    }
    TEST_CASE("E_MAGIC: zip and pickle files, text, an empty header, a header that begins with anything but a brace") {
        Buffer zip(64, 0), pickle(64, 'c');
        test::put<uint32_t>(zip, 0, 0x04034B50);
        test::put<uint16_t>(pickle, 0, 0x0280);
        CHECK(file_code(zip) == Code::kMagic);
        CHECK(file_code(pickle) == Code::kMagic);
        CHECK(file_code(Buffer(100, 'x')) == Code::kMagic);
        CHECK(file_code(Buffer(8, 0)) == Code::kMagic);
        CHECK(code("[]") == Code::kMagic);
        CHECK(code(" {}") == Code::kMagic);
    }
    TEST_CASE("E_LIMIT: a header over 16 MiB, refused before it is read") {
        Buffer bytes = test::safetensors("{}", {});
        test::put<uint64_t>(bytes, 0, kMaxHeaderBytes + 1);
        CHECK(file_code(bytes) == Code::kLimit);
        test::put<uint64_t>(bytes, 0, ~0ull);
        CHECK(file_code(bytes) == Code::kLimit);
        test::put<uint64_t>(bytes, 0, kMaxHeaderBytes);
        CHECK(file_code(bytes) == Code::kTruncated);
        CHECK(code("{}" + std::string(kMaxHeaderBytes - 2, ' ')) == Code::kOk);
    }
    TEST_CASE("E_LIMIT: five dimensions") {
        CHECK(code(one("U8", "1,1,2,2", "0,4"), 4) == Code::kOk);
        CHECK(code(one("U8", "1,1,1,2,2", "0,4"), 4) == Code::kLimit);
    }
    TEST_CASE("E_LIMIT: a name of 513 bytes") {
        CHECK(code(named(std::string(512, 'n')), 4) == Code::kOk);
        CHECK(code(named(std::string(513, 'n')), 4) == Code::kLimit);
    }
    TEST_CASE("E_LIMIT: 65537 metadata entries") {
        const auto metadata = [](uint64_t n) {
            std::string json = "{\"__metadata__\":{";
            for (uint64_t i = 0; i < n; ++i) json += (i == 0 ? "\"" : ",\"") + std::to_string(i) + "\":\"\"";
            return json + "}}";
        };
        CHECK(code(metadata(kMaxMetadata)) == Code::kOk);
        CHECK(code(metadata(kMaxMetadata + 1)) == Code::kLimit);
    }
    TEST_CASE("E_NAME: path-like, empty and control-character names") {
        for (const char* bad :
             {"", "/etc/passwd", "a/b", "..", "../x", "a..b", "a\\\\b", "a\\u0000b", "a\\nb", "\\u007f", "\\u001b[31m"})
            CHECK(code(named(bad), 4) == Code::kName);
        CHECK(code(named("model.layers.0.mlp-\\u00e9:x y"), 4) == Code::kOk);
    }
    TEST_CASE("E_NAME: names that are no UTF-8") {
        for (const char* bad : {"\xFF", "\xC0\xAF", "\xED\xA0\x80", "\\ud800", "a\nb"})
            CHECK(code(named(bad), 4) == Code::kName);
    }
    TEST_CASE("E_NAME: a tensor, a field, a metadata key or __metadata__ twice") {
        std::string tensor;
        CHECK(file_code(test::safetensors("{" + entry("a", "U8", "4", "0,4") + "," + entry("a", "U8", "4", "4,8") + "}",
                                          Buffer(8)),
                        &tensor) == Code::kName);
        CHECK(tensor == "a");
        CHECK(code("{" + entry("a", "U8", "4", "0,4") + "," + entry("\\u0061", "U8", "4", "4,8") + "}", 8) ==
              Code::kName);
        CHECK(code(R"({"w":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}})", 4) == Code::kName);
        CHECK(code(R"({"__metadata__":{"a":"","a":""}})") == Code::kName);
        CHECK(code(R"({"__metadata__":{},"__metadata__":{}})") == Code::kName);
    }
    TEST_CASE("E_NAME: many names, one of them twice, in time that is not quadratic") {
        std::string json = "{";
        for (int i = 0; i < 200000; ++i) json += entry("t" + std::to_string(i % 199999), "U8", "0", "0,0") + ",";
        json.back() = '}';
        REQUIRE(json.size() < kMaxHeaderBytes);
        CHECK(code(json) == Code::kName);
    }
    TEST_CASE("E_UNKNOWN: dtype, field") {
        for (const char* dtype : {"", "U7", "u8", "F128", "float32"})
            CHECK(code(one(dtype, "4", "0,4"), 4) == Code::kUnknown);
        CHECK(code(R"({"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4],"compression":"zip"}})", 4) ==
              Code::kUnknown);
    }
    TEST_CASE("E_OVERFLOW: a number, a product and a size in bits over 64 bits") {
        CHECK(code(one("U8", "18446744073709551616", "0,4"), 4) == Code::kOverflow);
        CHECK(code(one("U8", "4294967296,4294967296", "0,4"), 4) == Code::kOverflow);
        CHECK(code(one("U8", "4294967296,4294967296,0", "0,0")) == Code::kOverflow);
        CHECK(code(one("F64", "4611686018427387904", "0,4"), 4) == Code::kOverflow);
        CHECK(code(one("U8", "4", "0,18446744073709551620"), 4) == Code::kOverflow);
    }
    TEST_CASE("E_SHAPE: size against shape and dtype, sizes that are no whole bytes") {
        CHECK(code(one("U8", "5", "0,4"), 4) == Code::kShape);
        CHECK(code(one("U16", "4", "0,4"), 4) == Code::kShape);
        CHECK(code(one("U8", "0", "0,4"), 4) == Code::kShape);
        CHECK(code(one("U8", "", "0,4"), 4) == Code::kShape);
        CHECK(code(one("F4", "7", "0,4"), 4) == Code::kShape);
        CHECK(code(one("F6_E2M3", "5", "0,4"), 4) == Code::kShape);
        CHECK(code(one("U8", "4", "0,0")) == Code::kShape);
    }
    TEST_CASE("E_OFFSET: a gap, an overlap, a reversed range, trailing bytes, bytes before the first tensor") {
        const auto two = [](const char* a, const char* b) {
            return "{" + entry("a", "U8", "4", a) + "," + entry("b", "U8", "4", b) + "}";
        };
        CHECK(code(two("0,4", "4,8"), 8) == Code::kOk);
        CHECK(code(two("4,8", "0,4"), 8) == Code::kOk);
        CHECK(code(two("0,4", "5,9"), 9) == Code::kOffset);
        CHECK(code(two("0,4", "3,7"), 7) == Code::kOffset);
        CHECK(code(two("0,4", "0,4"), 4) == Code::kOffset);
        CHECK(code(one("U8", "4", "4,0"), 4) == Code::kOffset);
        CHECK(code(one("U8", "4", "0,4"), 5) == Code::kOffset);
        CHECK(code(one("U8", "4", "1,5"), 5) == Code::kOffset);
        CHECK(code("{}", 1) == Code::kOffset);
        CHECK(code("{" + entry("a", "U8", "4", "0,4") + "," + entry("b", "U8", "0", "2,2") + "}", 4) == Code::kOffset);
    }
    TEST_CASE("E_TRUNCATED: offsets behind the end of the file, however far, with the tensor's name") {
        std::string tensor;
        CHECK(file_code(test::safetensors(one("U8", "18446744073709551615", "0,18446744073709551615"), Buffer(4)),
                        &tensor) == Code::kOverflow);
        CHECK(file_code(test::safetensors(one("U8", "1099511627776", "0,1099511627776"), Buffer(4)), &tensor) ==
              Code::kTruncated);
        CHECK(tensor == "w");
    }
    TEST_CASE("E_CORRUPT: malformed JSON, absent fields, wrong types, nesting, text behind the end") {
        for (const char* bad : {"{",
                                "{,}",
                                "{\"w\"}",
                                "{\"w\":1}",
                                "{\"w\":[]}",
                                "{\"w\":{}}",
                                "{\"w\":null}",
                                "{} x",
                                "{}{}",
                                "{\"__metadata__\":null}",
                                "{\"__metadata__\":{\"a\":1}}",
                                "{\"__metadata__\":{\"a\":{}}}",
                                R"({"w":{"dtype":"U8","shape":[4]}})",
                                R"({"w":{"dtype":1,"shape":[4],"data_offsets":[0,4]}})",
                                R"({"w":{"dtype":"U8","shape":4,"data_offsets":[0,4]}})",
                                R"({"w":{"dtype":"U8","shape":[-4],"data_offsets":[0,4]}})",
                                R"({"w":{"dtype":"U8","shape":[4.0],"data_offsets":[0,4]}})",
                                R"({"w":{"dtype":"U8","shape":[4e0],"data_offsets":[0,4]}})",
                                R"({"w":{"dtype":"U8","shape":[[4]],"data_offsets":[0,4]}})",
                                R"({"w":{"dtype":"U8","shape":[4],"data_offsets":[0]}})",
                                R"({"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4,8]}})",
                                R"({"w":{"dtype":"U8","shape":[4,],"data_offsets":[0,4]}})",
                                R"({"w":{"dtype":"U8","shape":[04],"data_offsets":[0,4]}})",
                                R"({"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},})"}) {
            CAPTURE(bad);
            CHECK(code(bad, 4) == Code::kCorrupt);
        }
        Buffer padded = test::safetensors(std::string("{}\0\0", 4), {});
        CHECK(file_code(padded) == Code::kCorrupt);
        CHECK(code("{\"w\":" + std::string(100000, '{')) == Code::kCorrupt);
    }
    TEST_CASE("every flip of one bit of the header is refused or changes only names, order and metadata") {
        const std::string json = "{" + entry("ab", "BF16", "2,3", "0,12") + "," + entry("cd", "U8", "5", "12,17") + "}";
        const Buffer original = test::safetensors(json, Buffer(17));
        const TemporaryDirectory directory;
        size_t accepted = 0;
        for (size_t bit = 0; bit < (8 + json.size()) * 8; ++bit) {
            Buffer bytes = original;
            bytes[bit / 8] = static_cast<uint8_t>(bytes[bit / 8] ^ (1u << (bit % 8)));
            SafetensorsFile file;
            if (!SafetensorsFile::open(directory.write("x", bytes), file).ok()) continue;
            ++accepted;
            REQUIRE(file.tensors().size() == 2);
            REQUIRE(file.tensors()[0].bytes() == 12);
            REQUIRE(file.tensors()[1].bytes() == 5);
        }
        MESSAGE(accepted, " flips gave another sound header");
        CHECK(accepted < 40);
    }
}
