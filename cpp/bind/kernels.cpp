// Products over packed records and prepacked weights, on raw pointers of tensors that the caller keeps alive.
#include <sys/mman.h>
#include <unistd.h>

#include <string>

#include "bind.h"
#include "qmoe/matmul.h"
#include "qmoe/prepacked.h"

namespace py = pybind11;

namespace qmoe::bind {
RowOrder row_order_of(const std::string& name) {
    if (name == "plain") return RowOrder::kPlain;
    if (name == "halves") return RowOrder::kHalves;
    if (name == "interleaved") return RowOrder::kInterleaved;
    raise(Code::kValue, "unknown row order: " + name);
}

Activation activation_of(const std::string& name) {
    if (name == "silu") return Activation::kSilu;
    if (name == "gelu") return Activation::kGelu;
    if (name == "gelu_tanh") return Activation::kGeluTanh;
    if (name == "relu") return Activation::kRelu;
    raise(Code::kValue, "unknown activation: " + name);
}

namespace {

ActivationType activation_type(const std::string& name) {
    if (name == "float32") return ActivationType::kFloat32;
    if (name == "float16") return ActivationType::kFloat16;
    if (name == "bfloat16") return ActivationType::kBfloat16;
    raise(Code::kDtype, "activations must be float32, float16 or bfloat16, not " + name);
}

Precision precision_of(const std::string& name) {
    if (name == "int8") return Precision::kInt8;
    if (name == "float") return Precision::kFloat;
    raise(Code::kValue, "unknown precision: " + name);
}

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Status check_shape(uint64_t rows, uint64_t cols, uint64_t out_features, uint64_t in_features) {
    if (cols != in_features)
        return Status::mismatch(Code::kShape, "linear: columns of x against columns of the weight", 0, cols,
                                in_features);
    if (rows != out_features)
        return Status::mismatch(Code::kShape, "linear: columns of out against rows of the weight", 0, rows,
                                out_features);
    return {};
}

// x (tokens, in_features) and out (tokens, out_features) of x_dtype; offsets int64 (offset_count).
void linear(uintptr_t packed, uint64_t nbytes, uintptr_t offsets, uint64_t offset_count, uintptr_t x,
            const std::string& x_dtype, uint64_t tokens, uint64_t in_features, uintptr_t out, uint64_t out_features,
            int threads) {
    const ActivationType type = activation_type(x_dtype);
    Status status;
    {
        const py::gil_scoped_release release;
        Record record;
        status = Record::open({pointer<const uint8_t>(packed), nbytes}, record, false);
        if (status.ok()) status = check_shape(record.rows(), record.cols(), out_features, in_features);
        if (status.ok())
            status = grouped_linear(record, pointer<const void>(x), type, tokens,
                                    {pointer<const int64_t>(offsets), offset_count}, pointer<void>(out), threads);
    }
    check(status);
}

void prepacked_linear(uintptr_t prepacked, uint64_t nbytes, uintptr_t offsets, uint64_t offset_count, uintptr_t x,
                      const std::string& x_dtype, uint64_t tokens, uint64_t in_features, uintptr_t out,
                      uint64_t out_features, const std::string& precision, int threads) {
    const ActivationType type = activation_type(x_dtype);
    const Precision chosen = precision_of(precision);
    Status status;
    {
        const py::gil_scoped_release release;
        Prepacked weights;
        status = Prepacked::open({pointer<const uint8_t>(prepacked), nbytes}, weights);
        if (status.ok()) status = check_shape(weights.rows(), weights.cols(), out_features, in_features);
        if (status.ok())
            status =
                grouped_linear(weights, pointer<const void>(x), type, tokens,
                               {pointer<const int64_t>(offsets), offset_count}, pointer<void>(out), chosen, threads);
    }
    check(status);
}

uint64_t prepack_size(uintptr_t packed, uint64_t nbytes, const std::string& order) {
    Record record;
    check(Record::open({pointer<const uint8_t>(packed), nbytes}, record, false));
    uint64_t bytes = 0;
    check(Prepacked::size(record, row_order_of(order), bytes));
    return bytes;
}

// Fills out (out_bytes) and lets go of the record's pages: where they are a file's, the system may have them back.
void prepack(uintptr_t packed, uint64_t nbytes, const std::string& order, uintptr_t out, uint64_t out_bytes,
             int threads) {
    const RowOrder rows = row_order_of(order);
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto inner = [page](uintptr_t begin, uint64_t bytes, int advice) {
        const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
        if (first < last) madvise(pointer<void>(first), last - first, advice);  // a hint: failing costs nothing
    };
    Status status;
    {
        const py::gil_scoped_release release;
        Record record;
        status = Record::open({pointer<const uint8_t>(packed), nbytes}, record, false);
#ifdef MADV_HUGEPAGE
        inner(out, out_bytes, MADV_HUGEPAGE);
#endif
        if (status.ok()) status = Prepacked::prepack(record, rows, {pointer<uint8_t>(out), out_bytes}, threads);
#ifdef MADV_PAGEOUT
        if (status.ok()) inner(packed, nbytes, MADV_PAGEOUT);
#endif
    }
    check(status);
}

void run_experts(uintptr_t first, uint64_t first_bytes, uintptr_t second, uint64_t second_bytes, uintptr_t first_bias,
                 uintptr_t second_bias, const std::string& activation, bool gated, bool clamped, float alpha,
                 float limit, const std::string& precision, uintptr_t x, const std::string& x_dtype, uint64_t tokens,
                 uint64_t in_features, uintptr_t ids, uintptr_t weights, uint64_t top_k, uintptr_t out, int threads) {
    const ActivationType type = activation_type(x_dtype);
    ExpertsSpec spec;
    spec.activation = activation_of(activation);
    spec.gated = gated;
    spec.clamped = clamped;
    spec.alpha = alpha;
    spec.limit = limit;
    spec.first_bias = pointer<const float>(first_bias);
    spec.second_bias = pointer<const float>(second_bias);
    spec.precision = precision_of(precision);
    Status status;
    {
        const py::gil_scoped_release release;
        Prepacked up, down;
        status = Prepacked::open({pointer<const uint8_t>(first), first_bytes}, up);
        if (status.ok()) status = Prepacked::open({pointer<const uint8_t>(second), second_bytes}, down);
        if (status.ok() && up.cols() != in_features)
            status = Status::mismatch(Code::kShape, "experts: columns of x against columns of the first projection", 0,
                                      up.cols(), in_features);
        if (status.ok())
            status = experts(up, down, spec, pointer<const void>(x), type, tokens, pointer<const int64_t>(ids),
                             pointer<const float>(weights), top_k, pointer<void>(out), threads);
    }
    check(status);
}

}  // namespace

void bind_kernels(py::module_& m) {
    m.def("linear", &linear, py::arg("packed"), py::arg("nbytes"), py::arg("offsets"), py::arg("offset_count"),
          py::arg("x"), py::arg("x_dtype"), py::arg("tokens"), py::arg("in_features"), py::arg("out"),
          py::arg("out_features"), py::arg("threads"), "Grouped linear on raw pointers; see qmoe/matmul.h.");
    m.def("prepacked_linear", &prepacked_linear, py::arg("prepacked"), py::arg("nbytes"), py::arg("offsets"),
          py::arg("offset_count"), py::arg("x"), py::arg("x_dtype"), py::arg("tokens"), py::arg("in_features"),
          py::arg("out"), py::arg("out_features"), py::arg("precision"), py::arg("threads"),
          "Grouped linear over prepacked weights on raw pointers; see qmoe/prepacked.h.");
    m.def("prepack_size", &prepack_size, py::arg("packed"), py::arg("nbytes"), py::arg("order"),
          "Bytes of a record's run-time layout.");
    m.def("prepack", &prepack, py::arg("packed"), py::arg("nbytes"), py::arg("order"), py::arg("out"),
          py::arg("out_bytes"), py::arg("threads"), "Writes a record's run-time layout; see qmoe/prepacked.h.");
    m.def(
        "tuning",
        [] {
            const Tuning values = tuning();
            return py::dict(py::arg("prefetch_narrow") = values.prefetch_narrow,
                            py::arg("prefetch_wide") = values.prefetch_wide,
                            py::arg("direct_tokens") = values.direct_tokens,
                            py::arg("near_narrow") = values.near_narrow, py::arg("near_wide") = values.near_wide);
        },
        "What the kernels over prepacked weights are tuned to; see qmoe/prepacked.h.");
    m.def(
        "set_tuning",
        [](uint32_t prefetch_narrow, uint32_t prefetch_wide, uint32_t direct_tokens, uint32_t near_narrow,
           uint32_t near_wide) {
            check(set_tuning({prefetch_narrow, prefetch_wide, direct_tokens, near_narrow, near_wide}));
        },
        py::arg("prefetch_narrow"), py::arg("prefetch_wide"), py::arg("direct_tokens"), py::arg("near_narrow"),
        py::arg("near_wide"), "Changes it, for this process.");
    m.def(
        "prepacked_shape",
        [](uintptr_t layout, uint64_t nbytes) {
            Prepacked weights;
            check(Prepacked::open({pointer<const uint8_t>(layout), nbytes}, weights));
            return py::make_tuple(weights.experts(), weights.rows(), weights.cols());
        },
        py::arg("layout"), py::arg("nbytes"), "(experts, rows, columns) of a run-time layout.");
    m.def("experts", &run_experts, py::arg("first"), py::arg("first_bytes"), py::arg("second"), py::arg("second_bytes"),
          py::arg("first_bias"), py::arg("second_bias"), py::arg("activation"), py::arg("gated"), py::arg("clamped"),
          py::arg("alpha"), py::arg("limit"), py::arg("precision"), py::arg("x"), py::arg("x_dtype"), py::arg("tokens"),
          py::arg("in_features"), py::arg("ids"), py::arg("weights"), py::arg("top_k"), py::arg("out"),
          py::arg("threads"), "A layer's experts on raw pointers; see qmoe/prepacked.h.");
}

}  // namespace qmoe::bind
