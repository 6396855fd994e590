// The CUDA library as Python sees it. Device pointers come from torch; nothing here needs a GPU to be present.
#include "qmoe/cuda.h"

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

py::array_t<uint32_t> ternary_table(const Bytes& record_bytes, uint64_t expert) {
    const Record record = open_record_with(record_bytes, true, expert);
    py::array_t<uint32_t> table(4096);
    check(cuda::ternary_decoding_table(record.matrix(expert).spec, {table.mutable_data(), 4096}));
    return table;
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

void cuda_dequantize(const Bytes& record_bytes, uint64_t expert, uintptr_t record_on_device, uintptr_t table,
                     uintptr_t out, const std::string& dtype, uintptr_t stream) {
    const Record record = open_record_with(record_bytes, true, expert);
    cuda::DeviceMatrix matrix = device_matrix(record, expert, record_on_device);
    matrix.ternary_table = reinterpret_cast<const uint32_t*>(table);
    check(required_library().dequantize(matrix, reinterpret_cast<void*>(out), type_of(dtype),
                                        reinterpret_cast<void*>(stream)));
}

// An int matrix in the layout of the CUDA products: what is known of it on the host. Its bytes are the caller's.
struct CudaInt {
    cuda::DeviceMatrix matrix;
    uint64_t bytes = 0, data_at = 0;

    CudaInt(const Bytes& record_bytes, uint64_t expert) {
        const Record record = open_record_with(record_bytes, true, expert);
        matrix = device_matrix(record, expert, 0);
        matrix.data = nullptr;
        data_at = record.entries()[expert].offset;
        check(required_library().prepacked_bytes(matrix, &bytes));
    }

    void prepack(uintptr_t record_on_device, uintptr_t out, uint64_t out_bytes, uintptr_t stream) const {
        cuda::DeviceMatrix there = matrix;
        there.data = reinterpret_cast<const uint8_t*>(record_on_device) + data_at;
        check(required_library().prepack(there, reinterpret_cast<void*>(out), out_bytes,
                                         reinterpret_cast<void*>(stream)));
    }

    void linear(uintptr_t tiles, uintptr_t x, uintptr_t bias, uintptr_t y, uint64_t tokens, const std::string& dtype,
                uintptr_t stream, uint32_t team) const {
        cuda::IntLinear call{};
        std::copy(std::begin(matrix.spec), std::end(matrix.spec), call.spec);
        call.tiles = reinterpret_cast<const void*>(tiles);
        call.rows = matrix.rows;
        call.cols = matrix.cols;
        call.x = reinterpret_cast<const void*>(x);
        call.bias = reinterpret_cast<const void*>(bias);
        call.y = reinterpret_cast<void*>(y);
        call.tokens = tokens;
        call.type = type_of(dtype);
        call.team = team;
        check(required_library().int_linear(call, reinterpret_cast<void*>(stream)));
    }
};

void cuda_round_block(const py::dict& block, const py::dict& grid, uintptr_t stream) {
    check(required_library().round_block(round_block_of(block, grid), reinterpret_cast<void*>(stream)));
}

void cuda_choose_grid(const py::dict& target, const py::dict& grid, uintptr_t stream) {
    check(required_library().choose_grid(choose_grid_of(target, grid), reinterpret_cast<void*>(stream)));
}

void cuda_ternary_sums(const py::dict& fields, uintptr_t stream) {
    check(required_library().ternary_sums(ternary_sums_of(fields), reinterpret_cast<void*>(stream)));
}

}  // namespace

void bind_cuda(py::module_& m) {
    m.def("cuda_info", &cuda_info, "Whether libqmoe_cuda could be opened, the devices it sees, and if not why.");
    m.def("ternary_table", &ternary_table, py::arg("record"), py::arg("expert"),
          "The decoding table of a ternary matrix, uint32 (4096,), as the CUDA kernels want it in device memory.");
    m.def("cuda_dequantize", &cuda_dequantize, py::arg("record"), py::arg("expert"), py::arg("record_on_device"),
          py::arg("table"), py::arg("out"), py::arg("dtype"), py::arg("stream"),
          "Decode one expert of a record whose bytes also lie on the device into out (N, K). Pointers and the stream "
          "are raw.");
    py::class_<CudaInt>(m, "CudaInt", "An int expert of a record as the CUDA products read it. Pointers are raw.")
        .def(py::init<const Bytes&, uint64_t>(), py::arg("record"), py::arg("expert"))
        .def_readonly("bytes", &CudaInt::bytes, "What the layout takes on the device.")
        .def("prepack", &CudaInt::prepack, py::arg("record_on_device"), py::arg("out"), py::arg("out_bytes"),
             py::arg("stream"), "Fill `out` from the record's bytes on the device.")
        .def("linear", &CudaInt::linear, py::arg("tiles"), py::arg("x"), py::arg("bias"), py::arg("y"),
             py::arg("tokens"), py::arg("dtype"), py::arg("stream"), py::arg("team") = 0,
             "y (tokens, N) = x (tokens, K) times the prepacked matrix; see IntLinear in qmoe/cuda.h.");
    m.def("cuda_round_block", &cuda_round_block, py::arg("block"), py::arg("grid"), py::arg("stream"),
          "Round one block of columns with feedback on the device; fields and raw pointers as in qmoe/cuda.h.");
    m.def("cuda_ternary_sums", &cuda_ternary_sums, py::arg("fields"), py::arg("stream"),
          "Sums per row and counts per matrix of ternary codes on the device; fields as in qmoe/cuda.h.");
    m.def("cuda_choose_grid", &cuda_choose_grid, py::arg("target"), py::arg("grid"), py::arg("stream"),
          "Choose the int grid of one group of columns on the device; fields and raw pointers as in qmoe/cuda.h.");
}

}  // namespace qmoe::bind
