// Streams become codes of two bits, in shared memory: a warp decodes a group of rows, a lane a segment of one.
//
// Codes are 0, 1 for a plus, 2 for a minus, sixteen columns a word, a lower column at lower bits. A lane collects a word in a
// register and writes it when a symbol comes that belongs to another one: nobody else has columns of the words between its
// first and its last one. The first one may be the last one of the lane before, which is why lanes leave their last words
// when all others are written, by an atomic operation. One for every symbol took longer.
#pragma once

#include "barriers.cuh"
#include "gemm/matrix.cuh"
#include "launch.cuh"
#include "ternary/task.cuh"

namespace qmoe::cuda {

struct TernaryCodes {
    static constexpr uint32_t kPlus = 1, kMinus = 2, kOfWord = 16;

    // Columns of a row that symbols can be of: those behind the last one, too, where a row's last quad ends.
    QMOE_INLINE static uint32_t all_columns(const TernaryView& stack) noexcept {
        return stack.all_slots - (stack.all_slots >> stack.gap_bits);
    }
    // Words of a row: those, and whole blocks of a tile.
    QMOE_INLINE static uint32_t words_of(const TernaryView& stack) noexcept {
        const uint32_t all = all_columns(stack), blocks = (stack.cols + kTileColumns - 1) / kTileColumns * kTileColumns;
        return ((all > blocks ? all : blocks) + 4 * kOfWord - 1) / (4 * kOfWord) * 4;
    }
    // Of shared memory that a warp needs.
    QMOE_INLINE static uint32_t bytes_of_warp(const TernaryView& stack) noexcept {
        return stack.group_rows * words_of(stack) * 4;
    }
    // And behind the last warp's: as far as a quad goes from a row's last column on that no encoder makes, 2048 columns.
    static constexpr uint32_t kBehind = 2048 / kOfWord * 4 + 16;
};

// Warps of a block of threads, of which each decodes one of `groups`: as many as share what a block may have without asking
// for more, at least one and at most 8, but fewer where multiprocessors would have nothing to do.
inline constexpr uint32_t kMostDecodingWarps = 8;
inline uint32_t decoding_warps(uint32_t bytes_of_warp, uint64_t groups, const Device& device) noexcept {
    const uint32_t fit = (48 << 10) / bytes_of_warp;
    uint32_t warps = fit > kMostDecodingWarps ? kMostDecodingWarps : fit > 0 ? fit : 1;
    while (warps > 1 && groups < uint64_t{2} * warps * device.multiprocessors) warps /= 2;
    return warps;
}

inline Status check_room_of_group(uint32_t bytes_of_warp, const Device& device) noexcept {
    const uint32_t needed = bytes_of_warp + TernaryCodes::kBehind;
    return needed <= device.shared
               ? Status{}
               : Status::mismatch(Code::kNoKernel, "cuda: shared memory for a group of rows", 0, device.shared, needed);
}

// What a lane has of a row's codes.
template <int kGap>
class TernaryMarker {
  public:
    // `row` is in shared memory; `next` is one behind the slot before.
    __device__ __forceinline__ TernaryMarker(uint32_t* row, uint32_t next)
        : row_(address_of(row)), slot_(2 * next - 2), word_(word_at(column(2 * next))) {}

    // All symbols of a task's quads. Those that no encoder makes end at most a quad behind the last slot. Whole warps call.
    __device__ __forceinline__ void mark_all(TernaryTask& task, uint32_t all_slots) {
#pragma unroll 1
        for (; task.k < task.k_end; ++task.k) {
            const uint4 fetched = task.quad(task.k + 3);
            mark(task.now);
            slot_ = min(slot_, 2 * all_slots);
            task.now = task.ahead, task.ahead = task.further, task.further = fetched;
        }
        __syncwarp();
        if (codes_ != 0) leave_shared();
        __syncwarp();
    }

  private:
    // a times kB, plus c: by the multiplier, which has less to do here than adders have.
    template <int kB>
    static __device__ __forceinline__ uint32_t multiplied(uint32_t a, uint32_t c) {
#ifdef __CUDA_ARCH__
        uint32_t out;
        asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "n"(kB), "r"(c));
        return out;
#else
        return a * static_cast<uint32_t>(kB) + c;
#endif
    }
    // Twice the column of a slot, from twice the slot; a lowest bit stays.
    static __device__ __forceinline__ uint32_t column(uint32_t slot) {
        return multiplied<-2>(slot >> (kGap + 1), slot);
    }
    __device__ __forceinline__ void mark(const uint4& quad) {
        constexpr uint32_t kLastOfStep = 2 * ((1u << kGap) - 1);
        using Symbols = TernarySymbols<kGap>;
        const Symbols symbols(quad);
#pragma unroll
        for (int i = 0; i < Symbols::kCount; ++i) {
            // Twice the column, and one more for a minus, is where the bit belongs among the row's.
            slot_ = (slot_ & ~1u) + (symbols[i] >> (31 - kGap)) + 2;
            const uint32_t bit = column(slot_);
            go_to(word_at(bit));
            if ((slot_ & kLastOfStep) != kLastOfStep) codes_ |= __funnelshift_l(0, 1, bit);
        }
    }

    // Words by where they are in shared memory: compilers would find out anew for every store where that begins.
#ifdef __CUDA_ARCH__
    using Address = uint32_t;

    static __device__ __forceinline__ Address address_of(uint32_t* row) {
        return kept(shared_address(row));
    }
    __device__ __forceinline__ Address word_at(uint32_t bit) const {
        return multiplied<4>(bit / 32, row_);
    }
    __device__ __forceinline__ void go_to(Address word) {
        asm volatile(
            "{\n"
            ".reg .pred moves;\n"
            "setp.ne.u32 moves, %1, %2;\n"
            "@moves st.shared.u32 [%1], %0;\n"
            "@moves mov.u32 %0, 0;\n"
            "}\n"
            : "+r"(codes_)
            : "r"(word_), "r"(word)
            : "memory");
        word_ = word;
    }
    __device__ __forceinline__ void leave_shared() const {
        asm volatile("red.shared.or.b32 [%0], %1;" ::"r"(word_), "r"(codes_) : "memory");
    }
#else
    using Address = uint8_t*;

    static __device__ Address address_of(uint32_t* row) {
        return reinterpret_cast<Address>(row);
    }
    __device__ Address word_at(uint32_t bit) const {
        return row_ + bit / 32 * 4;
    }
    __device__ void go_to(Address word) {
        if (word != word_) *reinterpret_cast<uint32_t*>(word_) = codes_, codes_ = 0;
        word_ = word;
    }
    __device__ void leave_shared() const {
        atomicOr(reinterpret_cast<uint32_t*>(word_), codes_);
    }
#endif

    const Address row_;
    uint32_t slot_;  // twice, and one more for a minus
    Address word_;   // where `codes_` belong
    uint32_t codes_ = 0;
};

// Leaves the codes of a task's group of rows at `codes` (group_rows, pitch), 16-byte aligned in shared memory, which all
// lanes can then read. Behind a row's last column there are some of no meaning. Whole warps call; pitch is a multiple of 4.
__device__ __forceinline__ void decode_group(const TernaryView& stack, TernaryTask& task, uint32_t* codes,
                                             uint32_t pitch) {
    const uint32_t lane = threadIdx.x % kLanes;
    for (uint32_t i = lane; i < stack.group_rows * pitch / 4; i += kLanes) reinterpret_cast<uint4*>(codes)[i] = {};
    __syncwarp();
    uint32_t* const row = codes + (lane >> stack.segment_bits) * pitch;
    switch (stack.gap_bits) {
        case 3: TernaryMarker<3>(row, task.next).mark_all(task, stack.all_slots); break;
        case 4: TernaryMarker<4>(row, task.next).mark_all(task, stack.all_slots); break;
        case 5: TernaryMarker<5>(row, task.next).mark_all(task, stack.all_slots); break;
        case 6: TernaryMarker<6>(row, task.next).mark_all(task, stack.all_slots); break;
        default: TernaryMarker<7>(row, task.next).mark_all(task, stack.all_slots);
    }
}

// What is known of a group's rows, each by the lanes that decode it.
struct TernaryRows {
    uint32_t info, levels, segment_bits;

    // Of row r of the group: whole warps call.
    __device__ __forceinline__ uint32_t number(uint32_t r) const {
        return of_row(info, r) & ((1u << TernaryStreams::kRowBits) - 1);
    }
    // bfloat16 of a plus | of a minus << 16.
    __device__ __forceinline__ uint32_t levels_of(uint32_t r) const { return of_row(levels, r); }

  private:
    __device__ __forceinline__ uint32_t of_row(uint32_t value, uint32_t r) const {
        return __shfl_sync(~0u, value, static_cast<int>(r << segment_bits));
    }
};

// The same where `codes` are (group_rows, words_of(stack)): behind a row's last column there are zeros.
__device__ __forceinline__ TernaryRows decode_whole(const TernaryView& stack, TernaryTask& task, uint32_t* codes) {
    const uint32_t words = TernaryCodes::words_of(stack);
    decode_group(stack, task, codes, words);
    const uint32_t lane = threadIdx.x % kLanes, last = stack.cols / TernaryCodes::kOfWord;
    const uint32_t behind = ~0u << 2 * (stack.cols % TernaryCodes::kOfWord);
    for (uint32_t i = lane; i < stack.group_rows * (words - last); i += kLanes) {
        const uint32_t word = last + (i >> (5 - stack.segment_bits));
        codes[(i & (stack.group_rows - 1)) * words + word] &= word == last ? ~behind : 0;
    }
    __syncwarp();
    return {task.info, task.levels, stack.segment_bits};
}

}  // namespace qmoe::cuda
