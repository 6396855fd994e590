// `ternary` to floats: one warp per block of the format, one thread per lane, all lanes in step.
//
// The lanes share one sequence of 16-bit words. Which lanes want a word is one ballot; a lane's word is as far behind
// the first as there are lower lanes that want one. The table of 4096 states sits in shared memory.
#include "common.cuh"
#include "formats/ternary.h"

namespace qmoe::cuda {
namespace {

constexpr uint32_t kWarps = 4;

struct WordReader {
    const uint16_t* words;
    uint32_t count, next;
    uint32_t buffer, available;

    // All lanes of the warp call this together; `wanted` is 0 for lanes that sit out. Words past the end are zero.
    __device__ uint32_t read(uint32_t wanted) {
        const bool need = available < wanted;
        const uint32_t askers = __ballot_sync(0xFFFFFFFFu, need);
        if (need) {
            const uint32_t at = next + __popc(askers & ((1u << (threadIdx.x % 32)) - 1));
            buffer |= (at < count ? uint32_t{words[at]} : 0u) << available;
            available += 16;
        }
        next += __popc(askers);
        const uint32_t bits = buffer & ((1u << wanted) - 1);
        buffer >>= wanted;
        available -= wanted;
        return bits;
    }
};

template <class T>
__global__ void __launch_bounds__(kWarps * 32)
    dequantize_ternary_kernel(TernaryLayout layout, const uint8_t* __restrict__ data,
                              const uint32_t* __restrict__ table_in, T* __restrict__ out) {
    __shared__ uint32_t table[kStates];
    for (uint32_t i = threadIdx.x; i < kStates; i += kWarps * 32) table[i] = table_in[i];
    __syncthreads();
    const uint64_t block = blockIdx.x * uint64_t{kWarps} + threadIdx.x / 32;
    if (block >= layout.blocks) return;
    const uint32_t lane = threadIdx.x % 32;
    const auto* offsets = reinterpret_cast<const uint32_t*>(data + layout.offsets_at);
    WordReader reader{reinterpret_cast<const uint16_t*>(data + layout.payload_at) + offsets[block],
                      offsets[block + 1] - offsets[block], 0, 0, 0};

    // First word: twelve bits of state, four of the stream. Lanes of rows that do not exist take no part.
    const bool used = layout.row(block, lane, 0) < layout.rows;
    const uint32_t first = reader.read(used ? 16 : 0);
    uint32_t state = first % kStates;
    reader.buffer = first / kStates;
    reader.available = used ? 16 - kStateBits : 0;

    const uint64_t first_col = layout.col(lane);
    for (uint32_t j = 0; j < layout.rows_per_lane && layout.row(block, 0, j) < layout.rows; ++j) {
        const uint64_t row = layout.row(block, lane, j);
        const bool live = row < layout.rows;
        const float high = live ? layout.high(data, row) : 0.0f, low = live ? layout.low(data, row) : 0.0f;
        for (uint64_t step = 0; step < layout.steps; ++step) {
            const uint32_t entry = live ? table[state] : 0;
            state = (entry >> 16 & (kStates - 1)) + reader.read(entry >> 12 & 15);
            uint32_t packed = entry % kStates;
            if (__any_sync(0xFFFFFFFFu, entry >> 28)) {
                const uint32_t raw = reader.read(entry >> 28 ? kRawBits : 0);
                if (entry >> 28) packed = raw;
            }
            const uint64_t col = first_col + step * kTrits;
            for (uint32_t i = 0; live && i < kTrits && col + i < layout.cols; ++i) {
                const uint32_t trit = packed >> (2 * i) & 3;
                out[row * layout.cols + col + i] = from_float<T>(trit == 1 ? high : trit == 2 ? low : 0.0f);
            }
        }
    }
}

}  // namespace

Status dequantize_ternary(const DeviceMatrix& matrix, void* out, OutputType type, cudaStream_t stream) noexcept {
    const TernaryLayout layout(matrix.spec, matrix.rows, matrix.cols);
    if (matrix.ternary_table == nullptr)
        return Status::error(Code::kMissing, "cuda: ternary needs its decoding table on the device");
    if (matrix.bytes < layout.payload_at)
        return Status::mismatch(Code::kShape, "cuda: ternary data is shorter than its tables", 0, layout.payload_at,
                                matrix.bytes);
    const auto grid = static_cast<uint32_t>(ceil_div(layout.blocks, kWarps));
    return with_output_type(type, [&](auto element) {
        using T = decltype(element);
        dequantize_ternary_kernel<T>
            <<<grid, kWarps * 32, 0, stream>>>(layout, matrix.data, matrix.ternary_table, static_cast<T*>(out));
        return launch_status();
    });
}

}  // namespace qmoe::cuda
