// Many threads at once on one record, one file and one pool, first use included: everyone gets what one thread alone
// gets. Meant for ThreadSanitizer as well: configure with -DCMAKE_CXX_FLAGS=-fsanitize=thread.
#include <atomic>
#include <thread>

#include "qmoe/matmul.h"
#include "qmoe/safetensors.h"
#include "testing.h"

using namespace qmoe;
using test::Buffer;

TEST_SUITE("threads") {
    TEST_CASE("8 threads open, decode, multiply and read concurrently") {
        constexpr int kThreads = 8, kRounds = 200;
        test::Random random(60);
        std::vector<Buffer> records;  // more specs than the table cache has room for
        for (uint32_t i = 0; i < 20; ++i)
            records.push_back(test::build({test::ternary_matrix(random, 40, 70, 2, 400 + 30 * i),
                                           test::int_matrix(random, 40, 70, 4, 32, true, ScaleType::kFloat16)}));
        const test::TemporaryDirectory directory;
        const std::string n = std::to_string(records[0].size());
        const std::string json = "{\"r\":{\"dtype\":\"U8\",\"shape\":[" + n + "],\"data_offsets\":[0," + n + "]}}";
        SafetensorsFile file;
        REQUIRE(SafetensorsFile::open(directory.write("x", test::safetensors(json, records[0])), file).ok());

        const auto work = [&](size_t which, std::vector<float>& values) {
            Record record;
            bool ok = Record::open(records[which], record).ok();
            values.assign(40 * 70 + 3 * 40, 0.0f);
            ok &= record.decode_rows(0, 0, 40, values.data()).ok();
            const std::vector<float> x(3 * 70, 0.25f);
            const int64_t offsets[] = {0, 1, 3};
            ok &=
                grouped_linear(record, x.data(), ActivationType::kFloat32, 3, offsets, values.data() + 40 * 70, 2).ok();
            Buffer bytes;
            Record loaded;
            ok &= load_record(file, file.tensors()[0], bytes, loaded).ok() && bytes == records[0];
            return ok;
        };
        std::atomic<int> wrong{0};
        std::vector<std::vector<std::vector<float>>> results(kThreads, std::vector<std::vector<float>>(records.size()));
        std::vector<std::thread> threads;
        for (int t = 0; t < kThreads; ++t)
            threads.emplace_back([&, t] {
                std::vector<float> values;
                for (int round = 0; round < kRounds; ++round) {
                    const size_t which = static_cast<size_t>(round * 7 + t * 3) % records.size();
                    if (!work(which, values)) ++wrong;
                    auto& kept = results[static_cast<size_t>(t)][which];
                    if (kept.empty()) kept = values;
                    if (kept != values) ++wrong;
                }
            });
        for (std::thread& thread : threads) thread.join();
        CHECK(wrong == 0);
        for (size_t which = 0; which < records.size(); ++which) {
            std::vector<float> alone;
            REQUIRE(work(which, alone));
            for (const auto& result : results) CHECK(result[which] == alone);
        }
    }
}
