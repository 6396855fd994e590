// The CUDA library, libqmoe_cuda: opened at run time through qmoe/cuda_library.h, so that programs start without a
// driver.
//
// Every launch takes raw device pointers and a stream from the caller, allocates nothing, does not synchronise and can
// be captured in a CUDA graph. Unsupported arguments give a Status that says which and why.
#pragma once

#include <cstddef>
#include <cstdint>

#include "qmoe/format.h"
#include "qmoe/status.h"

namespace qmoe::cuda {

inline constexpr uint32_t kApiVersion = 2;

enum class OutputType : uint8_t { kFloat32, kFloat16, kBfloat16 };

struct DeviceInfo {
    char name[256];
    int compute_capability;  // 10 * major + minor
    int multiprocessors;
    uint64_t memory_bytes;
};

// One matrix of a record whose bytes lie in device memory. The tables are read on the host (qmoe/record.h), where they
// were checked.
struct DeviceMatrix {
    uint8_t spec[kSpecBytes];  // host copy
    const uint8_t* data;       // device: the entry's bytes, 16-byte aligned
    uint64_t bytes;
    uint64_t rows, cols;            // N, K
    const uint32_t* ternary_table;  // device: 4096 entries from ternary_decoding_table(); null for int
};

inline constexpr uint32_t kMaxRoundColumns = 128;

// One block of columns of a stack of E matrices (N, K), rounded with feedback. All pointers are device pointers; weight,
// residual and codes point at the block's first column, and share their strides (in elements; columns are neighbours).
struct RoundBlock {
    uint32_t experts, rows, columns;  // columns: of the block, at most kMaxRoundColumns
    uint64_t expert_stride, row_stride;
    const float* weight;
    float* residual;            // weight - quantized: read, then replaced
    uint8_t* codes;             // written: uint8 codes, or int8 trits
    const float* target;        // (E, N, columns)
    const float* coefficients;  // what column k takes of a change of column j < k: row j, column k
    uint64_t coefficient_expert_stride, coefficient_row_stride, coefficient_column_stride;
    const float* precision;  // (E, columns): weight of a squared error; ternary only
    uint64_t precision_stride;
    bool ternary;
    // int: scale and zero (E, N, groups), column c of the matrix in group c / width; codes 0 to top. `first`: the block's
    // first column.
    const float *scale, *zero;
    uint32_t groups, width, top, first;
    // ternary: levels and the price of a bit (E, N), bits of the codes -1, 0, 1 (E, 3).
    const float *low, *high, *price, *bits;
};

// The grid of one group of columns of every row with the least weighted error, among `steps` widths.
struct ChooseGrid {
    uint32_t experts, rows, columns;  // columns: of the group, at most 128
    const float* target;              // row r of all E * N at target + r * target_row_stride
    uint64_t target_row_stride;
    const float* precision;  // (E, columns)
    uint64_t precision_stride;
    float *scale, *zero;  // (E, N, groups), of which `group` is written
    uint32_t groups, group, top, steps;
    uint32_t scale_type;  // 1 float16, 2 bfloat16, 3 float32
    bool zero_point, half_step;
};

// Ternary codes of whole matrices without feedback, and what levels and bits are fitted from.
struct TernarySums {
    uint32_t experts, rows, columns;
    const float *weight, *precision;         // (E, N, K), (E, K)
    const float *low, *high, *price, *bits;  // as in RoundBlock
    float* sums;       // (E, N, 4), written: low's sum of precision * weight and of precision, then high's
    uint32_t* counts;  // (E, 3), added to: how many codes are -1, 0, 1
};

// The function table that libqmoe_cuda exports as qmoe_cuda_api().
struct Api {
    uint32_t version;
    Status (*device_count)(int* count) noexcept;
    Status (*device_info)(int device, DeviceInfo* info) noexcept;
    // out (N, K) row-major of `type`, on the device.
    Status (*dequantize)(const DeviceMatrix& matrix, void* out, OutputType type, void* stream) noexcept;
    Status (*round_block)(const RoundBlock& block, void* stream) noexcept;
    Status (*choose_grid)(const ChooseGrid& grid, void* stream) noexcept;
    Status (*ternary_sums)(const TernarySums& sums, void* stream) noexcept;
};

}  // namespace qmoe::cuda

extern "C" const qmoe::cuda::Api* qmoe_cuda_api() noexcept;
