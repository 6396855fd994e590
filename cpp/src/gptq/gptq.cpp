// Checks arguments, cuts the rows of all matrices into pieces and spreads them over threads.
#include "qmoe/gptq.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <string_view>
#include <vector>

#include "cpu/pool.h"
#include "gptq/kernels.h"
#include "qmoe/checked.h"
#include "qmoe/matmul.h"

namespace qmoe {

extern const GptqKernels gptq_kernels_generic;
#if defined(__x86_64__)
extern const GptqKernels gptq_kernels_avx2, gptq_kernels_avx512;
#endif

namespace {

// Of the instruction set that all kernels use; null where QMOE_FORCE_ISA names one that is not there.
const GptqKernels* kernels() noexcept {
    const char* const active = active_isa();
    if (active == nullptr) return nullptr;
    [[maybe_unused]] const std::string_view isa = active;
#if defined(__x86_64__)
    if (isa == "avx512" || isa == "amx") return &gptq_kernels_avx512;
    if (isa.starts_with("avx2")) return &gptq_kernels_avx2;
#endif
    return &gptq_kernels_generic;
}

struct Piece {
    uint64_t expert, first, count;
};

// Calls body(piece, number) for pieces of `step` rows; every row is in one.
template <class Body>
void for_pieces(uint64_t experts, uint64_t rows, uint64_t step, int threads, const Body& body) {
    const uint64_t each = ceil_div(rows, step);
    parallel_for(experts * each, threads, [&](uint64_t i) {
        const uint64_t first = i % each * step;
        body(Piece{i / each, first, std::min(step, rows - first)}, i);
    });
}

constexpr uint64_t kRows = 128;  // of a piece: packing a block's coefficients takes a few percent of rounding them

Status check(uint64_t experts, uint64_t rows, uint64_t columns) noexcept {
    if (kernels() == nullptr)
        return Status::error(Code::kNoKernel, "gptq: QMOE_FORCE_ISA names an instruction set that is not available");
    if (experts == 0 || rows == 0 || columns == 0) return Status::error(Code::kShape, "gptq: an empty stack");
    return {};
}

// Runs `work`, whose vectors may find no memory.
template <class Work>
Status guarded(const Work& work) noexcept {
    try {
        return work();
    } catch (const std::bad_alloc&) {
        return Status::error(Code::kNoSpace, "gptq: out of memory");
    }
}

}  // namespace

Status round_block(const RoundBlock& a, int threads) noexcept {
    QMOE_TRY(check(a.experts, a.rows, a.columns));
    if (a.columns > kMaxBlockColumns)
        return Status::mismatch(Code::kShape, "round_block: columns", 0, kMaxBlockColumns, a.columns);
    if (!a.ternary) {
        if (a.width == 0 || a.top == 0 || a.top > 255)
            return Status::error(Code::kValue, "round_block: group or top code");
        const uint64_t last = (uint64_t{a.first} + a.columns - 1) / a.width;
        if (last >= a.groups) return Status::mismatch(Code::kShape, "round_block: groups", 0, last + 1, a.groups);
    }
    return guarded([&]() -> Status {
        for_pieces(a.experts, a.rows, kRows, threads,
                   [&](const Piece& p, uint64_t) { kernels()->round_block(a, p.expert, p.first, p.count); });
        return {};
    });
}

Status choose_grid(const ChooseGrid& a, int threads) noexcept {
    QMOE_TRY(check(a.experts, a.rows, a.columns));
    if (a.group >= a.groups) return Status::mismatch(Code::kShape, "choose_grid: group", 0, a.groups, a.group);
    if (a.top == 0 || a.top > 255 || a.steps == 0) return Status::error(Code::kValue, "choose_grid: top code or steps");
    if (a.scale_type < 1 || a.scale_type > 3) return Status::error(Code::kDtype, "choose_grid: type of scales");
    return guarded([&]() -> Status {
        std::atomic<bool> failed{false};
        for_pieces(a.experts, a.rows, kRows, threads, [&](const Piece& p, uint64_t) {
            try {
                std::vector<float> room(choose_room(a.columns));
                kernels()->choose_grid(a, p.expert, p.first, p.count, room.data());
            } catch (const std::bad_alloc&) {
                failed = true;
            }
        });
        return failed ? Status::error(Code::kNoSpace, "gptq: out of memory") : Status{};
    });
}

Status ternary_sums(const TernarySums& a, int threads) noexcept {
    QMOE_TRY(check(a.experts, a.rows, a.columns));
    if (uint64_t{a.rows} * a.columns > INT32_MAX)
        return Status::mismatch(Code::kLimit, "ternary_sums: weights of a matrix", 0, INT32_MAX,
                                uint64_t{a.rows} * a.columns);
    return guarded([&]() -> Status {
        const uint64_t each = ceil_div(a.rows, kRows);
        std::vector<uint32_t> counts(3 * a.experts * each);
        for_pieces(a.experts, a.rows, kRows, threads, [&](const Piece& p, uint64_t i) {
            kernels()->ternary_sums(a, p.expert, p.first, p.count, counts.data() + 3 * i);
        });
        for (uint64_t i = 0; i < counts.size(); ++i) a.counts[i / (3 * each) * 3 + i % 3] += counts[i];
        return {};
    });
}

}  // namespace qmoe
