// The rival: llama.cpp's MUL_MAT and MUL_MAT_ID on the shapes of bench_kernels, from its own sources (README.md).
//
//   linear/TYPE/BUFFER/tokens:M/threads:T                   MUL_MAT, N x K = 4096 x 14336
//   experts_up, experts_down/TYPE/BUFFER/tokens:T/threads:T MUL_MAT_ID alone: llama.cpp sums the choices in other calls
//
// BUFFER is ggml's name of where the weights live, which decides the kernel: CPU, CPU_REPACK, AMX. Every one that takes
// the weights is measured, so that the best counts. Counters and cold weights as in kernels.cpp.
#include <ggml-backend.h>
#include <ggml-cpp.h>
#include <ggml-cpu.h>
#include <ggml.h>

#include <cstring>
#include <memory>

#include "harness.h"
#include "samples.h"

namespace qmoe::bench {
namespace {

constexpr ggml_type kTypes[] = {
    GGML_TYPE_Q4_0, GGML_TYPE_Q4_K,    GGML_TYPE_Q8_0,  GGML_TYPE_Q3_K,  GGML_TYPE_IQ3_XXS,
    GGML_TYPE_Q2_K, GGML_TYPE_IQ2_XXS, GGML_TYPE_TQ1_0, GGML_TYPE_TQ2_0,
};
constexpr uint64_t kSlab = 16;  // rows that are quantized; the matrices repeat them

ggml_context_ptr new_context(uint64_t tensors) {
    return ggml_context_ptr(
        ggml_init({tensors * (ggml_tensor_overhead() + ggml_graph_overhead_custom(8, false)), nullptr, true}));
}

ggml_tensor* new_weights(ggml_context* context, ggml_type type, const Shape& shape) {
    const auto n = static_cast<int64_t>(shape.rows), k = static_cast<int64_t>(shape.cols);
    return shape.experts == 1 ? ggml_new_tensor_2d(context, type, k, n)
                              : ggml_new_tensor_3d(context, type, k, n, static_cast<int64_t>(shape.experts));
}

// The product of one batch, with its inputs as leaves. `ids` stays null without experts.
struct Product {
    ggml_tensor *x, *ids = nullptr, *y;
    Product(ggml_context* context, ggml_tensor* weights, const Shape& shape, uint64_t tokens) {
        const auto k = static_cast<int64_t>(shape.cols), t = static_cast<int64_t>(tokens);
        constexpr auto top_k = static_cast<int64_t>(kTopK);
        if (shape.experts == 1) {
            x = ggml_new_tensor_2d(context, GGML_TYPE_F32, k, t);
            y = ggml_mul_mat(context, weights, x);
        } else {
            x = ggml_new_tensor_3d(context, GGML_TYPE_F32, k, shape.per_choice ? top_k : 1, t);
            ids = ggml_new_tensor_2d(context, GGML_TYPE_I32, top_k, t);
            y = ggml_mul_mat_id(context, weights, x, ids);
        }
    }
};

ggml_backend_dev_t cpu() {
    return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

// The buffer types of the CPU: the plain one and those with kernels of their own.
std::vector<ggml_backend_buffer_type_t> buffer_types() {
    std::vector<ggml_backend_buffer_type_t> all = {ggml_backend_dev_buffer_type(cpu())};
    const auto extra = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu()), "ggml_backend_dev_get_extra_bufts"));
    if (extra != nullptr)
        for (ggml_backend_buffer_type_t* type = extra(cpu()); type != nullptr && *type != nullptr; ++type)
            all.push_back(*type);
    return all;
}

// Asked as llama.cpp asks when it loads a model: would the product with weights in such a buffer run?
bool takes(ggml_backend_buffer_type_t buffer_type, ggml_type type, const Shape& shape) {
    const ggml_context_ptr context = new_context(8);
    ggml_tensor* weights = new_weights(context.get(), type, shape);
    const ggml_backend_buffer_ptr empty(ggml_backend_buft_alloc_buffer(buffer_type, 0));
    weights->buffer = empty.get();
    const Product product(context.get(), weights, shape, 512);
    return ggml_backend_dev_supports_op(cpu(), product.y);
}

// The weights of one type, shape and buffer type. Only those last asked for are kept.
class Copies {
  public:
    static const Copies& get(ggml_type type, const Shape& shape, ggml_backend_buffer_type_t buffer_type) {
        static std::unique_ptr<Copies> last;
        if (last == nullptr || last->type_ != type || last->shape_ != &shape || last->buffer_type_ != buffer_type) {
            last.reset();
            last.reset(new Copies(type, shape, buffer_type));
        }
        return *last;
    }
    const std::vector<ggml_tensor*>& tensors() const { return tensors_; }
    std::span<const float> slab() const { return slab_; }  // (kSlab, K), as decoded

  private:
    Copies(ggml_type type, const Shape& shape, ggml_backend_buffer_type_t buffer_type)
        : type_(type), shape_(&shape), buffer_type_(buffer_type) {
        const uint64_t row = ggml_row_size(type, static_cast<int64_t>(shape.cols));
        const auto slab = quantized_slab(shape, row);
        std::vector<uint8_t> matrix(row * shape.rows * shape.experts);
        for (uint64_t at = 0; at < matrix.size(); at += slab.size())
            std::memcpy(matrix.data() + at, slab.data(), slab.size());

        const uint64_t count = copies_of(matrix.size());
        context_ = new_context(count);
        for (uint64_t i = 0; i < count; ++i) tensors_.push_back(new_weights(context_.get(), type, shape));
        buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(context_.get(), buffer_type));
        if (buffer_ == nullptr) throw std::runtime_error("no memory");
        ggml_backend_buffer_set_usage(buffer_.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        // Only the first goes through ggml's repacking, which takes seconds; the others are copies of what came out.
        ggml_backend_tensor_set(tensors_[0], matrix.data(), 0, matrix.size());
        const size_t stored = ggml_backend_buft_get_alloc_size(buffer_type, tensors_[0]);
        for (uint64_t i = 1; i < count; ++i) std::memcpy(tensors_[i]->data, tensors_[0]->data, stored);
    }

    std::vector<uint8_t> quantized_slab(const Shape& shape, uint64_t row) {
        const auto values = random_weights(kSlab * shape.cols);
        const std::vector<float> importance(shape.cols, 1.0f);  // some types insist on one
        std::vector<uint8_t> slab(row * kSlab);
        ggml_quantize_chunk(type_, values.data(), slab.data(), 0, static_cast<int64_t>(kSlab),
                            static_cast<int64_t>(shape.cols), importance.data());
        slab_.resize(values.size());
        ggml_get_type_traits(type_)->to_float(slab.data(), slab_.data(), static_cast<int64_t>(slab_.size()));
        return slab;
    }

    ggml_type type_;
    const Shape* shape_;
    ggml_backend_buffer_type_t buffer_type_;
    ggml_context_ptr context_;
    ggml_backend_buffer_ptr buffer_;
    std::vector<ggml_tensor*> tensors_;
    std::vector<float> slab_;
};

// A backend that keeps its threads between calls, also where ggml was built without OpenMP.
class Threads {
  public:
    explicit Threads(int count) : backend_(ggml_backend_cpu_init()) {
        ggml_threadpool_params params = ggml_threadpool_params_default(count);
        pool_.reset(ggml_threadpool_new(&params));
        ggml_backend_cpu_set_n_threads(backend_.get(), count);
        ggml_backend_cpu_set_threadpool(backend_.get(), pool_.get());
    }
    void compute(ggml_cgraph* graph) const {
        if (ggml_backend_graph_compute(backend_.get(), graph) != GGML_STATUS_SUCCESS)
            throw std::runtime_error("ggml_backend_graph_compute");
    }

  private:
    struct Free {
        void operator()(ggml_threadpool* pool) const { ggml_threadpool_free(pool); }
    };
    std::unique_ptr<ggml_threadpool, Free> pool_;
    ggml_backend_ptr backend_;  // goes before its threads
};

void measure(benchmark::State& state, ggml_type type, const Shape& shape, ggml_backend_buffer_type_t buffer_type,
             uint64_t tokens, int threads) {
    const Copies& copies = Copies::get(type, shape, buffer_type);
    const uint64_t count = copies.tensors().size();
    const Threads pool(threads);
    const auto routings = random_routings(tokens, shape.experts);
    const auto x = random_activations(shape.x_rows(tokens) * shape.cols);

    // One graph of one product for each copy, all with the same inputs and output.
    const ggml_context_ptr context = new_context(4 * count);
    std::vector<Product> products;
    std::vector<ggml_cgraph*> graphs;
    std::vector<float> y(tokens * shape.choices() * shape.rows, std::nanf(""));
    for (ggml_tensor* weights : copies.tensors()) {
        products.emplace_back(context.get(), weights, shape, tokens);
        graphs.push_back(ggml_new_graph_custom(context.get(), 8, false));
        ggml_build_forward_expand(graphs.back(), products.back().y);
    }
    const auto compute = [&](uint64_t turn) {
        Product& product = products[turn % count];
        const Routing& routing = routings[turn / count % routings.size()];
        product.x->data = const_cast<float*>(x.data());
        product.y->data = y.data();
        if (product.ids != nullptr) product.ids->data = const_cast<int32_t*>(routing.ids.data());
        pool.compute(graphs[turn % count]);
        return &routing;
    };

    compute(0);
    const uint64_t last_x = shape.x_rows(tokens) - 1, last_y = tokens * shape.choices() - 1;
    for (const bool last : {false, true})  // experts and slabs repeat: it does not matter which of them was chosen
        check_error(relative_error(copies.slab(), std::span(x).subspan(last ? last_x * shape.cols : 0, shape.cols),
                                   std::span(y).subspan(last ? last_y * shape.rows : 0, kSlab)));

    Work work;
    const double expert_bytes =
        static_cast<double>(ggml_nbytes(copies.tensors()[0])) / static_cast<double>(shape.experts);
    static uint64_t turn = 0;  // goes on where the last run stopped: what that one read last is still in a cache
    for (auto _ : state) work.add(shape, *compute(++turn), expert_bytes);
    work.report(state);
}

}  // namespace
}  // namespace qmoe::bench

int main(int argc, char** argv) {
    using namespace qmoe::bench;
    forced_copies() = option(argc, argv, "copies", 0);
    benchmark::AddCustomContext("ggml", ggml_version());
    for (const Shape& shape : shapes())
        for (const ggml_type type : kTypes)
            for (const ggml_backend_buffer_type_t buffer : buffer_types())
                if (takes(buffer, type, shape))
                    for (const uint64_t tokens : shape.tokens)
                        for (const int threads : {1, 2})
                            add(cell_name(shape, ggml_type_name(type), ggml_backend_buft_name(buffer), tokens, threads),
                                [&shape, type, buffer, tokens, threads](benchmark::State& state) {
                                    measure(state, type, shape, buffer, tokens, threads);
                                });
    return run(argc, argv);
}
