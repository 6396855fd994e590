// Packed weights in the layout that the CPU kernels read fastest, made once from a record, and multiplication by them.
//
// The layout (cpp/src/cpu/panels.h) is for this process and build; it is never stored. It holds int matrices in as many
// bits as the record does, and ternary ones in 2 bits a weight. Records whose memory matters more than time can be
// multiplied as they are: grouped_linear in qmoe/matmul.h.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "qmoe/matmul.h"
#include "qmoe/record.h"

namespace qmoe {

// How the rows of a gated projection's gate and up parts lie in the record. Panels of both then alternate, so that one
// thread has what an activation needs.
enum class RowOrder : uint8_t { kPlain, kHalves, kInterleaved };

// What activations are multiplied as. kInt8: int8 with a scale per token and group of at most 128 columns (relative error
// of a product typically 6e-3); what is between a layer's projections as the sum of two such terms, so that the layer's
// error is that of its first projection (typically 9e-3). kFloat: float32, exact up to rounding.
enum class Precision : uint8_t { kInt8, kFloat };

// One prepacked stack of matrices. Borrows the bytes, which must be aligned to 64.
class Prepacked {
  public:
    struct Expert;

    // Bytes that prepack() will write for `record`. Rows must be even in a gated order.
    static Status size(const Record& record, RowOrder order, uint64_t& bytes) noexcept;
    // Writes the layout of `record` to `out`, exactly size() bytes aligned to 64, on up to `threads` threads.
    static Status prepack(const Record& record, RowOrder order, std::span<uint8_t> out, int threads) noexcept;
    // Refuses bytes that prepack() of this build did not write (E_MAGIC, E_TRUNCATED, E_CHECKSUM). Costs a checksum of
    // the table, not of the weights.
    static Status open(std::span<const uint8_t> bytes, Prepacked& out) noexcept;

    uint64_t experts() const noexcept { return experts_; }
    uint64_t rows() const noexcept { return rows_; }
    uint64_t cols() const noexcept { return cols_; }
    RowOrder order() const noexcept { return order_; }
    const Expert& expert(uint64_t index) const noexcept;
    const uint8_t* data() const noexcept { return bytes_.data(); }

    // The weights of one expert as float32 (N, K), row-major, as they are multiplied with Precision::kFloat.
    Status dequantize(uint64_t expert, float* out) const noexcept;

  private:
    std::span<const uint8_t> bytes_;
    uint64_t experts_ = 0, rows_ = 0, cols_ = 0;
    RowOrder order_ = RowOrder::kPlain;
};

// y[t] = W_e x[t], as grouped_linear in qmoe/matmul.h. Deterministic: the result does not depend on `threads`, nor on
// how tokens are batched.
Status grouped_linear(const Prepacked& weights, const void* x, ActivationType type, uint64_t tokens,
                      std::span<const int64_t> offsets, void* y, Precision precision, int threads) noexcept;

enum class Activation : uint8_t { kSilu, kGelu, kGeluTanh, kRelu };

// What the experts of a layer do between and around their two projections.
struct ExpertsSpec {
    Activation activation = Activation::kSilu;
    bool gated = true;
    // gpt-oss: gate is clamped from above and up from both sides to `limit`; then (up + 1) * gate * sigmoid(alpha gate).
    bool clamped = false;
    float alpha = 1.702f, limit = 7.0f;
    const float* first_bias = nullptr;   // (E, N of the first projection), in the record's row order; may be null
    const float* second_bias = nullptr;  // (E, H); may be null
    Precision precision = Precision::kInt8;
};

// A layer's experts: out[t] = sum over j of weight[t, j] * down_e(act(gate_e(x[t])) * up_e(x[t])), e = ids[t, j].
//
//   first    gate and up (E, 2 I, H), in RowOrder kHalves or kInterleaved; (E, I, H) kPlain where there is no gate
//   second   down (E, H, I), kPlain
//   x, out   (tokens, H) of `type`
//   ids      (tokens, top_k); ids outside [0, E) add nothing (other ranks' experts)
//   weights  (tokens, top_k) float32
//
// Each token's experts are added in the order of its choices, in float32. E_SHAPE: the projections do not fit together.
Status experts(const Prepacked& first, const Prepacked& second, const ExpertsSpec& spec, const void* x,
               ActivationType type, uint64_t tokens, const int64_t* ids, const float* weights, uint64_t top_k,
               void* out, int threads) noexcept;

// What a machine is tuned by: it changes how fast products are, never their results. See `qmoe tune`.
struct Tuning {
    // Bytes that weights are asked for ahead of their use into the second-level cache, at most 1 MiB; none where the
    // processor does that better itself.
    uint32_t prefetch_narrow = 8192;  // of 2 and 3 bits and ternary ones
    uint32_t prefetch_wide = 4096;    // of 4 and 8 bits
    // Up to so many tokens of an expert read its packed lines, four at a time; for more, codes are unpacked once and kept
    // in the second-level cache. At most 1024. What a process starts with depends on the processor.
    uint32_t direct_tokens = 8;
    // The same distances into the first-level cache.
    uint32_t near_narrow = 0;
    uint32_t near_wide = 0;
};
Tuning tuning() noexcept;
// E_VALUE: out of range. Safe to call at any time from any thread.
Status set_tuning(const Tuning& values) noexcept;

}  // namespace qmoe
