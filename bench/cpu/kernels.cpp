// Our kernels on the shapes on which bench_ggml measures the rival; compare.py puts the two side by side.
//
//   linear/KIND/ours/tokens:M/threads:T         one matrix N x K = 4096 x 14336
//   experts_up/KIND/ours/tokens:T/threads:T     128 experts of 768 x 2048, 8 for each token, random routing
//   experts_down/KIND/ours/tokens:T/threads:T   128 experts of 2048 x 768, with the sum by routing weight
//   layer/KIND/ours/tokens:T/threads:T          both and SwiGLU between them, in one call
//
// Counters, per second: weights (that were read), flops, stored_bytes. With one token also read_limit, the bytes per
// second that plain reads in between got, and share_of_read_limit. Weights are cold: copies of them, 700 MB together,
// take turns (`--copies=N` says otherwise).
#include <memory>

#include "ours.h"
#include "reading.h"

namespace qmoe::bench {
namespace {

// The weights of one kind and shape. Only those last asked for are kept: all together would be gigabytes.
class Copies {
  public:
    static const Copies& get(const Kind& kind, const Shape& shape) {
        static std::unique_ptr<Copies> last;
        if (last == nullptr || last->kind_ != &kind || last->shape_ != &shape) {
            last.reset();
            last.reset(new Copies(kind, shape));
        }
        return *last;
    }
    const Weights& operator[](uint64_t i) const { return *all_[i % all_.size()]; }
    uint64_t count() const { return all_.size(); }

  private:
    Copies(const Kind& kind, const Shape& shape) : kind_(&kind), shape_(&shape) {
        const std::vector<uint8_t> record = random_record(kind, shape);
        const uint64_t count = copies_of(record.size());
        for (uint64_t i = 0; i < count; ++i) all_.push_back(std::make_unique<Weights>(record));
    }
    const Kind* kind_;
    const Shape* shape_;
    std::vector<std::unique_ptr<Weights>> all_;
};

// One call; `down` sums over the choices, so its y has one row a token, the others' as many as x or as choices.
void call(const Weights& weights, const Shape& shape, const float* x, const Routing& routing, float* y, int threads) {
    if (shape.experts == 1)
        weights.linear(x, routing.tokens, y, threads);
    else if (shape.per_choice)
        weights.experts_down(x, routing, y, threads);
    else
        weights.experts_up(x, routing, y, threads);
}

// Compares the first rows of the first and last token's result. All experts are equal: any may have been chosen.
void check(const Prepacked& weights, const Shape& shape, std::span<const float> x, const Routing& routing,
           std::span<const float> y) {
    constexpr uint64_t kRows = 16;
    const uint64_t k = shape.cols;
    std::vector<float> w(shape.rows * k), sum(k);
    must(weights.dequantize(0, w.data()), "dequantize");
    w.resize(kRows * k);
    for (const uint64_t t : {uint64_t{0}, routing.tokens - 1}) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        const uint64_t terms = shape.per_choice ? kTopK : 1;
        for (uint64_t j = 0; j < terms; ++j)  // the sum of the products is the product with the sum
            for (uint64_t i = 0; i < k; ++i)
                sum[i] += (shape.per_choice ? routing.weights[t * kTopK + j] : 1.0f) * x[(t * terms + j) * k + i];
        const uint64_t row = shape.per_choice ? t : t * shape.choices();
        check_error(relative_error(w, sum, y.subspan(row * shape.rows, kRows)));
    }
}

// Reads as many bytes as a product took `seconds` for, from weights that are not its own and whose turn is far off.
void follow(benchmark::State& state, ReadLimit& limit, double seconds, const Weights& from, double product_bytes,
            uint64_t turn, int threads) {
    const uint64_t bytes = std::min(static_cast<uint64_t>(product_bytes), from.bytes());
    const uint64_t at = turn * bytes % (from.bytes() - bytes + 1) / 64 * 64;
    state.PauseTiming();
    limit.follow(seconds, from.prepacked().data() + at, bytes, threads);
    state.ResumeTiming();
}

void measure(benchmark::State& state, const Kind& kind, const Shape& shape, uint64_t tokens, int threads) {
    const Copies& copies = Copies::get(kind, shape);
    const auto routings = random_routings(tokens, shape.experts);
    const auto x = random_activations(shape.x_rows(tokens) * shape.cols);
    std::vector<float> y(tokens * shape.choices() * shape.rows, std::nanf(""));
    call(copies[0], shape, x.data(), routings[0], y.data(), threads);
    check(copies[0].prepacked(), shape, x, routings[0], y);

    Work work;
    const double expert_bytes = static_cast<double>(copies[0].bytes()) / static_cast<double>(shape.experts);
    static uint64_t turn = 0;  // goes on where the last run stopped: what that one read last is still in a cache
    ReadLimit limit;
    for (auto _ : state) {
        ++turn;  // every copy comes once before the routing changes
        const Routing& routing = routings[turn / copies.count() % routings.size()];
        const double begin = seconds_now();
        call(copies[turn], shape, x.data(), routing, y.data(), threads);
        if (const double took = seconds_now() - begin; tokens == 1)
            follow(state, limit, took, copies[turn + copies.count() / 2],
                   expert_bytes * static_cast<double>(routing.active), turn, threads);
        work.add(shape, routing, expert_bytes);
    }
    work.report(state);
    limit.report(state);
}

// The layers of one kind in turn.
void measure_layer(benchmark::State& state, const Kind& kind, uint64_t tokens, int threads) {
    struct Layers {
        const Kind* kind = nullptr;
        std::vector<std::unique_ptr<Weights>> first, second;
    };
    static Layers layers;
    const Shape up = {"", 2 * 768, 2048, 128, false, {}}, down = {"", 2048, 768, 128, true, {}};
    if (layers.kind != &kind) {
        layers = {};
        const std::vector<uint8_t> first = random_record(kind, up), second = random_record(kind, down);
        for (uint64_t i = copies_of(first.size() + second.size()); i > 0; --i) {
            layers.first.push_back(std::make_unique<Weights>(first, RowOrder::kHalves));
            layers.second.push_back(std::make_unique<Weights>(second));
        }
        layers.kind = &kind;
    }
    const auto routings = random_routings(tokens, up.experts);
    const auto x = random_activations(tokens * up.cols);
    std::vector<float> y(tokens * up.cols, std::nanf(""));
    std::vector<std::vector<int64_t>> ids;
    for (const Routing& routing : routings) ids.emplace_back(routing.ids.begin(), routing.ids.end());
    Work work;
    const double bytes = static_cast<double>(layers.first[0]->bytes() + layers.second[0]->bytes()) / 128;
    static uint64_t turn = 0;
    ReadLimit limit;
    for (auto _ : state) {
        ++turn;
        const size_t copy = turn % layers.first.size(), table = turn / layers.first.size() % routings.size();
        const double begin = seconds_now();
        must(experts(layers.first[copy]->prepacked(), layers.second[copy]->prepacked(), {}, x.data(),
                     ActivationType::kFloat32, tokens, ids[table].data(), routings[table].weights.data(), kTopK,
                     y.data(), threads),
             "experts");
        if (const double took = seconds_now() - begin; tokens == 1)
            follow(state, limit, took, *layers.first[(turn + layers.first.size() / 2) % layers.first.size()],
                   bytes * static_cast<double>(routings[table].active), turn, threads);
        work.add(layer_shape(), routings[table], bytes);
    }
    for (const float value : y)
        if (!std::isfinite(value)) throw std::runtime_error("a result is not finite");
    work.report(state);
    limit.report(state);
}

}  // namespace
}  // namespace qmoe::bench

int main(int argc, char** argv) {
    using namespace qmoe::bench;
    forced_copies() = option(argc, argv, "copies", 0);
    benchmark::AddCustomContext("isa", isa());
    for (const Shape& shape : shapes())
        for (const Kind& kind : kKinds)
            for (const uint64_t tokens : shape.tokens)
                for (const int threads : {1, 2})
                    add(cell_name(shape, kind.name, "ours", tokens, threads),
                        [&, tokens, threads](benchmark::State& state) {
                            measure(state, kind, shape, tokens, threads);
                        });
    for (const Kind& kind : kKinds)
        for (const uint64_t tokens : layer_shape().tokens)
            for (const int threads : {1, 2})
                add(cell_name(layer_shape(), kind.name, "ours", tokens, threads),
                    [&, tokens, threads](benchmark::State& state) { measure_layer(state, kind, tokens, threads); });
    return run(argc, argv);
}
