// Products of packed matrices against float64, by the kernels for GPUs, whose threads are emulated.
#include <algorithm>
#include <array>
#include <cmath>
#include <functional>

#include "common.cuh"
#include "formats/ternary.h"
#include "formats/ternary_streams.h"
#include "launch.cuh"
#include "testing.h"

using namespace qmoe;
using test::Matrix, test::Random;

namespace {

constexpr size_t kGuard = 8;
constexpr float kPoison = 777.0f;  // rounded to bfloat16, 776

float rounded(float value) {
    return __bfloat162float(__float2bfloat16_rn(value));
}

// Numbers of 16 bits, with poison behind them.
struct Numbers {
    std::vector<__nv_bfloat16> values;

    explicit Numbers(size_t count) : values(count + kGuard, __float2bfloat16_rn(kPoison)) {}
    static Numbers random(Random& random, size_t count) {
        Numbers made(count);
        for (size_t i = 0; i < count; ++i)
            made.values[i] = __float2bfloat16_rn((static_cast<float>(random.below(4001)) - 2000.0f) / 1000.0f);
        return made;
    }
    double operator[](size_t i) const { return __bfloat162float(values[i]); }
    bool guarded() const {
        for (size_t i = values.size() - kGuard; i < values.size(); ++i)
            if (__bfloat162float(values[i]) != rounded(kPoison)) return false;
        return true;
    }
};

struct alignas(16) Quad {
    uint32_t words[4];
};
using Room = std::vector<Quad>;  // device memory

uint64_t workspace(const cuda::IntLinear& call) {
    uint64_t bytes = 0;
    REQUIRE(cuda::linear_workspace_int(call, &bytes).ok());
    return bytes;
}
uint64_t workspace(const cuda::TernaryLinear& call) {
    uint64_t bytes = 0;
    REQUIRE(cuda::linear_workspace_ternary(call, &bytes).ok());
    return bytes;
}
Status run(const cuda::IntLinear& call) {
    return cuda::linear_int(call, nullptr);
}
Status run(const cuda::TernaryLinear& call) {
    return cuda::linear_ternary(call, nullptr);
}
Status run(const cuda::IntExperts& call) {
    return cuda::experts_int(call, nullptr);
}
Status run(const cuda::TernaryExperts& call) {
    return cuda::experts_ternary(call, nullptr);
}
Status workspace(cuda::IntExperts& call) {
    return cuda::workspace_int(call, &call.workspace_bytes);
}
Status workspace(cuda::TernaryExperts& call) {
    return cuda::workspace_ternary(call, &call.workspace_bytes);
}

void bring(const Record& record, cuda::TernaryStack& view, Room& room) {
    std::vector<uint8_t> streams;
    REQUIRE(cuda::ternary_streams_shape(record, view.shape).ok());
    REQUIRE(cuda::ternary_streams(record, view.shape, streams).ok());
    room.resize(streams.size() / sizeof(Quad) + 1);
    std::memcpy(room.data(), streams.data(), streams.size());
    view.streams = room.data();
}

void bring(const Record& record, cuda::IntStack& view, Room& room) {
    cuda::DeviceMatrix matrix{};
    const auto view_of = [&](uint64_t e) {
        const MatrixView stored = record.matrix(e);
        std::copy(stored.spec.begin(), stored.spec.end(), matrix.spec);
        matrix.data = stored.data.data(), matrix.bytes = stored.data.size();
        matrix.rows = stored.rows, matrix.cols = stored.cols;
    };
    view_of(0);
    std::copy(std::begin(matrix.spec), std::end(matrix.spec), view.spec);
    view.rows = matrix.rows, view.cols = matrix.cols;
    uint64_t bytes = 0;
    REQUIRE(cuda::int_tiles_bytes(matrix, &bytes).ok());
    room.resize(record.experts() * bytes / sizeof(Quad) + 1);
    for (uint64_t e = 0; e < record.experts(); ++e) {
        view_of(e);
        REQUIRE(
            cuda::prepack_int(matrix, view.order, reinterpret_cast<uint8_t*>(room.data()) + e * bytes, bytes, nullptr)
                .ok());
    }
    view.tiles = room.data();
}

Status unpack(const cuda::TernaryStack& stack, uint64_t expert, float* out) {
    return cuda::unpack_ternary(stack, expert, 1, out, cuda::OutputType::kFloat32, nullptr);
}
Status unpack(const cuda::IntStack& stack, uint64_t expert, float* out) {
    cuda::IntStack one = stack;
    uint64_t bytes = 0;
    cuda::DeviceMatrix matrix{};
    std::copy(std::begin(stack.spec), std::end(stack.spec), matrix.spec);
    matrix.rows = stack.rows, matrix.cols = stack.cols;
    QMOE_TRY(cuda::int_tiles_bytes(matrix, &bytes));
    one.tiles = static_cast<const uint8_t*>(stack.tiles) + expert * bytes;
    return cuda::unpack_int(one, out, cuda::OutputType::kFloat32, nullptr);
}

// A stack as a kernel sees it, and its values.
template <typename View>
struct Stack {
    View view{};
    std::vector<std::vector<float>> values;

    Stack(const std::vector<Matrix>& matrices, RowOrder order) {
        const test::Buffer bytes = test::build(matrices);
        Record record;
        REQUIRE(Record::open(bytes, record).ok());
        view.experts = matrices.size();
        view.order = order;
        bring(record, view, room_);
        for (const Matrix& matrix : matrices) values.push_back(matrix.values());
    }

  private:
    Room room_;
};

// Of many tokens int weights, scales included, are rounded to bfloat16: five times the standard deviation, at most.
template <typename View>
constexpr double kRounding = std::is_same_v<View, cuda::IntStack> ? 8e-3 : 0.0;

// What makes a matrix of a shape.
using Make = std::function<Matrix(Random&, uint64_t rows, uint64_t cols)>;

// Zeros of 1024.
Make ternary(uint32_t zeros) {
    return [=](Random& random, uint64_t rows, uint64_t cols) {
        Matrix made = test::ternary_matrix(random, rows, cols, 2, zeros);
        for (float& level : made.levels) level /= 32;
        return made;
    };
}

Make integers(uint8_t bits, uint32_t group, bool zeros) {
    return [=](Random& random, uint64_t rows, uint64_t cols) {
        Matrix made = test::int_matrix(random, rows, cols, bits, group, zeros, ScaleType::kFloat16);
        for (float& scale : made.scales) scale /= static_cast<float>(8 << bits);
        return made;
    };
}

template <typename View>
void check_linear(const Make& make, uint64_t rows, uint64_t cols, uint64_t tokens, bool biased,
                  cuda::Kernel kernel = cuda::Kernel::kAuto) {
    Random random(rows * cols + tokens);
    const Stack<View> stack({make(random, rows, cols)}, RowOrder::kPlain);
    const Numbers x = Numbers::random(random, tokens * cols), bias = Numbers::random(random, rows);
    Numbers y(tokens * rows), again(tokens * rows);
    cuda::Linear<View> call{};
    call.weight = stack.view;
    call.x = x.values.data();
    call.bias = biased ? bias.values.data() : nullptr;
    call.y = y.values.data();
    call.tokens = tokens;
    call.type = cuda::OutputType::kBfloat16;
    call.kernel = kernel;
    call.workspace_bytes = workspace(call);
    Room room(call.workspace_bytes / sizeof(Quad) + 1);
    std::memset(room.data(), 0xFF, room.size() * sizeof(Quad));  // NaN
    call.workspace = room.data();
    REQUIRE(run(call).ok());
    call.y = again.values.data();
    REQUIRE(run(call).ok());
    REQUIRE(y.guarded());
    const double rounding = kernel == cuda::Kernel::kManyTokens ? kRounding<View> : 0.0;
    bool close = true;
    for (uint64_t t = 0; t < tokens; ++t)
        for (uint64_t r = 0; r < rows; ++r) {
            double expected = biased ? bias[r] : 0.0, magnitude = 1e-3, squares = 0.0;
            for (uint64_t k = 0; k < cols; ++k) {
                const double product = double{stack.values[0][r * cols + k]} * x[t * cols + k];
                expected += product, magnitude += std::abs(product), squares += product * product;
            }
            const double found = y[t * rows + r];
            close &= std::abs(found - expected) <=
                     4e-3 * std::abs(expected) + 1e-4 * magnitude + rounding * std::sqrt(squares);
            close &= found == again[t * rows + r];
        }
    CHECK(close);
}

template <typename View>
struct Layer {
    uint64_t experts, hidden, width, tokens, top_k;
    Make first_make, second_make;
    RowOrder order = RowOrder::kHalves;
    bool biased = false;
    cuda::Kernel kernel = cuda::Kernel::kAuto;

    void check(uint64_t seed) const {
        Random random(seed);
        const uint64_t rows = order == RowOrder::kPlain ? width : 2 * width;
        std::vector<Matrix> firsts, seconds;
        for (uint64_t e = 0; e < experts; ++e) {
            firsts.push_back(first_make(random, rows, hidden));
            seconds.push_back(second_make(random, hidden, width));
        }
        const Stack<View> first(firsts, order), second(seconds, RowOrder::kPlain);
        const Numbers x = Numbers::random(random, tokens * hidden), b1 = Numbers::random(random, experts * rows),
                      b2 = Numbers::random(random, experts * hidden);
        Numbers y(tokens * hidden);
        std::vector<int64_t> ids(tokens * top_k);
        std::vector<float> weights(tokens * top_k);
        for (int64_t& id : ids) id = static_cast<int64_t>(random.below(experts + 2)) - 1;  // other ranks' as well
        for (float& weight : weights) weight = static_cast<float>(random.below(1000)) / 1000.0f;
        cuda::Experts<View> call{};
        call.first = first.view, call.second = second.view;
        call.x = x.values.data(), call.y = y.values.data();
        call.ids = ids.data(), call.weights = weights.data(), call.weights_type = cuda::OutputType::kFloat32;
        if (biased) call.first_bias = b1.values.data(), call.second_bias = b2.values.data();
        call.tokens = tokens, call.top_k = top_k;
        call.type = cuda::OutputType::kBfloat16;
        call.gate = {Activation::kSilu, false, 0.0f, 0.0f};
        call.kernel = kernel;
        REQUIRE(workspace(call).ok());
        Room room(call.workspace_bytes / sizeof(Quad) + 1);
        std::memset(room.data(), 0xFF, room.size() * sizeof(Quad));  // NaN
        call.workspace = room.data();
        REQUIRE(run(call).ok());
        REQUIRE(y.guarded());

        std::vector<double> expected(tokens * hidden);
        for (uint64_t choice = 0; choice < ids.size(); ++choice) {
            if (ids[choice] < 0 || ids[choice] >= static_cast<int64_t>(experts)) continue;
            const auto e = static_cast<uint64_t>(ids[choice]), token = choice / top_k;
            std::vector<double> raw(rows), inner(width);
            for (uint64_t r = 0; r < rows; ++r) {
                raw[r] = biased ? b1[e * rows + r] : 0.0;
                for (uint64_t k = 0; k < hidden; ++k)
                    raw[r] += double{first.values[e][r * hidden + k]} * x[token * hidden + k];
            }
            const auto silu = [](double v) { return v / (1.0 + std::exp(-v)); };
            for (uint64_t i = 0; i < width; ++i)
                inner[i] =
                    rounded(static_cast<float>(order == RowOrder::kPlain    ? silu(raw[i])
                                               : order == RowOrder::kHalves ? silu(raw[i]) * raw[width + i]
                                                                            : silu(raw[2 * i]) * raw[2 * i + 1]));
            for (uint64_t r = 0; r < hidden; ++r) {
                double sum = biased ? b2[e * hidden + r] : 0.0;
                for (uint64_t i = 0; i < width; ++i) sum += double{second.values[e][r * width + i]} * inner[i];
                expected[token * hidden + r] += double{weights[choice]} * sum;
            }
        }
        double size = 0.0;
        for (const double value : expected) size += value * value;
        size = std::sqrt(size / static_cast<double>(expected.size())) + 1e-9;
        // Of many tokens what each choice adds is rounded as well.
        const double most = kernel == cuda::Kernel::kManyTokens ? 1.6e-2 : 8e-3;
        double worst = 0.0;
        for (size_t i = 0; i < expected.size(); ++i)
            worst = std::max(worst, std::abs(y[i] - expected[i]) / (std::abs(expected[i]) + size));
        CHECK(worst <= most);
    }
};

}  // namespace

TEST_SUITE("emulated products") {
    using cuda::IntStack, cuda::TernaryStack;

    TEST_CASE("ternary linear layers: densities, ragged shapes, numbers of tokens") {
        for (const uint64_t tokens : {1, 2, 4, 7, 8, 11}) {
            check_linear<TernaryStack>(ternary(906), 33, 129, tokens, true);
            check_linear<TernaryStack>(ternary(500), 5, 7, tokens, false);
        }
        check_linear<TernaryStack>(ternary(1024), 1, 1, 5, true);
        check_linear<TernaryStack>(ternary(0), 64, 300, 3, true);
        check_linear<TernaryStack>(ternary(700), 300, 520, 4, false);
        check_linear<TernaryStack>(ternary(980), 100, 1000, 8, true);
        check_linear<TernaryStack>(ternary(906), 20, 3000, 2, false);
        check_linear<TernaryStack>(ternary(906), 9, 15000, 8, false);  // no room for activations of eight tokens
        for (const uint64_t tokens : {5, 16}) {                        // as codes in shared memory
            check_linear<TernaryStack>(ternary(906), 133, 1201, tokens, true);
            check_linear<TernaryStack>(ternary(906), 70, 2048, tokens, false);
            check_linear<TernaryStack>(ternary(300), 47, 88, tokens, true);  // strips of 32 rows
        }
        check_linear<TernaryStack>(ternary(1010), 2000, 136, 8, false);  // several batches, of unlike size
        check_linear<TernaryStack>(ternary(1010), 2000, 136, 9, true);
        check_linear<TernaryStack>(ternary(906), 40, 600, 35, true, cuda::Kernel::kFewTokens);
        check_linear<TernaryStack>(ternary(950), 30, 4400, 16, true, cuda::Kernel::kFewTokens);
        check_linear<TernaryStack>(ternary(906), 3, 40000, 2, true);  // nor of two
    }

    TEST_CASE("ternary linear layers by the kernel for many tokens") {
        using enum cuda::Kernel;
        for (const uint64_t tokens : {1, 16, 17, 40}) {
            check_linear<TernaryStack>(ternary(906), 133, 1200, tokens, true, kManyTokens);
            check_linear<TernaryStack>(ternary(500), 5, 7, tokens, false, kManyTokens);
        }
        check_linear<TernaryStack>(ternary(1024), 1, 1, 5, true, kManyTokens);
        check_linear<TernaryStack>(ternary(0), 130, 2000, 3, true, kManyTokens);
        check_linear<TernaryStack>(ternary(950), 70, 3000, 90, true, kManyTokens);
        check_linear<TernaryStack>(ternary(980), 70, 4100, 20, false, kManyTokens);  // quads longer than the ring
        check_linear<TernaryStack>(ternary(1010), 150, 5000, 3, true, kManyTokens);
        check_linear<TernaryStack>(ternary(906), 300, 600, 300, true, kManyTokens);
        check_linear<TernaryStack>(ternary(906), 260, 9000, 2, true, kManyTokens);
        check_linear<TernaryStack>(ternary(906), 128, 9000, 2, true, kManyTokens);  // cut in several parts
        check_linear<TernaryStack>(ternary(980), 40, 12000, 19, false, kManyTokens);
        check_linear<TernaryStack>(ternary(700), 70, 3000, 2, true, kManyTokens);
    }

    TEST_CASE("rows cut into many parts, whose ends differ by more than the ring holds") {
        cuda::Device::few = 20;
        check_linear<TernaryStack>(ternary(906), 128, 14336, 16, false, cuda::Kernel::kManyTokens);
        cuda::Device::few = 3;
    }

    TEST_CASE("int linear layers: bits, groups, zeros, ragged shapes, numbers of tokens") {
        for (const uint8_t bits : std::initializer_list<uint8_t>{2, 3, 4, 8})
            for (const uint32_t group : {0u, 32u, 128u})
                for (const bool zeros : {false, true})
                    check_linear<IntStack>(integers(bits, group, zeros), 33, 200, zeros ? 9 : 3, zeros);
        check_linear<IntStack>(integers(4, 64, true), 5, 7, 1, false);
        check_linear<IntStack>(integers(2, 128, false), 70, 129, 16, true);
        check_linear<IntStack>(integers(4, 128, false), 20, 9000, 16, false);  // activations come in slabs
    }

    TEST_CASE("int linear layers by the kernel for many tokens") {
        using enum cuda::Kernel;
        for (const uint8_t bits : std::initializer_list<uint8_t>{2, 3, 4, 8})
            for (const uint32_t group : {0u, 32u, 64u, 128u})
                for (const bool zeros : {false, true})
                    check_linear<IntStack>(integers(bits, group, zeros), 33, 200, zeros ? 17 : 3, zeros, kManyTokens);
        check_linear<IntStack>(integers(4, 128, false), 300, 700, 70, true, kManyTokens);  // two products
        check_linear<IntStack>(integers(4, 128, false), 600, 129, 40, true, kManyTokens);
        check_linear<IntStack>(integers(4, 128, false), 5, 9000, 5, false, kManyTokens);  // cut in several parts
        check_linear<IntStack>(integers(2, 128, true), 1, 1, 1, false, kManyTokens);
    }

    TEST_CASE("wide panels of many tokens: pairs of blocks of threads, units cut and in turns") {
        using enum cuda::Kernel;
        cuda::Device::few = 7;  // three pairs
        check_linear<IntStack>(integers(4, 128, false), 300, 704, 65, true, kManyTokens);
        check_linear<IntStack>(integers(3, 128, false), 300, 700, 130, true, kManyTokens);  // rows that begin anywhere
        check_linear<IntStack>(integers(8, 32, true), 130, 1160, 140, false, kManyTokens);
        check_linear<IntStack>(integers(2, 0, true), 1030, 136, 300, true, kManyTokens);
        check_linear<IntStack>(integers(4, 64, true), 513, 264, 700, false,
                               kManyTokens);  // products that are neighbours
        check_linear<TernaryStack>(ternary(906), 520, 640, 270, true, kManyTokens);
        for (const RowOrder order : {RowOrder::kHalves, RowOrder::kInterleaved, RowOrder::kPlain})
            Layer<TernaryStack>{2, 150, 70, 75, 2, ternary(906), ternary(980), order, true, kManyTokens}.check(14);
        Layer<IntStack>{2,    136,        72, 80, 2, integers(4, 32, true), integers(4, 64, true), RowOrder::kPlain,
                        true, kManyTokens}
            .check(13);
        Layer<IntStack>{
            3, 200, 136, 300, 2, integers(3, 0, true), integers(2, 128, false), RowOrder::kHalves, false, kManyTokens}
            .check(15);
        cuda::Device::few = 3;
    }

    TEST_CASE("layers of experts: gates, biases, few tokens and many") {
        for (const RowOrder order : {RowOrder::kHalves, RowOrder::kInterleaved, RowOrder::kPlain})
            for (const uint64_t tokens : {1, 3, 9}) {
                const bool biased = tokens != 3;
                Layer<TernaryStack>{5, 70, 36, tokens, 2, ternary(906), ternary(906), order, biased}.check(tokens);
                Layer<IntStack>{5, 70, 36, tokens, 2, integers(4, 32, true), integers(4, 32, true), order, biased}
                    .check(tokens);
            }
        Layer<TernaryStack>{3, 64, 32, 20, 3, ternary(906), ternary(906)}.check(20);
        Layer<IntStack>{3, 64, 32, 20, 3, integers(2, 128, false), integers(2, 128, false)}.check(20);
        Layer<TernaryStack>{40, 64, 32, 6, 8, ternary(1024), ternary(906), RowOrder::kHalves, true}.check(21);
    }

    TEST_CASE("layers of experts by the kernel for many tokens") {
        using enum cuda::Kernel;
        for (const RowOrder order : {RowOrder::kHalves, RowOrder::kInterleaved, RowOrder::kPlain}) {
            Layer<TernaryStack>{5, 150, 70, 9, 2, ternary(906), ternary(980), order, true, kManyTokens}.check(10);
            Layer<IntStack>{5, 150, 70, 9, 2, integers(4, 32, true), integers(4, 64, true), order, true, kManyTokens}
                .check(10);
        }
        Layer<IntStack>{3,     200,        140, 60, 2, integers(3, 0, true), integers(2, 128, false), RowOrder::kHalves,
                        false, kManyTokens}
            .check(11);
        Layer<TernaryStack>{3, 200, 140, 60, 2, ternary(906), ternary(700), RowOrder::kHalves, false, kManyTokens}
            .check(11);
        Layer<TernaryStack>{4, 64, 32, 3, 1, ternary(1024), ternary(906), RowOrder::kHalves, true, kManyTokens}.check(
            12);
    }

    TEST_CASE("projections that differ in bits are launches of their own") {
        Layer<TernaryStack>{5, 129, 77, 13, 2, ternary(980), ternary(300), RowOrder::kHalves, true}.check(30);
        Layer<IntStack>{4, 70, 36, 5, 2, integers(4, 32, true), integers(2, 64, false)}.check(31);
    }

    TEST_CASE("unpacking") {
        Random random(40);
        const auto check = [&]<typename View>(const Make& make, const View&) {
            const Stack<View> stack({make(random, 37, 611), make(random, 37, 611)}, RowOrder::kPlain);
            for (uint64_t expert = 0; expert < 2; ++expert) {
                std::vector<float> out(37 * 611 + kGuard, kPoison);
                REQUIRE(unpack(stack.view, expert, out.data()).ok());
                for (size_t i = out.size() - kGuard; i < out.size(); ++i) REQUIRE(out[i] == kPoison);
                out.resize(37 * 611);
                CHECK(out == stack.values[expert]);
            }
        };
        for (const uint32_t zeros : {0u, 500u, 906u, 980u, 1020u}) check(ternary(zeros), TernaryStack{});
        for (const uint8_t bits : std::initializer_list<uint8_t>{2, 3, 4, 8})
            for (const uint32_t group : {0u, 64u}) check(integers(bits, group, true), IntStack{});
    }

    TEST_CASE("symbols that no encoder makes stay in shared memory") {
        Random random(49);
        for (const uint32_t zeros : {300u, 700u, 906u, 980u, 1015u})
            for (const bool ones : {false, true}) {
                const Stack<TernaryStack> stack({ternary(zeros)(random, 70, 700)}, RowOrder::kPlain);
                const TernaryStreams layout(stack.view.shape);
                auto* const bytes = static_cast<uint8_t*>(const_cast<void*>(stack.view.streams));
                uint8_t* const matrix = bytes + *reinterpret_cast<const uint64_t*>(bytes);
                const uint32_t quads = reinterpret_cast<const uint32_t*>(matrix + layout.bases_at)[layout.groups];
                for (uint64_t i = 0; i < 16 * uint64_t{quads}; ++i)
                    matrix[layout.quads_at + i] = ones ? 0xff : static_cast<uint8_t>(random.next());

                std::vector<float> out(70 * 700);
                CHECK(unpack(stack.view, 0, out.data()).ok());
                const Numbers x = Numbers::random(random, 6 * 700);
                Numbers y(6 * 70);
                cuda::TernaryLinear call{};
                call.weight = stack.view, call.x = x.values.data(), call.y = y.values.data(), call.tokens = 6;
                call.type = cuda::OutputType::kBfloat16, call.kernel = cuda::Kernel::kFewTokens;
                CHECK(run(call).ok());
                call.kernel = cuda::Kernel::kManyTokens, call.workspace_bytes = workspace(call);
                Room room(call.workspace_bytes / sizeof(Quad) + 1);
                call.workspace = room.data();
                CHECK(run(call).ok());
            }
    }

    TEST_CASE("refusals") {
        Random random(50);
        const Stack<TernaryStack> stack({ternary(906)(random, 1, 62000)}, RowOrder::kPlain);
        const Numbers x = Numbers::random(random, 62000);
        Numbers y(1);
        cuda::TernaryLinear call{};
        call.weight = stack.view, call.x = x.values.data(), call.y = y.values.data(), call.tokens = 1;
        call.type = cuda::OutputType::kBfloat16;
        CHECK(run(call).code == Code::kNoKernel);
        call.type = cuda::OutputType::kFloat32;
        CHECK(run(call).code == Code::kDtype);
        call.weight.experts = 2;
        CHECK(run(call).code == Code::kValue);
        float out = 0.0f;
        CHECK(unpack(stack.view, 1, &out).code == Code::kValue);

        call.weight = stack.view, call.type = cuda::OutputType::kBfloat16, call.kernel = cuda::Kernel::kManyTokens;
        call.workspace_bytes = workspace(call);
        Room room(call.workspace_bytes / sizeof(Quad) + 2);
        call.workspace = reinterpret_cast<uint8_t*>(room.data()) + 8;
        CHECK(run(call).code == Code::kValue);
        call.workspace = room.data();
        CHECK(run(call).ok());
        --call.workspace_bytes;
        CHECK(run(call).code == Code::kShape);
    }
}
