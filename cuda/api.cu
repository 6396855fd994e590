#include "common.cuh"

namespace qmoe::cuda {
namespace {

Status device_count(int* count) noexcept {
    return runtime_status(cudaGetDeviceCount(count));
}

Status device_info(int device, DeviceInfo* info) noexcept {
    cudaDeviceProp properties;
    const Status status = runtime_status(cudaGetDeviceProperties(&properties, device));
    if (!status.ok()) return status;
    *info = {};
    for (size_t i = 0; i + 1 < sizeof info->name && properties.name[i] != 0; ++i) info->name[i] = properties.name[i];
    info->compute_capability = 10 * properties.major + properties.minor;
    info->multiprocessors = properties.multiProcessorCount;
    info->memory_bytes = properties.totalGlobalMem;
    return {};
}

Status dequantize(const DeviceMatrix& matrix, void* out, OutputType type, void* stream) noexcept {
    // The host has no device memory to read, so only what the spec and the sizes say can be checked here; the offsets
    // inside the matrix were checked when the record was opened.
    switch (matrix.spec[0] | matrix.spec[1] << 8) {
        case 1: return dequantize_int(matrix, out, type, static_cast<cudaStream_t>(stream));
        case 2: return dequantize_ternary(matrix, out, type, static_cast<cudaStream_t>(stream));
    }
    return Status::error(Code::kNoKernel, "cuda: no kernel for this format");
}

bool is_int(const uint8_t* spec) noexcept {
    return (spec[0] | spec[1] << 8) == 1;
}
Status only_int() noexcept {
    return Status::error(Code::kNoKernel, "cuda: products take int matrices");
}

Status prepacked_bytes(const DeviceMatrix& matrix, uint64_t* bytes) noexcept {
    return is_int(matrix.spec) ? int_tiles_bytes(matrix, bytes) : only_int();
}

Status prepack(const DeviceMatrix& matrix, RowOrder order, void* out, uint64_t out_bytes, void* stream) noexcept {
    if (!is_int(matrix.spec)) return only_int();
    return prepack_int(matrix, order, out, out_bytes, static_cast<cudaStream_t>(stream));
}

Status unpack(const IntStack& matrix, void* out, OutputType type, void* stream) noexcept {
    return is_int(matrix.spec) ? unpack_int(matrix, out, type, static_cast<cudaStream_t>(stream)) : only_int();
}

Status int_linear(const IntLinear& linear, void* stream) noexcept {
    return is_int(linear.weight.spec) ? linear_int(linear, static_cast<cudaStream_t>(stream)) : only_int();
}

Status int_experts(const IntExperts& experts, void* stream) noexcept {
    if (!is_int(experts.first.spec) || !is_int(experts.second.spec)) return only_int();
    return experts_int(experts, static_cast<cudaStream_t>(stream));
}

Status round_block_on(const RoundBlock& block, void* stream) noexcept {
    return round_block(block, static_cast<cudaStream_t>(stream));
}

Status choose_grid_on(const ChooseGrid& grid, void* stream) noexcept {
    return choose_grid(grid, static_cast<cudaStream_t>(stream));
}

Status ternary_sums_on(const TernarySums& sums, void* stream) noexcept {
    return ternary_sums(sums, static_cast<cudaStream_t>(stream));
}

Status ternary_unpack(const TernaryStack& stack, uint64_t first, uint64_t count, void* out, OutputType type,
                      void* stream) noexcept {
    return unpack_ternary(stack, first, count, out, type, static_cast<cudaStream_t>(stream));
}

Status ternary_linear(const TernaryLinear& linear, void* stream) noexcept {
    return linear_ternary(linear, static_cast<cudaStream_t>(stream));
}

Status ternary_experts(const TernaryExperts& experts, void* stream) noexcept {
    return experts_ternary(experts, static_cast<cudaStream_t>(stream));
}

Status ternary_census(const int8_t* trits, uint64_t rows, uint64_t cols, uint64_t* counts, void* stream) noexcept {
    return census_ternary(trits, rows, cols, counts, static_cast<cudaStream_t>(stream));
}

Status ternary_code(const TernaryEncode& encode, void* stream) noexcept {
    return code_ternary(encode, static_cast<cudaStream_t>(stream));
}

Status ternary_words(const TernaryEncode& encode, void* stream) noexcept {
    return words_ternary(encode, static_cast<cudaStream_t>(stream));
}

constexpr Api kApi{.version = kApiVersion,
                   .device_count = device_count,
                   .device_info = device_info,
                   .dequantize = dequantize,
                   .prepacked_bytes = prepacked_bytes,
                   .prepack = prepack,
                   .unpack = unpack,
                   .int_linear_workspace = linear_workspace_int,
                   .int_linear = int_linear,
                   .int_workspace = workspace_int,
                   .int_experts = int_experts,
                   .ternary_unpack = ternary_unpack,
                   .ternary_linear_workspace = linear_workspace_ternary,
                   .ternary_linear = ternary_linear,
                   .ternary_workspace = workspace_ternary,
                   .ternary_experts = ternary_experts,
                   .ternary_census = ternary_census,
                   .ternary_scratch = ternary_encode_scratch,
                   .ternary_code = ternary_code,
                   .ternary_words = ternary_words,
                   .round_block = round_block_on,
                   .choose_grid = choose_grid_on,
                   .ternary_sums = ternary_sums_on};

}  // namespace
}  // namespace qmoe::cuda

extern "C" __attribute__((visibility("default"))) const qmoe::cuda::Api* qmoe_cuda_api() noexcept {
    return &qmoe::cuda::kApi;
}
