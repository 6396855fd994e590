// All of pybind11: converts arguments, calls the core, turns a Status into qmoe_core.errors.QmoeError. Decides nothing
// else.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <thread>
#include <vector>

#include "bind.h"
#include "qmoe/crc32c.h"
#include "qmoe/matmul.h"
#include "qmoe/quantize.h"
#include "qmoe/record.h"

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace py = pybind11;

namespace qmoe::bind {

[[noreturn]] void raise(Code code, const std::string& what, py::dict where) {
    const py::object type = py::module_::import("qmoe_core.errors").attr("QmoeError");
    const py::object error = type(code_name(code), what, **where);
    PyErr_SetObject(type.ptr(), error.ptr());
    throw py::error_already_set();
}

void check(const Status& status, py::dict where) {
    if (status.ok()) return;
    where["offset"] = status.offset;
    if (status.has_values) {
        where["expected"] = status.expected;
        where["actual"] = status.actual;
    }
    raise(status.code, status.what, std::move(where));
}

std::span<const uint8_t> bytes_of(const Bytes& array) {
    if (array.ndim() != 1) raise(Code::kShape, "packed bytes must be one-dimensional");
    return {array.data(), static_cast<size_t>(array.size())};
}

Bytes to_array(std::vector<uint8_t>&& bytes) {
    auto* kept = new std::vector<uint8_t>(std::move(bytes));
    const py::capsule owner(kept, [](void* p) { delete static_cast<std::vector<uint8_t>*>(p); });
    return Bytes(static_cast<py::ssize_t>(kept->size()), kept->data(), owner);
}

int threads_of(int threads) {
    return threads > 0 ? threads : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

Record open_record(const Bytes& bytes, bool check_crc) {
    Record record;
    const auto span = bytes_of(bytes);
    Status status;
    {
        const py::gil_scoped_release release;
        status = Record::open(span, record, check_crc);
    }
    check(status);
    return record;
}

Record open_record_with(const Bytes& bytes, bool check_crc, uint64_t expert) {
    Record record = open_record(bytes, check_crc);
    check(record.decode_rows(expert, 0, 0, nullptr));  // no rows: only the index is looked at
    return record;
}

namespace {

template <class T>
using Matrix = py::array_t<T, py::array::c_style>;

template <class T>
Matrix<T> matrix_argument(const py::handle& object, const char* name) {
    if (!py::isinstance<py::array_t<T>>(object))
        raise(Code::kDtype, std::string(name) + ": wrong element type, or not an array");
    auto array = Matrix<T>::ensure(object);
    if (!array || array.ndim() != 2) raise(Code::kShape, std::string(name) + " must be a two-dimensional array");
    return array;
}

template <class T>
std::span<const T> span_of(const Matrix<T>& array) {
    return {array.data(), static_cast<size_t>(array.size())};
}

ScaleType scale_type(const std::string& name) {
    if (name == "float16") return ScaleType::kFloat16;
    if (name == "bfloat16") return ScaleType::kBfloat16;
    if (name == "float32") return ScaleType::kFloat32;
    raise(Code::kUnknown, "scale dtype must be float16, bfloat16 or float32, not " + name);
}

const char* scale_name(uint8_t type) {
    return type == 1 ? "float16" : type == 2 ? "bfloat16" : "float32";
}

uint32_t checked_group(int64_t group) {
    if (group < 0 || group > int64_t{kMaxDim})
        raise(Code::kValue, "group must be 0 (the whole row) or a number of columns");
    return static_cast<uint32_t>(group);
}

py::tuple rtn_int(const py::object& weight_object, uint32_t bits, int64_t group_argument, bool zero_point,
                  const std::string& dtype, bool half_step) {
    const auto weight = matrix_argument<float>(weight_object, "weight");
    const uint32_t group = checked_group(group_argument);
    const ScaleType type = scale_type(dtype);
    const auto rows = static_cast<uint64_t>(weight.shape(0)), cols = static_cast<uint64_t>(weight.shape(1));
    if (rows == 0 || cols == 0) raise(Code::kShape, "weight is empty");
    const uint64_t groups = group == 0 ? 1 : (cols + group - 1) / group;
    py::array_t<uint8_t> codes({rows, cols}), zeros({rows, zero_point ? groups : 0});
    py::array_t<float> scales({rows, groups});
    Status status;
    {
        uint8_t* const codes_out = codes.mutable_data();
        float* const scales_out = scales.mutable_data();
        const std::span<uint8_t> zeros_out(zeros.mutable_data(), static_cast<size_t>(zeros.size()));
        const float* const in = weight.data();
        const py::gil_scoped_release release;
        status = quantize_rtn(in, rows, cols, bits, group, type, half_step, codes_out, scales_out, zeros_out);
    }
    check(status);
    return py::make_tuple(codes, scales, zero_point ? py::object(zeros) : py::object(py::none()));
}

// Keeps the arrays of one matrix alive while the encoder reads them.
struct HeldMatrix {
    Matrix<uint8_t> codes, zeros;
    Matrix<float> scales, levels;
    Matrix<int8_t> trits;
};

py::object field(const py::dict& matrix, const char* name) {
    if (!matrix.contains(name)) raise(Code::kMissing, std::string("matrix has no field ") + name);
    return matrix[name];
}

MatrixInput matrix_input(const py::dict& matrix, uint64_t rows, uint64_t cols, HeldMatrix& held) {
    MatrixInput in;
    in.rows = rows;
    in.cols = cols;
    const auto format = field(matrix, "format").cast<std::string>();
    for (const Format* known : formats())
        if (format == known->name) in.format = known->id;
    if (format == "int") {
        in.bits = field(matrix, "bits").cast<uint8_t>();
        in.group = checked_group(field(matrix, "group").cast<int64_t>());
        in.scale_dtype = static_cast<uint8_t>(scale_type(field(matrix, "scale_dtype").cast<std::string>()));
        in.codes = span_of(held.codes = matrix_argument<uint8_t>(field(matrix, "codes"), "codes"));
        in.scales = span_of(held.scales = matrix_argument<float>(field(matrix, "scales"), "scales"));
        if (const py::object zeros = field(matrix, "zeros"); !zeros.is_none())
            in.zeros = span_of(held.zeros = matrix_argument<uint8_t>(zeros, "zeros"));
        in.half_step = matrix.contains("half_step") && matrix["half_step"].cast<bool>();
    } else if (format == "ternary") {
        in.trits = span_of(held.trits = matrix_argument<int8_t>(field(matrix, "trits"), "trits"));
        in.levels = span_of(held.levels = matrix_argument<float>(field(matrix, "levels"), "levels"));
    } else {
        raise(Code::kUnknown, "unknown format " + format);
    }
    return in;
}

Bytes py_build_record(uint64_t rows, uint64_t cols, const std::vector<py::dict>& matrices, int threads) {
    threads = threads_of(threads);
    std::vector<HeldMatrix> held(matrices.size());
    std::vector<MatrixInput> inputs;
    inputs.reserve(matrices.size());
    for (size_t e = 0; e < matrices.size(); ++e) inputs.push_back(matrix_input(matrices[e], rows, cols, held[e]));
    std::vector<uint8_t> out;
    Status status;
    {
        const py::gil_scoped_release release;
        status = build_record(inputs, out, threads);
    }
    check(status);
    return to_array(std::move(out));
}

py::dict describe_spec(std::span<const uint8_t, kSpecBytes> spec, const Format& format) {
    py::dict out;
    out["format"] = format.name;
    if (std::string(format.name) == "int") {
        out["bits"] = spec[2];
        out["scale_dtype"] = scale_name(spec[3]);
        out["zero_point"] = (spec[4] & 1) != 0;
        out["half_step"] = (spec[4] & 2) != 0;
        out["group"] = spec[8] | spec[9] << 8 | spec[10] << 16 | spec[11] << 24;
    } else {
        out["levels"] = spec[2] == 1 ? "symmetric" : "pair";
        out["segments"] = spec[3];
        out["rows_per_lane"] = spec[4] | spec[5] << 8;
        out["level_bits"] = py::make_tuple(spec[70], spec[71]);  // high, low
    }
    return out;
}

py::dict inspect_record(const Bytes& bytes, bool verify) {
    const Record record = open_record(bytes, true);
    if (verify) {
        Status status;
        {
            const py::gil_scoped_release release;
            status = record.verify();
        }
        check(status);
    }
    py::list specs, entries;
    for (size_t s = 0; s < record.spec_count(); ++s)
        specs.append(describe_spec(record.spec(s), record.format_of_spec(s)));
    for (const RecordEntry& entry : record.entries()) {
        py::dict e;
        e["spec"] = entry.spec;
        e["offset"] = entry.offset;
        e["bytes"] = entry.bytes;
        e["crc32c"] = entry.crc32c;
        entries.append(std::move(e));
    }
    py::dict out;
    out["version"] = kRecordVersion;
    out["experts"] = record.experts();
    out["rows"] = record.rows();
    out["cols"] = record.cols();
    out["bytes"] = record.bytes().size();
    out["specs"] = specs;
    out["entries"] = entries;
    return out;
}

py::array_t<float> decode_record(const Bytes& bytes, uint64_t expert, bool check_crc) {
    // Checked before the output exists: a refused index must not cost memory.
    const Record record = open_record_with(bytes, check_crc, expert);
    py::array_t<float> out({record.rows(), record.cols()});
    float* const data = out.mutable_data();
    Status status;
    {
        const py::gil_scoped_release release;
        status = record.decode_rows(expert, 0, record.rows(), data);
    }
    check(status);
    return out;
}

Bytes slice_experts(const Bytes& bytes, uint64_t first, uint64_t count) {
    std::vector<uint8_t> out;
    check(open_record(bytes, true).slice_experts(first, count, out));
    return to_array(std::move(out));
}

py::tuple py_join_records(const std::vector<Bytes>& parts) {
    std::vector<Record> records;
    std::vector<uint64_t> starts;
    for (const Bytes& part : parts) {
        records.push_back(open_record(part, false));
        starts.push_back(records.back().entries().front().offset);
    }
    std::vector<uint8_t> head;
    check(join_records(records, head));
    return py::make_tuple(to_array(std::move(head)), starts);
}

bool release_memory() {
#if defined(__GLIBC__)
    const py::gil_scoped_release release;
    malloc_trim(0);
    return true;
#else
    return false;
#endif
}

py::list isa_names() {
    py::list names;
    for (const char* name : available_isas()) names.append(name);
    return names;
}

}  // namespace
}  // namespace qmoe::bind

PYBIND11_MODULE(_C, m) {
    using namespace qmoe::bind;
    m.doc() = "The C++ core of qmoe_core. Raw: use qmoe_core.formats and qmoe_core.runtime.";
    m.def("rtn_int", &rtn_int, py::arg("weight"), py::arg("bits"), py::arg("group"), py::arg("zero_point") = true,
          py::arg("scale_dtype") = "float16", py::arg("half_step") = false,
          "Round float32 (N, K) to nearest -> codes uint8 (N, K), scales float32 (N, G), zeros uint8 (N, G) or None.");
    m.def(
        "build_record", &py_build_record, py::arg("rows"), py::arg("cols"), py::arg("matrices"), py::arg("threads") = 0,
        "Encode a stack of matrices (N, K) into a packed record, uint8 (bytes,); threads 0: all that may be used. The "
        "bytes do not depend on it.");
    m.def("inspect_record", &inspect_record, py::arg("record"), py::arg("verify") = false,
          "Header, specs and entries of a record; checks structure and CRCs, with verify also decodes everything.");
    m.def("decode_record", &decode_record, py::arg("record"), py::arg("expert"), py::arg("check_crc") = true,
          "One expert as float32 (N, K), by the scalar decoder.");
    m.def("slice_experts", &slice_experts, py::arg("record"), py::arg("first"), py::arg("count"),
          "A record of experts [first, first + count).");
    m.def(
        "join_records", &py_join_records, py::arg("records"),
        "Of one record of the experts of several, in order: what stands before the matrices, and where those begin in "
        "each of the several. CRCs are not checked.");
    m.def(
        "crc32c",
        [](const Bytes& bytes, uint32_t seed) {
            const auto span = bytes_of(bytes);
            const py::gil_scoped_release unlocked;
            return qmoe::crc32c(span, seed);
        },
        py::arg("bytes"), py::arg("seed") = 0, "CRC-32C of uint8 (bytes,).");
    m.def("cpu_features", &isa_names, "Instruction sets with kernels on this machine, best first.");
    m.def("release_memory", &release_memory,
          "Give free memory back to the system, also where it lies between blocks that are in use. False where the C "
          "library cannot.");
    m.def(
        "version", [] { return QMOE_VERSION; }, "Version of the core.");
    bind_cuda(m);
    bind_gptq(m);
    bind_kernels(m);
    bind_safetensors(m);
}
