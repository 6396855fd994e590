// The CUDA library, libqmoe_cuda: opened at run time through qmoe/cuda_library.h, so that programs start without a
// driver.
//
// Every launch takes raw device pointers and a stream from the caller, allocates nothing, does not synchronise and can
// be captured in a CUDA graph. Unsupported arguments give a Status that says which and why.
#pragma once

#include <cstddef>
#include <cstdint>

#include "qmoe/cuda_library.h"
#include "qmoe/format.h"
#include "qmoe/gptq.h"
#include "qmoe/prepacked.h"
#include "qmoe/status.h"

namespace qmoe::cuda {

inline constexpr uint32_t kApiVersion = 9;

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

// The `int` matrices of one projection of a layer's experts (one of a linear layer), in the layout of the products.
struct IntStack {
    uint8_t spec[kSpecBytes];  // host copy; the same for all experts
    const void* tiles;         // device: expert by expert what prepack made of them, 16-byte aligned
    uint64_t experts;
    uint64_t rows, cols;  // N, K
    RowOrder order;       // that it was prepacked with
};

// The `ternary` matrices of one projection, or of a linear layer, as ternary_streams() of qmoe/cuda_library.h made them.
struct TernaryStack {
    const void* streams;  // device, 16-byte aligned
    uint64_t experts;
    StreamsShape shape;
    RowOrder order;  // of the matrices' rows
};

// Tiles and streams must have been written before the kernel before this one began (as those of a model are): on devices
// that can, kernels begin to read them before that one has ended.

// Which kernel of several: for few tokens, that reads weights again for every few of them, or for many, that makes them
// operands of tensor cores once for up to 256. kAuto: the one for few up to 4, 8 or 16 tokens of a linear layer, or up to 4 to
// 8 of an expert on average, as its matrices are, and kMostChoices of all; else the one for many.
enum class Kernel : uint8_t { kAuto, kFewTokens, kManyTokens };

// y (tokens, rows) = x (tokens, cols) times the transpose of a stack's one matrix, plus bias (rows) where it is not null;
// all row-major, of `type` (float16 or bfloat16), 2-byte aligned at least, on the device. Sums are float32 in a fixed
// order. Few tokens are taken 16 at a time, of ternary matrices 4 where more have no room in shared memory; many need a
// `workspace` of int_linear_workspace() or ternary_linear_workspace() bytes, 16-byte aligned. Of many tokens int weights are
// rounded to `type`, and so are their scales, except those of whole rows; scales from 2^47 on overflow in bfloat16 then, and
// those below 2^-73 lose digits. Of few tokens (of ternary matrices 5 and more) bfloat16 activations from 2^64 on overflow.
template <typename Stack>
struct Linear {
    Stack weight;  // kPlain
    const void *x, *bias;
    void* y;
    uint64_t tokens;
    OutputType type;
    Kernel kernel;
    void* workspace;
    uint64_t workspace_bytes;
};

// What the experts of a layer do between their projections; as ExpertsSpec in qmoe/prepacked.h.
struct Gate {
    Activation activation;
    bool clamped;
    float alpha, limit;
};

// A layer's experts: y[t] = sum over j of weights[t, j] * second_e(gate(first_e(x[t]))), e = ids[t, j].
//
//   first    (E, 2 I, H) in kHalves or kInterleaved, or (E, I, H) kPlain where there is no gate
//   second   (E, H, I) kPlain
//   x, y     (tokens, H) of `type`, float16 or bfloat16
//   ids      (tokens, top_k) int64; ids outside [0, E) add nothing (other ranks' experts)
//   weights  (tokens, top_k) of weights_type
//   biases   (E, 2 I or I) and (E, H) of `type`, or null
//   workspace  int_workspace() or ternary_workspace() bytes, 16-byte aligned
//
// Each token's experts are added in the order of its choices, in float32; of many tokens, what each adds is rounded to
// `type` before. Few tokens are one launch, or three where the two projections differ in bits or groups; many are two
// launches, or three, and of ternary matrices one and two more for every 512 MiB that they have at two bits a weight.
template <typename Stack>
struct Experts {
    Stack first, second;
    const void *x, *weights, *first_bias, *second_bias;
    const int64_t* ids;
    void *y, *workspace;
    uint64_t tokens, top_k, workspace_bytes;
    OutputType type, weights_type;
    Gate gate;
    Kernel kernel;
};

using IntLinear = Linear<IntStack>;
using IntExperts = Experts<IntStack>;
using TernaryLinear = Linear<TernaryStack>;
using TernaryExperts = Experts<TernaryStack>;

// Ternary matrices to be encoded on the device as one spec says (FORMAT.md), bit for bit as the CPU does; the spec is to be
// theirs, ternary_spec() of qmoe/cuda_library.h. Two calls: ternary_code() finds out how many words each matrix's payload
// has, the last of its offsets, and ternary_words() writes them, behind each other from each matrix's first word on.
//
// E_UNKNOWN, E_SHAPE and E_LIMIT: of no spec, or of one that does not cut matrices of this shape. Whether a spec of the same
// shape is of other matrices only the trits tell: `misfits` counts what cannot be coded. Where it is not 0 the words are
// worth nothing.
struct TernaryEncode {
    uint8_t spec[kSpecBytes];
    const int8_t* trits;  // device: (matrices, rows, cols), -1, 0 or 1
    uint64_t matrices, rows, cols;
    const void* tables;           // device: ternary_encoding_tables() of qmoe/cuda_library.h, of this spec
    uint32_t* offsets;            // device, out: (matrices, blocks + 1), as stored
    uint32_t* misfits;            // device, out: by matrix, symbols without slots, or with something that is no trit
    uint16_t* words;              // device, out
    const uint64_t* first_words;  // device: by matrix
    void* scratch;                // device, 8-byte aligned: the same for both calls
    uint64_t scratch_bytes;       // ternary_scratch() at least
};

// Choices (tokens * top_k) that a call for experts may have, by the kernel for few and for many.
inline constexpr uint64_t kMostChoices = 1024, kMostChoicesOfMany = 65535;

// The function table that libqmoe_cuda exports as qmoe_cuda_api().
struct Api {
    uint32_t version;
    Status (*device_count)(int* count) noexcept;
    Status (*device_info)(int device, DeviceInfo* info) noexcept;
    // out (N, K) row-major of `type`, on the device.
    Status (*dequantize)(const DeviceMatrix& matrix, void* out, OutputType type, void* stream) noexcept;
    // The run-time layout of an `int` matrix (cuda/int/tiles.h): its bytes, and it. E_NO_KERNEL for groups of 16 columns
    // and float32 scales; E_SHAPE for an odd number of rows in a gated order.
    Status (*prepacked_bytes)(const DeviceMatrix& matrix, uint64_t* bytes) noexcept;
    Status (*prepack)(const DeviceMatrix& matrix, RowOrder order, void* out, uint64_t out_bytes, void* stream) noexcept;
    // out (N, K) row-major of `type`, in the record's order of rows, from the tiles of a stack's first matrix.
    Status (*unpack)(const IntStack& matrix, void* out, OutputType type, void* stream) noexcept;
    // Bytes for the kernel that the call gets; 0 where that needs none.
    Status (*int_linear_workspace)(const IntLinear& linear, uint64_t* bytes) noexcept;
    Status (*int_linear)(const IntLinear& linear, void* stream) noexcept;
    Status (*int_workspace)(const IntExperts& experts, uint64_t* bytes) noexcept;
    Status (*int_experts)(const IntExperts& experts, void* stream) noexcept;
    // The same for ternary matrices; what is unpacked are experts first .. first + count - 1, out (count, N, K). E_NO_KERNEL
    // for more columns than a block's shared memory holds activations of.
    Status (*ternary_unpack)(const TernaryStack& stack, uint64_t first, uint64_t count, void* out, OutputType type,
                             void* stream) noexcept;
    // Bytes for the kernel that the call gets; 0 where that needs none.
    Status (*ternary_linear_workspace)(const TernaryLinear& linear, uint64_t* bytes) noexcept;
    Status (*ternary_linear)(const TernaryLinear& linear, void* stream) noexcept;
    Status (*ternary_workspace)(const TernaryExperts& experts, uint64_t* bytes) noexcept;
    Status (*ternary_experts)(const TernaryExperts& experts, void* stream) noexcept;
    // counts (29) on the device: symbols of all rows by class, the first one's left 0, and behind them how many have
    // something that is no trit.
    Status (*ternary_census)(const int8_t* trits, uint64_t rows, uint64_t cols, uint64_t* counts,
                             void* stream) noexcept;
    // Bytes, of which spec, matrices, rows and cols decide: about one a weight.
    Status (*ternary_scratch)(const TernaryEncode& encode, uint64_t* bytes) noexcept;
    Status (*ternary_code)(const TernaryEncode& encode, void* stream) noexcept;
    Status (*ternary_words)(const TernaryEncode& encode, void* stream) noexcept;
    // The inner loops of qmoe/gptq.h, with pointers to device memory; groups have at most kMaxBlockColumns columns.
    Status (*round_block)(const RoundBlock& block, void* stream) noexcept;
    Status (*choose_grid)(const ChooseGrid& grid, void* stream) noexcept;
    Status (*ternary_sums)(const TernarySums& sums, void* stream) noexcept;
};

}  // namespace qmoe::cuda

extern "C" const qmoe::cuda::Api* qmoe_cuda_api() noexcept;
