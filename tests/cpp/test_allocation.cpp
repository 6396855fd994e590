// Memory that runs out at the k-th allocation, for every k: the core refuses with E_NO_SPACE, leaks nothing and stays
// usable.
#include <atomic>
#include <cstdlib>
#include <new>

#include "qmoe/matmul.h"
#include "qmoe/safetensors.h"
#include "shard_index.h"
#include "testing.h"

namespace {

// Allocations until one fails; negative: none fails. Only ever set while this file's own thread allocates.
std::atomic<int64_t> until_failure{-1};

void* allocate(size_t size) {
    if (until_failure.load(std::memory_order_relaxed) >= 0 && until_failure.fetch_sub(1) == 0) throw std::bad_alloc();
    if (void* const p = std::malloc(size == 0 ? 1 : size)) return p;
    throw std::bad_alloc();
}

}  // namespace

void* operator new(size_t size) {
    return allocate(size);
}
void* operator new[](size_t size) {
    return allocate(size);
}
// std::stable_sort asks this way and does without where it gets nothing: no failure to test.
void* operator new(size_t size, const std::nothrow_t&) noexcept {
    return std::malloc(size == 0 ? 1 : size);
}
void operator delete(void* p, const std::nothrow_t&) noexcept {
    std::free(p);
}
void operator delete(void* p) noexcept {
    std::free(p);
}
void operator delete[](void* p) noexcept {
    std::free(p);
}
void operator delete(void* p, size_t) noexcept {
    std::free(p);
}
void operator delete[](void* p, size_t) noexcept {
    std::free(p);
}

using namespace qmoe;
using test::Buffer;

namespace {

// Fails every allocation of `action` in turn; returns how many there were.
template <class Action>
int64_t starve(Action action) {
    for (int64_t k = 0;; ++k) {
        until_failure = k;
        Status status;
        try {
            status = action();
        } catch (const std::bad_alloc&) {
            status = Status::error(Code::kNoSpace, "thrown");  // by functions that say they may
        }
        const bool failed = until_failure.exchange(-1) < 0;
        if (!failed) {
            REQUIRE(status.code == Code::kOk);
            return k;
        }
        REQUIRE(status.code == Code::kNoSpace);
        REQUIRE(k < 100000);
    }
}

}  // namespace

TEST_SUITE("allocation") {
    TEST_CASE("E_NO_SPACE: records") {
        test::Random random(50);
        const std::vector<test::Matrix> matrices = {
            test::int_matrix(random, 9, 70, 4, 32, true, ScaleType::kFloat16),
            test::ternary_matrix(random, 9, 70, 2, 700),
        };
        const std::vector<MatrixInput> inputs = {matrices[0].input(), matrices[1].input()};
        const Buffer bytes = test::build(matrices);
        Record record;
        REQUIRE(Record::open(bytes, record).ok());
        REQUIRE(active_isa() != nullptr);

        int64_t total = 0;
        total += starve([&] {
            Buffer out;
            return build_record(inputs, out);
        });
        total += starve([&] {
            Record out;
            return Record::open(bytes, out);
        });
        total += starve([&] {
            Buffer out;
            return record.slice_experts(1, 1, out);
        });
        const std::vector<Record> several = {record, record};
        total += starve([&] {
            Buffer head;
            return join_records(several, head);
        });
        total += starve([&] { return record.verify(); });
        std::vector<float> out(9 * 70), x(2 * 70, 1.0f);
        total += starve([&] { return record.decode_rows(1, 0, 9, out.data()); });
        const int64_t offsets[] = {0, 1, 2};
        total += starve(
            [&] { return grouped_linear(record, x.data(), ActivationType::kFloat32, 2, offsets, out.data(), 1); });
        MESSAGE(total, " failing allocations survived");
        CHECK(total > 40);
        CHECK(record.verify().ok());
    }

    TEST_CASE("E_NO_SPACE: safetensors files and indexes") {
        const test::TemporaryDirectory directory;
        const std::string json =
            R"({"__metadata__":{"a key that is long enough":"to be allocated, and its value too"},)"
            R"("a.name.of.more.than.fifteen.bytes":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},)"
            R"("another.name.of.more.than.fifteen.bytes":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})";
        const std::string path = directory.write("x", test::safetensors(json, Buffer(8)));
        int64_t total = starve([&] {
            SafetensorsFile file;
            return SafetensorsFile::open(path, file);
        });
        const std::string index =
            R"({"metadata":{"k":[1,"x"]},"weight_map":{"a.name.of.more.than.fifteen.bytes":"model-1.safetensors"}})";
        const Buffer text(index.begin(), index.end());
        total += starve([&] {
            std::vector<std::pair<std::string, std::string>> out;
            return parse_shard_index(text, out);
        });
        const Buffer packed = test::small_int_record();
        const std::string n = std::to_string(packed.size());
        const std::string record_path = directory.write(
            "r", test::safetensors("{\"r\":{\"dtype\":\"U8\",\"shape\":[" + n + "],\"data_offsets\":[0," + n + "]}}",
                                   packed));
        SafetensorsFile file;
        REQUIRE(SafetensorsFile::open(record_path, file).ok());
        total += starve([&] {
            Buffer bytes;
            Record record;
            return load_record(file, file.tensors()[0], bytes, record);
        });
        MESSAGE(total, " failing allocations survived");
        CHECK(total > 10);
    }
}
