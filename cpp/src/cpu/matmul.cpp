// Grouped multiplication: picks the kernels of the best instruction set, cuts the work into chunks of rows and spreads
// them.
#include "qmoe/matmul.h"

#if defined(__aarch64__)
#include <sys/auxv.h>
#elif defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "cpu/activations.h"
#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "formats/ternary.h"

namespace qmoe {

extern const Kernels kernels_generic;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
#endif

namespace {

#if defined(__x86_64__)
// AMX's tiles for 8-bit integers, and the kernel's leave to use them, which this process gets here. Other systems than
// Linux are not asked.
bool may_use_amx() noexcept {
#if defined(__linux__)
    constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;  // CPUID 7.0, EDX
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kTile) != 0 && (d & kInt8) != 0 &&
           __builtin_cpu_supports("avx512vnni") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
#endif

struct Choice {
    std::vector<const char*> names;
    const char* name = nullptr;  // of the active set; null where QMOE_FORCE_ISA names one that is not available
    const Kernels* active = nullptr;

    Choice() {
#if defined(__x86_64__)
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
            if (may_use_amx()) add("amx", kernels_avx512);  // which differs in the kernels over prepacked weights
            add(kernels_avx512.isa, kernels_avx512);
        }
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) add(kernels_avx2.isa, kernels_avx2);
#elif defined(__aarch64__)
        if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) add(kernels_neon.isa, kernels_neon);
#endif
        add(kernels_generic.isa, kernels_generic);
    }

    void add(const char* isa, const Kernels& kernels) {
        names.push_back(isa);
        const char* const forced = std::getenv("QMOE_FORCE_ISA");
        if (active != nullptr || (forced != nullptr && std::strcmp(forced, isa) != 0)) return;
        active = &kernels;
        name = isa;
    }
};

const Choice& choice() {
    static const Choice chosen;
    return chosen;
}

struct Job {
    const Kernels& kernels;
    const Record& record;
    const std::vector<float>& x;  // (tokens, padded) float32, rows of this call only
    uint64_t padded, first_token;
    void* y;
    ActivationType type;
};

struct Chunk {
    uint64_t expert, first_row, rows, first_token, tokens;
};

// Buffers that a thread keeps between calls, so that steady-state calls do not allocate.
struct Scratch {
    std::vector<float> weights, sums, results;
    std::vector<int8_t> trits;
};

void store_results(const Job& job, const Chunk& chunk, uint64_t row, uint64_t count, const float* results,
                   uint64_t ldr) {
    for (uint64_t t = 0; t < chunk.tokens; ++t)
        store_row(results + t * ldr, count, job.type, job.y, (chunk.first_token + t) * job.record.rows() + row);
}

void run_int(const Job& job, const Chunk& chunk, Scratch& s) {
    const MatrixView view = job.record.matrix(chunk.expert);
    const IntLayout layout(view.spec.data(), view.rows, view.cols);
    const float* const x = job.x.data() + (chunk.first_token - job.first_token) * job.padded;
    s.results.resize(chunk.tokens * chunk.rows);
    if (chunk.tokens == 1) {
        s.sums.resize(layout.groups);
        job.kernels.group_sums(x, layout.cols, layout.group, s.sums.data());
        job.kernels.int_dot(layout, view.data.data(), chunk.first_row, chunk.rows, x, s.sums.data(), s.results.data());
    } else {
        constexpr uint64_t kPanel = 32;  // rows made float at a time: 32 x 4096 x 4 B stays in the second-level cache
        s.weights.resize(kPanel * job.padded);
        for (uint64_t done = 0; done < chunk.rows; done += kPanel) {
            const uint64_t n = std::min(kPanel, chunk.rows - done);
            for (uint64_t i = 0; i < n; ++i)
                job.kernels.int_row(layout, view.data.data(), chunk.first_row + done + i,
                                    s.weights.data() + i * job.padded);
            job.kernels.gemm(s.weights.data(), n, x, chunk.tokens, job.padded, s.results.data() + done, chunk.rows);
        }
    }
    store_results(job, chunk, chunk.first_row, chunk.rows, s.results.data(), chunk.rows);
}

void run_ternary(const Job& job, const Chunk& chunk, Scratch& s) {
    const MatrixView view = job.record.matrix(chunk.expert);
    const TernaryLayout layout(view.spec.data(), view.rows, view.cols);
    const auto table = ternary_table(view.spec.data());
    const uint8_t* const data = view.data.data();
    const uint64_t stride = layout.padded_cols(), block = chunk.first_row / layout.block_rows;
    const float* const x = job.x.data() + (chunk.first_token - job.first_token) * job.padded;
    s.trits.resize(layout.rows_in_block(0) * stride);
    ternary_decode_block(layout, *table, data, block, s.trits.data(), nullptr);
    s.results.resize(chunk.tokens * chunk.rows);
    if (chunk.tokens == 1) {
        for (uint64_t i = 0; i < chunk.rows; ++i) {
            float sums[2];
            job.kernels.trit_dot(s.trits.data() + i * stride, x, layout.cols, sums);
            const float low = layout.low(data, chunk.first_row + i), high = layout.high(data, chunk.first_row + i);
            s.results[i] = 0.5f * ((high - low) * sums[0] + (high + low) * sums[1]);
        }
    } else {
        s.weights.resize(job.padded * chunk.rows);
        for (uint64_t i = 0; i < chunk.rows; ++i)
            job.kernels.trit_row(s.trits.data() + i * stride, layout.cols, layout.low(data, chunk.first_row + i),
                                 layout.high(data, chunk.first_row + i), s.weights.data() + i * job.padded);
        job.kernels.gemm(s.weights.data(), chunk.rows, x, chunk.tokens, job.padded, s.results.data(), chunk.rows);
    }
    store_results(job, chunk, chunk.first_row, chunk.rows, s.results.data(), chunk.rows);
}

// Chunks of rows: ternary blocks as they are stored, int rows in pieces of about 64 Ki weights.
void plan_chunks(const Record& record, std::span<const int64_t> offsets, std::vector<Chunk>& chunks) {
    for (uint64_t e = 0; e < record.experts(); ++e) {
        const uint64_t first = static_cast<uint64_t>(offsets[e]),
                       tokens = static_cast<uint64_t>(offsets[e + 1]) - first;
        if (tokens == 0) continue;
        const MatrixView view = record.matrix(e);
        const uint64_t step = record.format_of(e).id == kTernaryId
                                  ? TernaryLayout(view.spec.data(), view.rows, view.cols).block_rows
                                  : ceil_div(std::max<uint64_t>(1, (uint64_t{1} << 16) / view.cols), 32) * 32;
        for (uint64_t row = 0; row < record.rows(); row += step)
            chunks.push_back({e, row, std::min(step, record.rows() - row), first, tokens});
    }
}

}  // namespace

std::span<const char* const> available_isas() noexcept {
    return choice().names;
}
const char* active_isa() noexcept {
    return choice().name;
}

Status grouped_linear(const Record& record, const void* x, ActivationType type, uint64_t tokens,
                      std::span<const int64_t> offsets, void* y, int threads) noexcept {
    QMOE_TRY(check_offsets(record.experts(), tokens, offsets));
    for (size_t s = 0; s < record.spec_count(); ++s)
        if (const uint16_t id = record.format_of_spec(s).id; id != kIntId && id != kTernaryId)
            return Status::mismatch(Code::kNoKernel, "linear: no kernel for this format", 0, kIntId, id);
    if (choice().active == nullptr)
        return Status::error(Code::kNoKernel, "linear: QMOE_FORCE_ISA names an instruction set that is not available");
    if (tokens == 0) return {};  // x and y may then be null, which memset must not see
    try {
        const uint64_t first = static_cast<uint64_t>(offsets.front()), last = static_cast<uint64_t>(offsets.back());
        const uint64_t padded = ceil_div(record.cols(), kPadCols) * kPadCols,
                       row = record.rows() * activation_bytes(type);
        std::memset(y, 0, first * row);
        std::memset(static_cast<uint8_t*>(y) + last * row, 0, (tokens - last) * row);
        std::vector<float> floats((last - first) * padded);
        for (uint64_t t = first; t < last; ++t)
            load_row(x, type, t * record.cols(), record.cols(), floats.data() + (t - first) * padded);
        std::vector<Chunk> chunks;
        plan_chunks(record, offsets, chunks);
        const Job job{*choice().active, record, floats, padded, first, y, type};
        std::atomic<bool> failed{false};
        parallel_for(chunks.size(), threads, [&](uint64_t i) {
            thread_local Scratch scratch;
            try {
                (record.format_of(chunks[i].expert).id == kTernaryId ? run_ternary : run_int)(job, chunks[i], scratch);
            } catch (const std::bad_alloc&) {
                failed = true;
            }
        });
        return failed ? Status::error(Code::kNoSpace, "linear: out of memory") : Status{};
    } catch (const std::bad_alloc&) {
        return Status::error(Code::kNoSpace, "linear: out of memory");
    }
}

}  // namespace qmoe
