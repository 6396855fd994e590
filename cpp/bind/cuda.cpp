// The CUDA library as Python sees it. Device pointers come from torch; nothing here needs a GPU to be present.
#include "qmoe/cuda.h"

#include <utility>

#include "bind.h"
#include "gptq_fields.h"
#include "qmoe/cuda_library.h"
#include "qmoe/record.h"

namespace py = pybind11;

namespace qmoe::bind {
namespace {

const cuda::Api& required_library() {
    std::string reason;
    const cuda::Api* api = cuda::library(reason);
    if (api == nullptr) raise(Code::kNoKernel, reason);
    return *api;
}

py::dict cuda_info() {
    py::dict out;
    py::list devices;
    std::string reason;
    const cuda::Api* api = cuda::library(reason);
    int count = 0;
    if (api != nullptr) {
        const Status status = api->device_count(&count);
        if (!status.ok()) reason = status.what;
    }
    for (int i = 0; i < count; ++i) {
        cuda::DeviceInfo info;
        check(api->device_info(i, &info));
        py::dict device;
        device["name"] = info.name;
        device["compute_capability"] = info.compute_capability;
        device["multiprocessors"] = info.multiprocessors;
        device["memory_bytes"] = info.memory_bytes;
        devices.append(std::move(device));
    }
    out["library"] = api != nullptr;
    out["devices"] = devices;
    out["reason"] = reason;
    return out;
}

cuda::OutputType type_of(const std::string& dtype) {
    return dtype == "float32"    ? cuda::OutputType::kFloat32
           : dtype == "float16"  ? cuda::OutputType::kFloat16
           : dtype == "bfloat16" ? cuda::OutputType::kBfloat16
                                 : static_cast<cuda::OutputType>(255);
}

cuda::DeviceMatrix device_matrix(const Record& record, uint64_t expert, uintptr_t record_on_device) {
    const MatrixView view = record.matrix(expert);
    cuda::DeviceMatrix matrix{};
    std::copy(view.spec.begin(), view.spec.end(), matrix.spec);
    matrix.data = reinterpret_cast<const uint8_t*>(record_on_device) + record.entries()[expert].offset;
    matrix.bytes = view.data.size();
    matrix.rows = view.rows;
    matrix.cols = view.cols;
    return matrix;
}

template <class T>
using Numbers = py::array_t<T, py::array::c_style>;

template <class T>
std::span<const T> span_of(const Numbers<T>& array) {
    return {array.data(), static_cast<size_t>(array.size())};
}

// A record's matrices as they are stored, to be decoded where their bytes lie in device memory. The record is checked
// once, here.
class CudaRecord {
  public:
    explicit CudaRecord(const Bytes& record_bytes) {
        const Record record = open_record(record_bytes, true);
        for (uint64_t e = 0; e < record.experts(); ++e) {
            matrices_.push_back(device_matrix(record, e, 0));
            matrices_.back().data = nullptr;
            data_at_.push_back(record.entries()[e].offset);
        }
    }

    // Empty for matrices that need none.
    py::array_t<uint32_t> table(uint64_t expert) const {
        const cuda::DeviceMatrix& matrix = at(expert);
        if ((matrix.spec[0] | matrix.spec[1] << 8) != 2) return py::array_t<uint32_t>(0);
        py::array_t<uint32_t> table(4096);
        check(cuda::ternary_decoding_table(std::span<const uint8_t, kSpecBytes>(matrix.spec),
                                           {table.mutable_data(), 4096}));
        return table;
    }

    void dequantize(uint64_t expert, uintptr_t record_on_device, uintptr_t table, uintptr_t out,
                    const std::string& dtype, uintptr_t stream) const {
        cuda::DeviceMatrix matrix = at(expert);
        matrix.data = reinterpret_cast<const uint8_t*>(record_on_device) + data_at_[expert];
        matrix.ternary_table = reinterpret_cast<const uint32_t*>(table);
        check(required_library().dequantize(matrix, reinterpret_cast<void*>(out), type_of(dtype),
                                            reinterpret_cast<void*>(stream)));
    }

  private:
    const cuda::DeviceMatrix& at(uint64_t expert) const {
        if (expert >= matrices_.size())
            check(Status::mismatch(Code::kValue, "cuda: experts of a record", 0, matrices_.size(), expert));
        return matrices_[expert];
    }

    std::vector<cuda::DeviceMatrix> matrices_;
    std::vector<uint64_t> data_at_;
};

// A record's int matrices in the layout of the CUDA products: what is known of them on the host. Their bytes are the
// caller's.
class CudaInt {
  public:
    CudaInt(const Bytes& record_bytes, const std::string& order) {
        const Record record = open_record(record_bytes, true);
        const auto matrix = [&](uint64_t e) { return device_matrix(record, e, 0); };
        first_ = matrix(0);
        stack_.experts = record.experts();
        stack_.rows = first_.rows;
        stack_.cols = first_.cols;
        stack_.order = row_order_of(order);
        std::copy(std::begin(first_.spec), std::end(first_.spec), stack_.spec);
        check(required_library().prepacked_bytes(first_, &bytes_));
        for (uint64_t e = 0; e < record.experts(); ++e) {
            if (!std::equal(std::begin(first_.spec), std::end(first_.spec), matrix(e).spec))
                raise(Code::kNoKernel, "cuda: all matrices of a stack must have one format");
            data_at_.push_back(record.entries()[e].offset);
        }
    }

    uint64_t bytes() const { return bytes_ * stack_.experts; }

    void prepack(uintptr_t record_on_device, uintptr_t out, uint64_t out_bytes, uintptr_t stream) const {
        if (out_bytes != bytes())
            check(Status::mismatch(Code::kShape, "cuda: bytes of the tiles", 0, bytes(), out_bytes));
        cuda::DeviceMatrix there = first_;
        for (uint64_t e = 0; e < stack_.experts; ++e) {
            there.data = reinterpret_cast<const uint8_t*>(record_on_device) + data_at_[e];
            check(required_library().prepack(there, stack_.order, reinterpret_cast<uint8_t*>(out) + e * bytes_, bytes_,
                                             reinterpret_cast<void*>(stream)));
        }
    }

    cuda::IntStack at(uintptr_t tiles) const {
        cuda::IntStack stack = stack_;
        stack.tiles = reinterpret_cast<const void*>(tiles);
        return stack;
    }

    void unpack(uintptr_t tiles, uint64_t expert, uintptr_t out, const std::string& dtype, uintptr_t stream) const {
        if (expert >= stack_.experts)
            check(Status::mismatch(Code::kValue, "cuda: experts of a stack", 0, stack_.experts, expert));
        check(required_library().unpack(at(tiles + expert * bytes_), reinterpret_cast<void*>(out), type_of(dtype),
                                        reinterpret_cast<void*>(stream)));
    }

    static constexpr auto kLinear = &cuda::Api::int_linear;
    static constexpr auto kLinearWorkspace = &cuda::Api::int_linear_workspace;
    static constexpr auto kWorkspace = &cuda::Api::int_workspace;
    static constexpr auto kExperts = &cuda::Api::int_experts;

  private:
    cuda::DeviceMatrix first_{};
    cuda::IntStack stack_{};
    uint64_t bytes_ = 0;  // of one matrix
    std::vector<uint64_t> data_at_;
};

// A record's ternary matrices in the layout of the CUDA products, made here. The bytes go to the device by the caller.
class CudaTernary {
  public:
    CudaTernary(const Bytes& record_bytes, const std::string& order, int threads) {
        const Record record = open_record(record_bytes, true);
        stack_.order = row_order_of(order);
        if (stack_.order != RowOrder::kPlain && record.rows() % 2 != 0)
            raise(Code::kShape, "cuda: an odd number of rows has no gates");
        check([&] {
            const py::gil_scoped_release release;
            const Status status = cuda::ternary_streams_shape(record, stack_.shape);
            return status.ok() ? cuda::ternary_streams(record, stack_.shape, streams_, threads) : status;
        }());
        stack_.experts = record.experts();
        bytes_ = streams_.size();
    }

    uint64_t bytes() const { return bytes_; }
    py::dict shape() const {
        py::dict out;
        out["gap_bits"] = stack_.shape.gap_bits;
        out["segments"] = stack_.shape.segments;
        return out;
    }

    // Once: they are many, and the caller's from then on.
    Bytes take() {
        if (streams_.size() != bytes_) raise(Code::kValue, "cuda: the streams have been taken");
        return to_array(std::exchange(streams_, {}));
    }

    cuda::TernaryStack at(uintptr_t streams) const {
        cuda::TernaryStack stack = stack_;
        stack.streams = reinterpret_cast<const void*>(streams);
        return stack;
    }

    void unpack(uintptr_t streams, uint64_t expert, uintptr_t out, const std::string& dtype, uintptr_t stream,
                uint64_t count) const {
        check(required_library().ternary_unpack(at(streams), expert, count, reinterpret_cast<void*>(out),
                                                type_of(dtype), reinterpret_cast<void*>(stream)));
    }

    static constexpr auto kLinear = &cuda::Api::ternary_linear;
    static constexpr auto kLinearWorkspace = &cuda::Api::ternary_linear_workspace;
    static constexpr auto kWorkspace = &cuda::Api::ternary_workspace;
    static constexpr auto kExperts = &cuda::Api::ternary_experts;

  private:
    cuda::TernaryStack stack_{};
    std::vector<uint8_t> streams_;
    uint64_t bytes_ = 0;
};

// An encoder of ternary matrices (E, N, K) whose trits lie on the device: their spec, and what the host does besides. Trits
// go by several calls where scratch is to be less, some matrices at a time.
class CudaTernaryEncoder {
  public:
    CudaTernaryEncoder(const Numbers<float>& levels, uint64_t cols, const Numbers<uint64_t>& counts)
        : levels_(levels.data(), levels.data() + levels.size()) {
        if (levels.ndim() != 3) raise(Code::kShape, "levels of ternary matrices have three dimensions");
        all_ = {static_cast<uint64_t>(levels.shape(0)), static_cast<uint64_t>(levels.shape(1)), cols, levels_};
        check(cuda::ternary_spec(all_, span_of(counts), spec_));
        check(cuda::ternary_encoding_tables(spec_, tables_));
        cuda::TernaryEncode call = call_of(1);
        check(required_library().ternary_scratch(call, &scratch_));
    }

    Bytes tables() const { return to_array(std::vector<uint8_t>(tables_)); }
    uint64_t offsets() const { return cuda::ternary_offsets(spec_, all_.rows, all_.cols); }
    uint64_t scratch() const { return scratch_; }
    uint64_t head() const { return cuda::ternary_head_bytes(all_.matrices); }

    void code(uintptr_t trits, uint64_t matrices, uintptr_t tables, uintptr_t offsets, uintptr_t misfits,
              uintptr_t scratch, uint64_t scratch_bytes, uintptr_t stream) const {
        cuda::TernaryEncode call = call_of(matrices);
        call.trits = reinterpret_cast<const int8_t*>(trits);
        call.tables = reinterpret_cast<const void*>(tables);
        call.offsets = reinterpret_cast<uint32_t*>(offsets);
        call.misfits = reinterpret_cast<uint32_t*>(misfits);
        call.scratch = reinterpret_cast<void*>(scratch);
        call.scratch_bytes = scratch_bytes;
        check(required_library().ternary_code(call, reinterpret_cast<void*>(stream)));
    }

    py::tuple places(const Numbers<uint32_t>& offsets, const Numbers<uint32_t>& misfits) const {
        cuda::TernaryMatrices some = all_;
        some.matrices = static_cast<uint64_t>(misfits.size());
        std::vector<uint64_t> first_words;
        uint64_t bytes = 0;
        check(cuda::ternary_places(spec_, some, span_of(offsets), span_of(misfits), first_words, bytes));
        return py::make_tuple(py::array_t<uint64_t>(static_cast<py::ssize_t>(first_words.size()), first_words.data()),
                              bytes);
    }

    void words(uint64_t matrices, uintptr_t offsets, uintptr_t scratch, uint64_t scratch_bytes, uintptr_t first_words,
               uintptr_t out, uintptr_t stream) const {
        cuda::TernaryEncode call = call_of(matrices);
        call.offsets = reinterpret_cast<uint32_t*>(offsets);
        call.scratch = reinterpret_cast<void*>(scratch);
        call.scratch_bytes = scratch_bytes;
        call.first_words = reinterpret_cast<const uint64_t*>(first_words);
        call.words = reinterpret_cast<uint16_t*>(out);
        check(required_library().ternary_words(call, reinterpret_cast<void*>(stream)));
    }

    void finish(const Numbers<uint32_t>& offsets, Bytes& record, int threads) const {
        const std::span<uint8_t> bytes(record.mutable_data(), static_cast<size_t>(record.size()));
        const auto all_offsets = span_of(offsets);
        check([&] {
            const py::gil_scoped_release release;
            return cuda::ternary_finish(spec_, all_, all_offsets, bytes, threads_of(threads));
        }());
    }

  private:
    cuda::TernaryEncode call_of(uint64_t matrices) const {
        if (matrices == 0 || matrices > all_.matrices)
            check(Status::mismatch(Code::kShape, "cuda: matrices to encode", 0, all_.matrices, matrices));
        cuda::TernaryEncode call{};
        std::copy(spec_.begin(), spec_.end(), call.spec);
        call.matrices = matrices, call.rows = all_.rows, call.cols = all_.cols;
        return call;
    }

    std::vector<float> levels_;
    cuda::TernaryMatrices all_{};
    SpecBytes spec_{};
    std::vector<uint8_t> tables_;
    uint64_t scratch_ = 0;  // for one matrix
};

cuda::Kernel kernel_of(const std::string& name) {
    if (name == "auto") return cuda::Kernel::kAuto;
    if (name == "few") return cuda::Kernel::kFewTokens;
    if (name == "many") return cuda::Kernel::kManyTokens;
    raise(Code::kValue, "cuda: kernels are \"auto\", \"few\" and \"many\"");
}

template <typename Matrices>
uint64_t linear_workspace(const Matrices& matrix, uint64_t tokens, const std::string& kernel) {
    cuda::Linear<decltype(matrix.at(0))> call{};
    call.weight = matrix.at(0);
    call.tokens = tokens;
    call.kernel = kernel_of(kernel);
    uint64_t bytes = 0;
    check((required_library().*Matrices::kLinearWorkspace)(call, &bytes));
    return bytes;
}

template <typename Matrices>
void linear(const Matrices& matrix, uintptr_t weights, uintptr_t x, uintptr_t bias, uintptr_t y, uint64_t tokens,
            const std::string& dtype, uintptr_t stream, uintptr_t workspace, uint64_t workspace_bytes,
            const std::string& kernel) {
    cuda::Linear<decltype(matrix.at(0))> call{};
    call.weight = matrix.at(weights);
    call.x = reinterpret_cast<const void*>(x);
    call.bias = reinterpret_cast<const void*>(bias);
    call.y = reinterpret_cast<void*>(y);
    call.tokens = tokens;
    call.type = type_of(dtype);
    call.kernel = kernel_of(kernel);
    call.workspace = reinterpret_cast<void*>(workspace);
    call.workspace_bytes = workspace_bytes;
    check((required_library().*Matrices::kLinear)(call, reinterpret_cast<void*>(stream)));
}

// Two stacks and a gate: a layer's experts.
template <typename Matrices>
class CudaExperts {
  public:
    CudaExperts(const Matrices& first, const Matrices& second, const std::string& activation, bool clamped, float alpha,
                float limit, const std::string& kernel) {
        call_.kernel = kernel_of(kernel);
        call_.first = first.at(0);
        call_.second = second.at(0);
        call_.gate = {activation_of(activation), clamped, alpha, limit};
    }

    uint64_t workspace(uint64_t tokens, uint64_t top_k) const {
        auto call = call_;
        call.tokens = tokens;
        call.top_k = top_k;
        uint64_t bytes = 0;
        check((required_library().*Matrices::kWorkspace)(call, &bytes));
        return bytes;
    }

    void run(uintptr_t first_weights, uintptr_t second_weights, uintptr_t first_bias, uintptr_t second_bias,
             uintptr_t x, const std::string& dtype, uint64_t tokens, uintptr_t ids, uintptr_t weights,
             const std::string& weights_dtype, uint64_t top_k, uintptr_t y, uintptr_t workspace,
             uint64_t workspace_bytes, uintptr_t stream) const {
        auto call = call_;
        weights_of(call.first) = reinterpret_cast<const void*>(first_weights);
        weights_of(call.second) = reinterpret_cast<const void*>(second_weights);
        call.first_bias = reinterpret_cast<const void*>(first_bias);
        call.second_bias = reinterpret_cast<const void*>(second_bias);
        call.x = reinterpret_cast<const void*>(x);
        call.type = type_of(dtype);
        call.tokens = tokens;
        call.ids = reinterpret_cast<const int64_t*>(ids);
        call.weights = reinterpret_cast<const void*>(weights);
        call.weights_type = type_of(weights_dtype);
        call.top_k = top_k;
        call.y = reinterpret_cast<void*>(y);
        call.workspace = reinterpret_cast<void*>(workspace);
        call.workspace_bytes = workspace_bytes;
        check((required_library().*Matrices::kExperts)(call, reinterpret_cast<void*>(stream)));
    }

  private:
    static const void*& weights_of(cuda::IntStack& stack) { return stack.tiles; }
    static const void*& weights_of(cuda::TernaryStack& stack) { return stack.streams; }

    cuda::Experts<decltype(std::declval<const Matrices&>().at(0))> call_{};
};

template <typename Matrices>
void bind_experts(py::module_& m, const char* name) {
    using Experts = CudaExperts<Matrices>;
    py::class_<Experts>(m, name, "A layer's experts on the device; see Experts in qmoe/cuda.h.")
        .def(py::init<const Matrices&, const Matrices&, const std::string&, bool, float, float, const std::string&>(),
             py::arg("first"), py::arg("second"), py::arg("activation"), py::arg("clamped") = false,
             py::arg("alpha") = 0.0f, py::arg("limit") = 0.0f, py::arg("kernel") = "auto")
        .def("workspace", &Experts::workspace, py::arg("tokens"), py::arg("top_k"),
             "Bytes of workspace that run() wants.")
        .def("run", &Experts::run, py::arg("first_weights"), py::arg("second_weights"), py::arg("first_bias"),
             py::arg("second_bias"), py::arg("x"), py::arg("dtype"), py::arg("tokens"), py::arg("ids"),
             py::arg("weights"), py::arg("weights_dtype"), py::arg("top_k"), py::arg("y"), py::arg("workspace"),
             py::arg("workspace_bytes"), py::arg("stream"));
}

void cuda_round_block(const py::dict& block, const py::dict& grid, uintptr_t stream) {
    check(required_library().round_block(round_block_of(block, grid), reinterpret_cast<void*>(stream)));
}

void cuda_choose_grid(const py::dict& target, const py::dict& grid, uintptr_t stream) {
    check(required_library().choose_grid(choose_grid_of(target, grid), reinterpret_cast<void*>(stream)));
}

void cuda_ternary_census(uintptr_t trits, uint64_t rows, uint64_t cols, uintptr_t counts, uintptr_t stream) {
    check(required_library().ternary_census(reinterpret_cast<const int8_t*>(trits), rows, cols,
                                            reinterpret_cast<uint64_t*>(counts), reinterpret_cast<void*>(stream)));
}

void cuda_ternary_sums(const py::dict& fields, uintptr_t stream) {
    check(required_library().ternary_sums(ternary_sums_of(fields), reinterpret_cast<void*>(stream)));
}

}  // namespace

void bind_cuda(py::module_& m) {
    m.def("cuda_info", &cuda_info, "Whether libqmoe_cuda could be opened, the devices it sees, and if not why.");
    py::class_<CudaRecord>(m, "CudaRecord", "A record to be decoded on the device. Pointers are raw.")
        .def(py::init<const Bytes&>(), py::arg("record"))
        .def("table", &CudaRecord::table, py::arg("expert"),
             "The decoding table of a ternary matrix, uint32 (4096,), that dequantize wants in device memory; else "
             "empty.")
        .def("dequantize", &CudaRecord::dequantize, py::arg("expert"), py::arg("record_on_device"), py::arg("table"),
             py::arg("out"), py::arg("dtype"), py::arg("stream"),
             "Decode one expert into out (N, K); the record's bytes also lie on the device.");
    py::class_<CudaInt>(m, "CudaInt", "A record of int matrices as the CUDA products read it. Pointers are raw.")
        .def(py::init<const Bytes&, const std::string&>(), py::arg("record"), py::arg("order") = "plain")
        .def_property_readonly("bytes", &CudaInt::bytes, "What the layout takes on the device.")
        .def("prepack", &CudaInt::prepack, py::arg("record_on_device"), py::arg("out"), py::arg("out_bytes"),
             py::arg("stream"), "Fill `out` from the record's bytes on the device.")
        .def("unpack", &CudaInt::unpack, py::arg("tiles"), py::arg("expert"), py::arg("out"), py::arg("dtype"),
             py::arg("stream"), "Decode one expert into out (N, K), from its tiles.")
        .def("linear", &linear<CudaInt>, py::arg("tiles"), py::arg("x"), py::arg("bias"), py::arg("y"),
             py::arg("tokens"), py::arg("dtype"), py::arg("stream"), py::arg("workspace") = 0,
             py::arg("workspace_bytes") = 0, py::arg("kernel") = "auto",
             "y (tokens, N) = x (tokens, K) times the prepacked matrix; see Linear in qmoe/cuda.h.")
        .def("linear_workspace", &linear_workspace<CudaInt>, py::arg("tokens"), py::arg("kernel") = "auto",
             "Bytes of workspace that linear() wants, on the current device.");
    py::class_<CudaTernary>(m, "CudaTernary",
                            "A record of ternary matrices as the CUDA products read it: pointers are raw.")
        .def(py::init<const Bytes&, const std::string&, int>(), py::arg("record"), py::arg("order") = "plain",
             py::arg("threads") = 1)
        .def_property_readonly("bytes", &CudaTernary::bytes, "What the layout takes on the device.")
        .def_property_readonly("shape", &CudaTernary::shape, "Bits of a gap, and lanes of a row.")
        .def("take", &CudaTernary::take, "The layout, uint8 (bytes,), to be brought to the device; once.")
        .def("unpack", &CudaTernary::unpack, py::arg("streams"), py::arg("expert"), py::arg("out"), py::arg("dtype"),
             py::arg("stream"), py::arg("count") = 1,
             "Decode experts `expert` to `expert + count - 1` into out (count, N, K), from their streams.")
        .def("linear", &linear<CudaTernary>, py::arg("streams"), py::arg("x"), py::arg("bias"), py::arg("y"),
             py::arg("tokens"), py::arg("dtype"), py::arg("stream"), py::arg("workspace") = 0,
             py::arg("workspace_bytes") = 0, py::arg("kernel") = "auto",
             "y (tokens, N) = x (tokens, K) times the matrix; see Linear in qmoe/cuda.h.")
        .def("linear_workspace", &linear_workspace<CudaTernary>, py::arg("tokens"), py::arg("kernel") = "auto",
             "Bytes of workspace that linear() wants, on the current device.");
    bind_experts<CudaInt>(m, "CudaIntExperts");
    bind_experts<CudaTernary>(m, "CudaTernaryExperts");
    py::class_<CudaTernaryEncoder>(m, "CudaTernaryEncoder",
                                   "Encodes ternary matrices whose trits (E, N, K) lie on the device, some of them at "
                                   "a time; see TernaryEncode in "
                                   "qmoe/cuda.h. Pointers are raw.")
        .def(py::init<const Numbers<float>&, uint64_t, const Numbers<uint64_t>&>(), py::arg("levels"), py::arg("cols"),
             py::arg("counts"), "levels: (E, N, 1 or 2), counts: (29,) as cuda_ternary_census counted all trits.")
        .def_property_readonly("tables", &CudaTernaryEncoder::tables, "What code() wants in device memory.")
        .def_property_readonly("offsets", &CudaTernaryEncoder::offsets, "Offsets of a matrix, uint32 each.")
        .def_property_readonly("scratch", &CudaTernaryEncoder::scratch, "Bytes of scratch for each matrix of a call.")
        .def_property_readonly("head", &CudaTernaryEncoder::head, "Bytes of the record before its first matrix.")
        .def("code", &CudaTernaryEncoder::code, py::arg("trits"), py::arg("matrices"), py::arg("tables"),
             py::arg("offsets"), py::arg("misfits"), py::arg("scratch"), py::arg("scratch_bytes"), py::arg("stream"),
             "Codes some matrices, and fills their offsets and misfits, uint32.")
        .def("places", &CudaTernaryEncoder::places, py::arg("offsets"), py::arg("misfits"),
             "By code()'s results on the host: first words of the matrices, uint64, and the bytes that they take. "
             "Raises "
             "E_VALUE for trits that this is not the encoder of.")
        .def("words", &CudaTernaryEncoder::words, py::arg("matrices"), py::arg("offsets"), py::arg("scratch"),
             py::arg("scratch_bytes"), py::arg("first_words"), py::arg("out"), py::arg("stream"),
             "Writes the words of matrices just coded to `out`, which holds zeros.")
        .def("finish", &CudaTernaryEncoder::finish, py::arg("offsets"), py::arg("record").noconvert(),
             py::arg("threads") = 0,
             "Makes the record, in place, of all that words() wrote, behind room for the head.");
    m.def("cuda_ternary_census", &cuda_ternary_census, py::arg("trits"), py::arg("rows"), py::arg("cols"),
          py::arg("counts"), py::arg("stream"),
          "Counts symbols of trits (rows, cols) on the device by class, int64 (29,): the first one's are left 0, the "
          "last "
          "count is of those with something that is no trit.");
    m.def("cuda_round_block", &cuda_round_block, py::arg("block"), py::arg("grid"), py::arg("stream"),
          "Round one block of columns with feedback on the device; fields and raw pointers as in qmoe/cuda.h.");
    m.def("cuda_ternary_sums", &cuda_ternary_sums, py::arg("fields"), py::arg("stream"),
          "Sums per row and counts per matrix of ternary codes on the device; fields as in qmoe/cuda.h.");
    m.def("cuda_choose_grid", &cuda_choose_grid, py::arg("target"), py::arg("grid"), py::arg("stream"),
          "Choose the int grid of one group of columns on the device; fields and raw pointers as in qmoe/cuda.h.");
}

}  // namespace qmoe::bind
