// qmoe_embed CHECKPOINT [TENSOR [EXPERT]]: opens a compressed checkpoint, multiplies one expert by a vector, straight from
// the record and by the faster kernels over prepacked weights, and prints the result's size and norm.
//
// Without TENSOR, the first packed tensor; without EXPERT, its first expert. The vector is x[k] = (k mod 17 - 8) / 8.
#include <qmoe/checkpoint.h>
#include <qmoe/matmul.h>
#include <qmoe/prepacked.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <vector>

namespace {

double norm(const std::vector<float>& values) {
    double squares = 0;
    for (const float value : values) squares += static_cast<double>(value) * static_cast<double>(value);
    return std::sqrt(squares);
}

// The run-time layout of a record, once per process; then any number of products.
std::vector<float> multiply_prepacked(const qmoe::Record& record, std::span<const int64_t> offsets,
                                      const std::vector<float>& x, qmoe::Precision precision, qmoe::Status& status) {
    std::vector<float> y(record.rows());
    uint64_t size = 0;
    status = qmoe::Prepacked::size(record, qmoe::RowOrder::kPlain, size);
    if (!status.ok()) return y;
    const std::unique_ptr<uint8_t, decltype(&std::free)> memory(
        static_cast<uint8_t*>(std::aligned_alloc(64, (size + 63) / 64 * 64)), &std::free);
    if (memory == nullptr) throw std::bad_alloc();
    qmoe::Prepacked weights;
    status = qmoe::Prepacked::prepack(record, qmoe::RowOrder::kPlain, {memory.get(), size}, 1);
    if (status.ok()) status = qmoe::Prepacked::open({memory.get(), size}, weights);
    if (status.ok())
        status =
            qmoe::grouped_linear(weights, x.data(), qmoe::ActivationType::kFloat32, 1, offsets, y.data(), precision, 1);
    return y;
}

int run(const std::string& directory, std::string name, uint64_t expert) {
    const auto checkpoint = qmoe::Checkpoint::open(directory);
    const auto packed = checkpoint.packed_names();
    if (packed.empty()) throw qmoe::Error(qmoe::Status::error(qmoe::Code::kMissing, "no packed tensor"), directory);
    if (name.empty()) name = packed.front();

    const qmoe::PackedTensor tensor = checkpoint.packed(name);
    const qmoe::Record& weight = tensor.record();  // E matrices (N, K)
    if (expert >= weight.experts())
        throw qmoe::Error(qmoe::Status::mismatch(qmoe::Code::kValue, "no such expert", 0, weight.experts(), expert),
                          directory, name);

    // One token, routed to one expert: its row number begins at that expert and ends there.
    std::vector<float> x(weight.cols()), y(weight.rows());
    for (size_t k = 0; k < x.size(); ++k) x[k] = (static_cast<float>(k % 17) - 8.0f) / 8.0f;
    std::vector<int64_t> offsets(weight.experts() + 1, 0);
    for (size_t e = expert + 1; e < offsets.size(); ++e) offsets[e] = 1;
    const qmoe::Status status =
        qmoe::grouped_linear(weight, x.data(), qmoe::ActivationType::kFloat32, 1, offsets, y.data(), 1);
    if (!status.ok()) throw qmoe::Error(status, directory, name);

    qmoe::Status prepacked;
    const auto exact = multiply_prepacked(weight, offsets, x, qmoe::Precision::kFloat, prepacked);
    if (!prepacked.ok()) throw qmoe::Error(prepacked, directory, name);
    const auto rounded = multiply_prepacked(weight, offsets, x, qmoe::Precision::kInt8, prepacked);
    if (!prepacked.ok()) throw qmoe::Error(prepacked, directory, name);

    double sum = 0;
    for (const float value : y) sum += static_cast<double>(value);
    std::printf("packed tensors: %zu\n", packed.size());
    std::printf("tensor: %s\n", name.c_str());
    std::printf("experts: %llu rows: %llu columns: %llu format: %s\n",
                static_cast<unsigned long long>(weight.experts()), static_cast<unsigned long long>(weight.rows()),
                static_cast<unsigned long long>(weight.cols()), weight.format_of(expert).name);
    std::printf("sum: %.9g\nnorm: %.9g\n", sum, norm(y));
    std::printf("norm, prepacked: %.9g\nnorm, int8 activations: %.9g\n", norm(exact), norm(rounded));
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 2 || argc > 4) {
        std::fprintf(stderr, "usage: qmoe_embed CHECKPOINT [TENSOR [EXPERT]]\n");
        return 2;
    }
    try {
        return run(argv[1], argc > 2 ? argv[2] : "", argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 0);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
