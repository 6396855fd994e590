// The CUDA library, libqmoe_cuda: opened at run time through qmoe/cuda_library.h, so that programs start without a
// driver.
//
// Every launch takes raw device pointers and a stream from the caller, allocates nothing, does not synchronise and can
// be captured in a CUDA graph. Unsupported arguments give a Status that says which and why.
#pragma once

#include <cstddef>
#include <cstdint>

#include "qmoe/format.h"
#include "qmoe/gptq.h"
#include "qmoe/status.h"

namespace qmoe::cuda {

inline constexpr uint32_t kApiVersion = 3;

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

// y (tokens, rows) = x (tokens, cols) times the transpose of an `int` matrix, plus bias (rows) where it is not null; all
// row-major, of `type` (float16 or bfloat16), 2-byte aligned at least, on the device. Sums are float32 in a fixed order.
struct IntLinear {
    uint8_t spec[kSpecBytes];  // host copy of the matrix's
    const void* tiles;         // device: what prepack made of it, 16-byte aligned
    uint64_t rows, cols;       // N, K
    const void *x, *bias;
    void* y;
    uint64_t tokens;
    OutputType type;
    uint32_t team;  // warps that share 16 rows at most: 1, 2, 4, 8, 16, 32, or 0 to have it chosen
};

// The function table that libqmoe_cuda exports as qmoe_cuda_api().
struct Api {
    uint32_t version;
    Status (*device_count)(int* count) noexcept;
    Status (*device_info)(int device, DeviceInfo* info) noexcept;
    // out (N, K) row-major of `type`, on the device.
    Status (*dequantize)(const DeviceMatrix& matrix, void* out, OutputType type, void* stream) noexcept;
    // The run-time layout of an `int` matrix (cuda/int/tiles.h): its bytes, and it. E_NO_KERNEL for groups of 16 columns
    // and float32 scales.
    Status (*prepacked_bytes)(const DeviceMatrix& matrix, uint64_t* bytes) noexcept;
    Status (*prepack)(const DeviceMatrix& matrix, void* out, uint64_t out_bytes, void* stream) noexcept;
    Status (*int_linear)(const IntLinear& linear, void* stream) noexcept;
    // The inner loops of qmoe/gptq.h, with pointers to device memory; groups have at most kMaxBlockColumns columns.
    Status (*round_block)(const RoundBlock& block, void* stream) noexcept;
    Status (*choose_grid)(const ChooseGrid& grid, void* stream) noexcept;
    Status (*ternary_sums)(const TernarySums& sums, void* stream) noexcept;
};

}  // namespace qmoe::cuda

extern "C" const qmoe::cuda::Api* qmoe_cuda_api() noexcept;
