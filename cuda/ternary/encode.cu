// `ternary` made on the device: the same bytes as the CPU's encoder makes (formats/ternary_encode.cpp).
//
// Four passes, so that each reads and writes memory as it likes best. Trits become symbols of 16 bits in the order in which
// lanes code them. A warp then takes a block of the format, a lane a lane of it, and codes its symbols from the last one
// backwards: what it leaves are its bits, as words that count from their end, and how many bits each step gives off. A sum
// over blocks says where each one's words begin. The last pass goes forwards as a reader does: at each step the lanes that
// a reader's buffer would have run dry of hand out their next word, in order.
//
// Coding is a chain of look-ups, and so is handing out; both fetch what they need some steps ahead. Steps go by fours, which
// makes a lane's symbols two words and its counts one.
#include "formats/ternary.h"
#include "launch.cuh"

namespace qmoe::cuda {

namespace {

constexpr uint32_t kWarps = 4, kScanThreads = 256, kPackThreads = 128, kCensusThreads = 256;
constexpr uint32_t kFour = 4;         // steps
constexpr uint32_t kEscaped = 0x80;   // beside a count of bits
constexpr uint32_t kNoTrits = 0xFFF;  // packed: what is no six trits

struct Encoder {
    TernaryLayout layout;
    const int8_t* trits;
    const TernaryEncodingTables* tables;
    uint32_t *offsets, *misfits;
    uint16_t* words;
    const uint64_t* first_words;
    uint64_t matrices, fours, most_words;  // of a lane: steps by four; words
    // By matrix, block, four steps and lane: packed trits, 16 bits each, and counts of bits, 8 each.
    uint2* packed;
    uint32_t* counts;
    uint32_t* totals;      // bits by matrix, block and lane
    uint16_t* lane_words;  // by matrix, block, number of the word and lane; a lane's last word first

    // Steps of a lane.
    __device__ __forceinline__ uint32_t steps_of(uint64_t block, uint32_t lane) const {
        const uint64_t rows = layout.rows_in_block(block), groups = kLanes / layout.segments,
                       group = lane / layout.segments;
        return rows > group ? static_cast<uint32_t>((rows - group + groups - 1) / groups * layout.steps) : 0;
    }
};

// What a warp works on, and its lane.
struct Place {
    uint32_t lane = threadIdx.x % kLanes;
    uint64_t unit = uint64_t{blockIdx.x} * kWarps + threadIdx.x / kLanes, matrix, block;

    __device__ __forceinline__ explicit Place(const Encoder& e)
        : matrix(unit / e.layout.blocks), block(unit - matrix * e.layout.blocks) {}
};

// Six trits from column `col` on, those behind the last one zeros, as twelve bits; kNoTrits where one is no trit.
__device__ __forceinline__ uint32_t six_trits(const int8_t* row, uint64_t col, uint64_t cols) {
    uint32_t packed = 0;
    bool bad = false;
#pragma unroll
    for (uint32_t i = 0; i < kTrits; ++i) {
        const int32_t trit = col + i < cols ? row[col + i] : 0;
        packed |= (trit < 0 ? 2u : static_cast<uint32_t>(trit)) << (2 * i);
        bad |= trit < -1 || trit > 1;
    }
    return bad ? kNoTrits : packed;
}

// How many symbols are of each class: of whole rows, which are cut only later. A trit that is none counts in the last one.
__global__ __launch_bounds__(kCensusThreads) void take_census(const int8_t* __restrict__ trits, uint64_t rows,
                                                              uint64_t cols, unsigned long long* __restrict__ counts) {
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

// Trits to symbols, in the order of lanes: neighbours read neighbours, row by row.
__global__ __launch_bounds__(kPackThreads) void pack_symbols(const Encoder e) {
    const TernaryLayout& layout = e.layout;
    const uint32_t groups = kLanes / layout.segments, steps = static_cast<uint32_t>(layout.steps),
                   symbols = layout.segments * steps;
    auto* const packed = reinterpret_cast<uint16_t*>(e.packed);
    for (uint64_t row = blockIdx.x; row < e.matrices * layout.rows; row += gridDim.x) {
        const uint64_t matrix = row / layout.rows, own = row - matrix * layout.rows, block = own / layout.block_rows;
        const auto in_block = static_cast<uint32_t>(own - block * layout.block_rows);
        const uint32_t round = in_block / groups, group = in_block - round * groups;
        const uint64_t first = (matrix * layout.blocks + block) * e.fours;
        for (uint32_t s = threadIdx.x; s < symbols; s += blockDim.x) {
            const uint32_t segment = s / steps, step = s - segment * steps, lane = group * layout.segments + segment;
            const auto put = [&](uint32_t t, uint32_t symbol) {
                packed[((first + t / kFour) * kLanes + lane) * kFour + t % kFour] = static_cast<uint16_t>(symbol);
            };
            uint32_t t = round * steps + step;
            put(t, six_trits(e.trits + row * layout.cols, uint64_t{s} * kTrits, layout.cols));
            // The lane's last four are read as a whole.
            if (step + 1 == steps && t + 1 == e.steps_of(block, lane))
                while (++t % kFour != 0) put(t, 0);
        }
    }
}

// A lane's bits as words, from the last one backwards. 1 to 16 bits stay behind: those of the first word that the next lot
// of bits does not fill.
struct BackwardWords {
    uint16_t* at;
    uint32_t buffer = 0, filled = 0, total = 0;

    // `bits` has no more than `count`, at most 12.
    __device__ __forceinline__ void put(uint32_t bits, uint32_t count) {
        buffer = buffer << count | bits;
        filled += count, total += count;
        if (filled <= 16) return;
        filled -= 16;
        *at = static_cast<uint16_t>(buffer >> filled);
        at += kLanes;
    }
    // What stays behind, at the upper end of a word.
    __device__ __forceinline__ void finish() { *at = static_cast<uint16_t>(buffer << (16 - filled)); }
};

__global__ __launch_bounds__(kWarps* kLanes) void code_blocks(const Encoder e) {
    QMOE_SHARED_MEMORY(room, 16);
    const TernaryEncodingTables& tables = *reinterpret_cast<const TernaryEncodingTables*>(room);
    for (uint32_t i = threadIdx.x; i < sizeof tables / 4; i += blockDim.x)
        reinterpret_cast<uint32_t*>(room)[i] = reinterpret_cast<const uint32_t*>(e.tables)[i];
    __syncthreads();
    const auto [lane, unit, matrix, block] = Place(e);
    if (matrix >= e.matrices) return;
    const bool escapes = tables.delta[kSymbols] != 0;
    // The first lane has as many steps as any.
    const uint32_t steps = e.steps_of(block, lane), fours = (e.steps_of(block, 0) + kFour - 1) / kFour;
    const uint2* const packed = e.packed + unit * e.fours * kLanes + lane;
    uint32_t* const counts = e.counts + unit * e.fours * kLanes + lane;
    BackwardWords words{e.lane_words + unit * e.most_words * kLanes + lane};
    uint32_t x = kStates, misfits = 0;  // readers end in state 0
    const auto fetch = [&](uint32_t behind) {
        return behind > 0 && (behind - 1) * kFour < steps ? packed[(behind - 1) * kLanes] : uint2{};
    };
    uint2 now = fetch(fours), ahead = fetch(fours - 1);
#pragma unroll 1
    for (uint32_t four = fours; four-- > 0;) {
        const uint2 fetched = fetch(four > 0 ? four - 1 : 0);
        uint32_t counted = 0;
#pragma unroll
        for (uint32_t i = kFour; i-- > 0;) {
            const uint32_t symbol = (i < 2 ? now.x : now.y) >> (16 * (i % 2)) & 0xffff;
            if (four * kFour + i >= steps) continue;
            const uint32_t v = tables.symbol_of[symbol];
            if (v == kSymbols) {
                if (!escapes || (symbol & symbol >> 1 & 0x555) != 0) {
                    ++misfits;
                    continue;
                }
                words.put(symbol, kRawBits);
            }
            const uint32_t count = (x + tables.delta[v]) >> 16;
            words.put(x & ((1u << count) - 1), count);
            counted |= (count | (v == kSymbols ? kEscaped : 0u)) << (8 * i);
            x = tables.next[tables.start[v] + static_cast<int32_t>(x >> count)];
        }
        counts[four * kLanes] = counted;
        now = ahead, ahead = fetched;
    }
    if (steps > 0) {
        words.put(x - kStates, kStateBits);
        words.finish();
    }
    e.totals[unit * kLanes + lane] = words.total;
    uint32_t sum = (words.total + 15) / 16;
    for (uint32_t other = kLanes / 2; other > 0; other /= 2) {
        sum += __shfl_xor_sync(~0u, sum, other);
        misfits += __shfl_xor_sync(~0u, misfits, other);
    }
    if (lane != 0) return;
    e.offsets[matrix * (e.layout.blocks + 1) + block + 1] = sum;
    if (misfits != 0) atomicAdd(e.misfits + matrix, misfits);
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

// A lane's words from the first one on. Their bits begin somewhere within those that BackwardWords left.
class ForwardWords {
  public:
    __device__ __forceinline__ ForwardWords(const uint16_t* words, uint32_t total)
        : words_(words), left_((total + 15) / 16), shift_(total - (left_ - 1) * 16), high_(fetch()), low_(fetch()) {}

    __device__ __forceinline__ uint16_t take() {
        const auto word = static_cast<uint16_t>(high_ >> (16 - shift_) | low_ << shift_);
        high_ = low_, low_ = fetch();
        return word;
    }

  private:
    // Zeros follow the last one.
    __device__ __forceinline__ uint32_t fetch() { return left_ > 0 ? words_[uint64_t{--left_} * kLanes] : 0u; }

    const uint16_t* words_;
    uint32_t left_, shift_;  // 1 to 16 bits are in the first word
    uint32_t high_, low_;
};

__global__ __launch_bounds__(kWarps* kLanes) void hand_out_words(const Encoder e) {
    const auto [lane, unit, matrix, block] = Place(e);
    if (matrix >= e.matrices) return;
    const uint32_t total = e.totals[unit * kLanes + lane], fours = (e.steps_of(block, 0) + kFour - 1) / kFour;
    const uint32_t* const counts = e.counts + unit * e.fours * kLanes + lane;
    ForwardWords words(e.lane_words + unit * e.most_words * kLanes + lane, total);
    uint16_t* to = e.words + e.first_words[matrix] + e.offsets[matrix * (e.layout.blocks + 1) + block];
    uint32_t available = 16 - kStateBits;
    const auto hand_out = [&](bool wanted) {
        const uint32_t askers = __ballot_sync(~0u, wanted);
        if (wanted) to[__popc(askers & ((1u << lane) - 1))] = words.take();
        to += __popc(askers);
    };
    const auto give = [&](uint32_t bits) {
        const bool wanted = available < bits;
        hand_out(wanted);
        available += (wanted ? 16 : 0) - bits;
    };
    hand_out(total > 0);
    const auto fetch = [&](uint32_t four) { return four < fours ? counts[four * kLanes] : 0u; };
    uint32_t now = fetch(0), ahead = fetch(1);
#pragma unroll 1
    for (uint32_t four = 0; four < fours; ++four) {
        const uint32_t fetched = fetch(four + 2);
        const bool escapes = __any_sync(~0u, (now & 0x01010101 * kEscaped) != 0);
#pragma unroll
        for (uint32_t i = 0; i < kFour; ++i) {
            const uint32_t entry = now >> (8 * i) & 0xff;
            give(entry & ~kEscaped);
            if (escapes) give(entry & kEscaped ? kRawBits : 0);
        }
        now = ahead, ahead = fetched;
    }
}

// Of a step, and of a lane's first word: what the spec lets them have at most.
uint64_t most_bits(const uint8_t* spec) noexcept {
    uint32_t most = 0;
    const auto of = [&](uint32_t slots, uint32_t more) {
        if (slots == 0) return;
        uint32_t bits = kStateBits + more;
        for (uint32_t s = slots - 1; s > 1; s /= 2) --bits;
        most = bits > most ? bits : most;
    };
    for (uint32_t c = 0; c < kClasses; ++c) of(load<uint16_t>(spec + kClassFreqAt + 2 * c), 0);
    of(load<uint16_t>(spec + kEscapeFreqAt), kRawBits);
    return most;
}

// How the scratch is shared.
struct Scratch {
    uint64_t units, fours, most_words;

    Scratch(const TernaryEncode& call, const TernaryLayout& layout) noexcept
        : units(call.matrices * layout.blocks),
          fours(ceil_div(layout.rows_per_lane * layout.steps, uint64_t{kFour})),
          most_words(ceil_div(layout.rows_per_lane * layout.steps * most_bits(call.spec) + kStateBits, uint64_t{16})) {}
    uint64_t bytes() const noexcept { return units * kLanes * (fours * 12 + 4 + most_words * 2); }
};

Status check_call(const TernaryEncode& call) noexcept {
    QMOE_TRY(check_ternary_spec(call.spec));
    if (call.rows == 0 || call.cols == 0 || call.matrices == 0)
        return Status::error(Code::kShape, "cuda: nothing to encode");
    if (call.rows > kMaxDim || call.cols > kMaxDim)
        return Status::mismatch(Code::kLimit, "cuda: too many rows or columns to encode", 0, kMaxDim,
                                call.rows > call.cols ? call.rows : call.cols);
    return TernaryLayout(call.spec, call.rows, call.cols).check_geometry();
}

// Calls then(encoder) for a call that can be.
template <typename Then>
Status with_encoder(const TernaryEncode& call, const Then& then) noexcept {
    QMOE_TRY(check_call(call));
    const TernaryLayout layout(call.spec, call.rows, call.cols);
    const Scratch scratch(call, layout);
    if (call.scratch_bytes < scratch.bytes())
        return Status::mismatch(Code::kShape, "cuda: bytes of the encoder's scratch", 0, scratch.bytes(),
                                call.scratch_bytes);
    const uint64_t lanes = scratch.units * kLanes;
    auto* const packed = static_cast<uint2*>(call.scratch);
    auto* const counts = reinterpret_cast<uint32_t*>(packed + lanes * scratch.fours);
    auto* const totals = counts + lanes * scratch.fours;
    return then(Encoder{layout, call.trits, static_cast<const TernaryEncodingTables*>(call.tables), call.offsets,
                        call.misfits, call.words, call.first_words, call.matrices, scratch.fours, scratch.most_words,
                        packed, counts, totals, reinterpret_cast<uint16_t*>(totals + lanes)});
}

uint32_t grid_of(const Encoder& e) noexcept {
    return static_cast<uint32_t>(ceil_div(e.matrices * e.layout.blocks, uint64_t{kWarps}));
}

uint32_t grid_of_rows(uint64_t rows) noexcept {
    constexpr uint64_t kMost = 16384;
    return static_cast<uint32_t>(rows < kMost ? rows : kMost);
}

}  // namespace

Status census_ternary(const int8_t* trits, uint64_t rows, uint64_t cols, uint64_t* counts,
                      cudaStream_t stream) noexcept {
    if (rows == 0 || cols == 0) return Status::error(Code::kShape, "cuda: nothing to count");
    QMOE_TRY(runtime_status(cudaMemsetAsync(counts, 0, (kClasses + 1) * sizeof(uint64_t), stream)));
    const uint32_t most = grid_of_rows(rows), grid = most < 4096 ? most : 4096;  // each has counts of its own to add
    return launch_in_order(take_census, grid, kCensusThreads, (kClasses + 1) * 4, stream, trits, rows, cols,
                           reinterpret_cast<unsigned long long*>(counts));
}

Status ternary_encode_scratch(const TernaryEncode& call, uint64_t* bytes) noexcept {
    QMOE_TRY(check_call(call));
    *bytes = Scratch(call, TernaryLayout(call.spec, call.rows, call.cols)).bytes();
    return {};
}

Status code_ternary(const TernaryEncode& call, cudaStream_t stream) noexcept {
    return with_encoder(call, [&](const Encoder& e) {
        QMOE_TRY(runtime_status(cudaMemsetAsync(call.misfits, 0, call.matrices * sizeof(uint32_t), stream)));
        QMOE_TRY(launch_in_order(pack_symbols, grid_of_rows(call.matrices * call.rows), kPackThreads, 0, stream, e));
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
