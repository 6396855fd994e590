// Checkpoints as C++ programs open them, and the one exception type.
#include "qmoe/checkpoint.h"
#include "testing.h"

using namespace qmoe;
using test::Buffer, test::TemporaryDirectory;

namespace {

Buffer shard(const std::string& name, const std::string& dtype, const Buffer& data) {
    const std::string n = std::to_string(data.size());
    return test::safetensors(
        "{\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":[" + n + "],\"data_offsets\":[0," + n + "]}}", data);
}
Buffer text(const std::string& s) {
    return Buffer(s.begin(), s.end());
}

template <class F>
Error caught(F f) {
    try {
        f();
    } catch (const Error& error) {
        return error;
    }
    return Error(Status{});
}

constexpr char kIndex[] = "model.safetensors.index.json";

}  // namespace

TEST_SUITE("checkpoint") {
    TEST_CASE("one file: names, raw bytes, packed records") {
        const TemporaryDirectory directory;
        directory.write("model.safetensors", shard("model.x_qmoe", "U8", test::small_int_record()));
        const Checkpoint checkpoint = Checkpoint::open(directory.path());
        CHECK(checkpoint.names() == std::vector<std::string>{"model.x_qmoe"});
        CHECK(checkpoint.packed_names() == checkpoint.names());
        CHECK(checkpoint.contains("model.x_qmoe"));
        CHECK(checkpoint.read("model.x_qmoe") == test::small_int_record());
        PackedTensor tensor = checkpoint.packed("model.x_qmoe");
        const PackedTensor moved = std::move(tensor);
        CHECK(moved.record().experts() == 2);
        CHECK(moved.record().verify().ok());
    }
    TEST_CASE("shards joined by an index, whose other members may hold anything") {
        const TemporaryDirectory directory;
        directory.write("a.safetensors", shard("a", "U8", {1, 2}));
        directory.write("b.safetensors", shard("b_qmoe", "U8", test::small_ternary_record()));
        directory.write(kIndex, text(R"({"metadata":{"total_size":1.5e3,"x":[null,{"y":[]}]},)"
                                     R"("weight_map":{"b_qmoe":"b.safetensors","a":"a.safetensors"}})"));
        const Checkpoint checkpoint = Checkpoint::open(directory.path());
        CHECK(checkpoint.names() == std::vector<std::string>{"a", "b_qmoe"});
        CHECK(checkpoint.packed_names() == std::vector<std::string>{"b_qmoe"});
        CHECK(checkpoint.read("a") == Buffer{1, 2});
        CHECK(checkpoint.packed("b_qmoe").record().rows() == 40);
    }
    TEST_CASE("E_MISSING: no checkpoint, no shard, no tensor, a tensor that its shard lacks") {
        const TemporaryDirectory directory;
        CHECK(caught([&] { Checkpoint::open(directory.path()); }).code() == Code::kMissing);
        directory.write(kIndex, text(R"({"weight_map":{"a":"a.safetensors"}})"));
        CHECK(caught([&] { Checkpoint::open(directory.path()); }).code() == Code::kMissing);
        directory.write("a.safetensors", shard("b", "U8", {1}));
        const Error error = caught([&] { Checkpoint::open(directory.path()); });
        CHECK(error.code() == Code::kMissing);
        CHECK(error.tensor() == "a");
        directory.write("a.safetensors", shard("a", "U8", {1}));
        const Checkpoint checkpoint = Checkpoint::open(directory.path());
        CHECK(caught([&] { checkpoint.read("q"); }).code() == Code::kMissing);
        CHECK(caught([&] { checkpoint.packed("q"); }).code() == Code::kMissing);
        CHECK(caught([&] { checkpoint.info("q"); }).code() == Code::kMissing);
    }
    TEST_CASE(
        "E_NAME: an index that points out of its directory, names a tensor twice, or shards that share a tensor") {
        const TemporaryDirectory directory;
        directory.write("a.safetensors", shard("a", "U8", {1}));
        directory.write("b.safetensors", shard("a", "U8", {1}));
        for (const char* bad :
             {"../a.safetensors", "/etc/passwd", "x/a.safetensors", "..", "", "a\\\\b", "a\\u0000.safetensors"}) {
            directory.write(kIndex, text(std::string(R"({"weight_map":{"a":")") + bad + "\"}}"));
            CHECK(caught([&] { Checkpoint::open(directory.path()); }).code() == Code::kName);
        }
        directory.write(kIndex, text(R"({"weight_map":{"a":"a.safetensors","a":"a.safetensors"}})"));
        CHECK(caught([&] { Checkpoint::open(directory.path()); }).code() == Code::kName);
        directory.write(kIndex, text(R"({"weight_map":{"a":"a.safetensors"},"weight_map":{}})"));
        CHECK(caught([&] { Checkpoint::open(directory.path()); }).code() == Code::kName);
        directory.write(kIndex, text(R"({"weight_map":{"a":"a.safetensors","c":"b.safetensors"}})"));
        CHECK(caught([&] { Checkpoint::open(directory.path()); }).code() == Code::kName);
    }
    TEST_CASE("E_CORRUPT: an index that is no JSON or has no weight map") {
        const TemporaryDirectory directory;
        for (const char* bad : {"", "x", "{", "{}", "[]", R"({"weight_map":[]})", R"({"weight_map":{"a":1}})",
                                R"({"weight_map":{}} x)"}) {
            directory.write(kIndex, text(bad));
            CHECK(caught([&] { Checkpoint::open(directory.path()); }).code() == Code::kCorrupt);
        }
    }
    TEST_CASE("E_LIMIT: an index over a million tensors") {
        const TemporaryDirectory directory;
        std::string json = "{\"weight_map\":{";
        for (uint64_t i = 0; i <= kMaxTensors; ++i) json += "\"" + std::to_string(i) + "\":\"a\",";
        json.back() = '}';
        directory.write(kIndex, text(json + "}"));
        CHECK(caught([&] { Checkpoint::open(directory.path()); }).code() == Code::kLimit);
    }
    TEST_CASE("an Error says what, where, and both numbers") {
        const TemporaryDirectory directory;
        Buffer record = test::small_int_record();
        record[4] = 9;  // the version
        directory.write("model.safetensors", shard("w_qmoe", "U8", record));
        const Checkpoint checkpoint = Checkpoint::open(directory.path());
        const Error error = caught([&] { checkpoint.packed("w_qmoe"); });
        CHECK(error.code() == Code::kVersion);
        CHECK(error.tensor() == "w_qmoe");
        CHECK(error.file() == directory.path() + "/model.safetensors");
        CHECK(error.status().offset == checkpoint.info("w_qmoe").begin + 4);
        CHECK(error.status().expected == 1);
        CHECK(error.status().actual == 9);
        CHECK(std::string(error.what()) == "E_VERSION: record: version not supported (expected 1, found 9) [file " +
                                               error.file() + ", tensor w_qmoe, offset " +
                                               std::to_string(error.status().offset) + "]");
        directory.write("model.safetensors", shard("w_qmoe", "I8", record));
        const Checkpoint typed = Checkpoint::open(directory.path());
        CHECK(caught([&] { typed.packed("w_qmoe"); }).code() == Code::kDtype);
    }
}
