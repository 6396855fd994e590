// `ternary` made on the device: the same bytes as the CPU's encoder makes (formats/ternary_encode.cpp).
//
// A warp takes a block of the format, a lane a lane of it. Lanes code their symbols from the last one backwards, and leave
// what every step's state gives off, and how many bits that is, for a second pass that goes forwards as a reader does: at
// each step the lanes that a reader's buffer would have run dry of hand out their next word, in order. Between the two
// lies a sum over blocks, which says where each one's words begin.
#include "formats/ternary.h"
#include "launch.cuh"

namespace qmoe::cuda {

namespace {

constexpr uint32_t kWarps = 8, kScanThreads = 256;
constexpr uint32_t kEscaped = 0x80;  // beside a count of bits

struct Encoder {
    TernaryLayout layout;
    const int8_t* trits;
    const TernaryEncodingTables* tables;
    uint32_t* offsets;  // by matrix and block
    uint16_t* words;
    const uint64_t* first_words;  // by matrix
    // By matrix, block, step and lane; `states` and word counts by matrix, block and lane.
    uint16_t *bits, *states;
    uint8_t* counts;
    uint64_t matrices, lane_steps;

    // Steps of a lane.
    __device__ __forceinline__ uint64_t steps_of(uint64_t block, uint32_t lane) const {
        const uint64_t rows = layout.rows_in_block(block), groups = kLanes / layout.segments,
                       group = lane / layout.segments;
        return rows > group ? (rows - group + groups - 1) / groups * layout.steps : 0;
    }
    __device__ __forceinline__ uint64_t at(uint64_t matrix, uint64_t block, uint64_t step, uint32_t lane) const {
        return ((matrix * layout.blocks + block) * lane_steps + step) * kLanes + lane;
    }
};

// What a warp works on, and its lane.
struct Place {
    uint32_t lane = threadIdx.x % kLanes;
    uint64_t unit = uint64_t{blockIdx.x} * kWarps + threadIdx.x / kLanes, matrix, block, steps;

    __device__ __forceinline__ explicit Place(const Encoder& e)
        : matrix(unit / e.layout.blocks), block(unit - matrix * e.layout.blocks), steps(e.steps_of(block, lane)) {}
};

// Six trits from column `col` on, those behind the last one zeros, as twelve bits; of what is no trit, the sign.
__device__ __forceinline__ uint32_t six_trits(const int8_t* row, uint64_t col, uint64_t cols) {
    uint32_t packed = 0;
#pragma unroll
    for (uint32_t i = 0; i < kTrits; ++i) {
        const int32_t trit = col + i < cols ? row[col + i] : 0;
        packed |= (trit < 0 ? 2u : trit > 0 ? 1u : 0u) << (2 * i);
    }
    return packed;
}

// How many symbols are of each class: of whole rows, which are cut only later. A trit that is none counts in the last one.
__global__ __launch_bounds__(256) void take_census(const int8_t* __restrict__ trits, uint64_t rows, uint64_t cols,
                                                   unsigned long long* __restrict__ counts) {
    QMOE_SHARED_MEMORY(room, 16);
    uint32_t* const own = reinterpret_cast<uint32_t*>(room);
    for (uint32_t i = threadIdx.x; i <= kClasses; i += blockDim.x) own[i] = 0;
    __syncthreads();
    const uint64_t symbols = (cols + kTrits - 1) / kTrits;
    for (uint64_t row = blockIdx.x; row < rows; row += gridDim.x)
        for (uint64_t s = threadIdx.x; s < symbols; s += blockDim.x) {
            uint32_t plus = 0, minus = 0;
            bool bad = false;
            for (uint32_t i = 0; i < kTrits && s * kTrits + i < cols; ++i) {
                const int8_t trit = trits[row * cols + s * kTrits + i];
                plus += trit == 1 ? 1 : 0, minus += trit == -1 ? 1 : 0;
                bad |= trit < -1 || trit > 1;
            }
            if (bad) atomicAdd(own + kClasses, 1u);
            const uint32_t nonzero = plus + minus;
            if (nonzero > 0) atomicAdd(own + nonzero * (nonzero + 1) / 2 + minus, 1u);
        }
    __syncthreads();
    // What is of no other class is all zeros; the host knows how many there are.
    for (uint32_t i = 1 + threadIdx.x; i <= kClasses; i += blockDim.x)
        if (own[i] != 0) atomicAdd(counts + i, static_cast<unsigned long long>(own[i]));
}

__global__ __launch_bounds__(kWarps* kLanes) void code_blocks(const Encoder e) {
    QMOE_SHARED_MEMORY(room, 16);
    TernaryEncodingTables& tables = *reinterpret_cast<TernaryEncodingTables*>(room);
    for (uint32_t i = threadIdx.x; i < sizeof tables / 4; i += blockDim.x)
        reinterpret_cast<uint32_t*>(room)[i] = reinterpret_cast<const uint32_t*>(e.tables)[i];
    __syncthreads();
    const TernaryLayout& layout = e.layout;
    const auto [lane, unit, matrix, block, steps] = Place(e);
    if (matrix >= e.matrices) return;
    uint32_t x = kStates, total = kStateBits;  // readers end in state 0
    for (uint64_t round = (steps + layout.steps - 1) / layout.steps; round-- > 0;) {
        const uint64_t row = layout.row(block, lane, static_cast<uint32_t>(round));
        const int8_t* const trits = e.trits + (matrix * layout.rows + row) * layout.cols;
        for (uint64_t step = layout.steps; step-- > 0;) {
            const uint32_t packed = six_trits(trits, layout.col(lane) + step * kTrits, layout.cols);
            const uint32_t v = tables.symbol_of[packed];
            const uint32_t count = (x + tables.delta[v]) >> 16;
            const uint64_t at = e.at(matrix, block, round * layout.steps + step, lane);
            e.bits[at] = static_cast<uint16_t>(x & ((1u << count) - 1));
            e.counts[at] = static_cast<uint8_t>(count | (v == kSymbols ? kEscaped : 0u));
            total += count + (v == kSymbols ? kRawBits : 0u);
            x = tables.next[tables.start[v] + static_cast<int32_t>(x >> count)];
        }
    }
    e.states[unit * kLanes + lane] = static_cast<uint16_t>(x - kStates);
    uint32_t words = steps > 0 ? (total + 15) / 16 : 0;
    for (uint32_t other = kLanes / 2; other > 0; other /= 2) words += __shfl_xor_sync(~0u, words, other);
    if (lane == 0) e.offsets[matrix * (layout.blocks + 1) + block + 1] = words;
}

// Word counts of a matrix's blocks to where they begin. A block of threads per matrix.
__global__ __launch_bounds__(kScanThreads) void sum_words(uint32_t* offsets, uint64_t blocks) {
    QMOE_SHARED_MEMORY(room, 16);
    uint32_t* const sums = reinterpret_cast<uint32_t*>(room);
    uint32_t* const own = offsets + blockIdx.x * (blocks + 1);
    const uint64_t each = (blocks + kScanThreads - 1) / kScanThreads, first = threadIdx.x * each;
    const uint64_t last = first + each < blocks ? first + each : blocks;
    uint32_t sum = 0;
    for (uint64_t b = first; b < last; ++b) sum += own[b + 1];
    sums[threadIdx.x] = sum;
    __syncthreads();
    uint32_t before = 0;
    for (uint32_t i = 0; i < threadIdx.x; ++i) before += sums[i];
    for (uint64_t b = first; b < last; ++b) own[b + 1] = before += own[b + 1];
    if (threadIdx.x == 0) own[0] = 0;
}

// A lane's bits, low bit first, as words.
struct LaneWords {
    const Encoder& e;
    const int8_t* trits;  // of the matrix
    uint64_t matrix, block, steps, next = 0;
    uint64_t buffer;
    uint32_t lane, filled = kStateBits;

    __device__ __forceinline__ uint16_t take() {
        while (filled < 16 && next < steps) {
            const uint64_t at = e.at(matrix, block, next, lane);
            const uint32_t count = e.counts[at];
            buffer |= uint64_t{e.bits[at]} << filled;
            filled += count & ~kEscaped;
            if (count & kEscaped) {
                const uint64_t round = next / e.layout.steps, step = next - round * e.layout.steps;
                const uint64_t row = e.layout.row(block, lane, static_cast<uint32_t>(round));
                buffer |=
                    uint64_t{six_trits(trits + row * e.layout.cols, e.layout.col(lane) + step * kTrits, e.layout.cols)}
                    << filled;
                filled += kRawBits;
            }
            ++next;
        }
        const auto word = static_cast<uint16_t>(buffer);
        buffer >>= 16;
        filled = filled < 16 ? 0 : filled - 16;
        return word;
    }
};

__global__ __launch_bounds__(kWarps* kLanes) void hand_out_words(const Encoder e) {
    const TernaryLayout& layout = e.layout;
    const auto [lane, unit, matrix, block, steps] = Place(e);
    if (matrix >= e.matrices) return;
    LaneWords lane_words{
        e, e.trits + matrix * layout.rows * layout.cols, matrix, block, steps, 0, e.states[unit * kLanes + lane], lane};
    uint16_t* to = e.words + e.first_words[matrix] + e.offsets[matrix * (layout.blocks + 1) + block];
    uint32_t available = 16 - kStateBits;
    const auto hand_out = [&](bool wanted) {
        const uint32_t askers = __ballot_sync(~0u, wanted);
        if (wanted) to[__popc(askers & ((1u << lane) - 1))] = lane_words.take();
        to += __popc(askers);
    };
    hand_out(steps > 0);
    const uint64_t most = e.steps_of(block, 0);  // the first lane has as many as any
    for (uint64_t t = 0; t < most; ++t) {
        const uint32_t entry = t < steps ? e.counts[e.at(matrix, block, t, lane)] : 0, count = entry & ~kEscaped;
        bool wanted = available < count;
        hand_out(wanted);
        available += (wanted ? 16 : 0) - count;
        if (!__any_sync(~0u, entry & kEscaped)) continue;
        const uint32_t raw = entry & kEscaped ? kRawBits : 0;
        wanted = available < raw;
        hand_out(wanted);
        available += (wanted ? 16 : 0) - raw;
    }
}

// Calls then(encoder) for a call that can be.
template <typename Then>
Status with_encoder(const TernaryEncode& call, const Then& then) noexcept {
    const TernaryLayout layout(call.spec, call.rows, call.cols);
    if (layout.blocks == 0 || call.matrices == 0) return Status::error(Code::kShape, "cuda: nothing to encode");
    const uint64_t needed = ternary_encode_scratch(call.spec, call.matrices, call.rows, call.cols);
    if (call.scratch_bytes < needed)
        return Status::mismatch(Code::kShape, "cuda: bytes of the encoder's scratch", 0, needed, call.scratch_bytes);
    const uint64_t lane_steps = layout.rows_per_lane * layout.steps;
    const uint64_t units = call.matrices * layout.blocks, all = units * lane_steps * kLanes;
    auto* const bits = static_cast<uint16_t*>(call.scratch);
    auto* const states = bits + all;
    return then(Encoder{layout, call.trits, static_cast<const TernaryEncodingTables*>(call.tables), call.offsets,
                        call.words, call.first_words, bits, states, reinterpret_cast<uint8_t*>(states + units * kLanes),
                        call.matrices, lane_steps});
}

uint32_t grid_of(const Encoder& e) noexcept {
    return static_cast<uint32_t>(ceil_div(e.matrices * e.layout.blocks, uint64_t{kWarps}));
}

}  // namespace

Status census_ternary(const int8_t* trits, uint64_t rows, uint64_t cols, uint64_t* counts,
                      cudaStream_t stream) noexcept {
    if (rows == 0 || cols == 0) return Status::error(Code::kShape, "cuda: nothing to count");
    QMOE_TRY(runtime_status(cudaMemsetAsync(counts, 0, (kClasses + 1) * sizeof(uint64_t), stream)));
    const auto grid = static_cast<uint32_t>(rows < 4096 ? rows : 4096);
    return launch_in_order(take_census, grid, 256, (kClasses + 1) * 4, stream, trits, rows, cols,
                           reinterpret_cast<unsigned long long*>(counts));
}

uint64_t ternary_encode_scratch(const uint8_t* spec, uint64_t matrices, uint64_t rows, uint64_t cols) noexcept {
    const TernaryLayout layout(spec, rows, cols);
    const uint64_t units = matrices * layout.blocks, all = units * layout.rows_per_lane * layout.steps * kLanes;
    return all * 3 + units * kLanes * 2;
}

Status code_ternary(const TernaryEncode& call, cudaStream_t stream) noexcept {
    return with_encoder(call, [&](const Encoder& e) {
        QMOE_TRY(launch_in_order(code_blocks, grid_of(e), kWarps * kLanes, sizeof(TernaryEncodingTables), stream, e));
        return launch_in_order(sum_words, static_cast<uint32_t>(call.matrices), kScanThreads, kScanThreads * 4, stream,
                               call.offsets, e.layout.blocks);
    });
}

Status words_ternary(const TernaryEncode& call, cudaStream_t stream) noexcept {
    return with_encoder(call, [&](const Encoder& e) {
        return launch_in_order(hand_out_words, grid_of(e), kWarps * kLanes, 0, stream, e);
    });
}

}  // namespace qmoe::cuda
