#include "cpu/multiply.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "half.h"

namespace qmoe {

extern const PanelKernels panel_kernels_generic;
#if defined(__x86_64__)
extern const PanelKernels panel_kernels_avx2, panel_kernels_avx512vnni;
const PanelKernels& panel_kernels_amx() noexcept;
#elif defined(__aarch64__)
extern const PanelKernels panel_kernels_neon;
#endif

namespace {

// Rows behind the last one that a kernel may read: AMX loads sixteen at a time.
constexpr uint64_t kRowsBeyond = 15;

Tuning initial_tuning() noexcept {
    Tuning values;
#if defined(__x86_64__)
    // Zen runs a 512-bit dot product a cycle and everything else beside it, so that taking codes out of packed lines
    // costs nothing and reading half as many bytes or fewer from the cache is worth a little. Cores with two dot
    // products a cycle pay for it.
    __builtin_cpu_init();
    // Its own prefetchers keep up as long as they see what is read next, and are disturbed by requests further ahead.
    // Between a load and what waits for it lie at most 128 vector instructions: of 2 bits not more than 14 lines, too few
    // to keep the core's 24 misses in flight. Three lines ahead into the first-level cache fill them; six lines would be
    // too many, and all requests then wait for each other.
    if (__builtin_cpu_is("amd")) values = {0, 0, 1024, 192, 64};
    // A core of the class of Sapphire Rapids gets most when 4 KiB ahead are asked for into its second-level cache and half
    // of that into the first: more than with one of the two, in all widths.
    if (__builtin_cpu_is("intel") && __builtin_cpu_supports("avx512vnni")) values = {4096, 4096, 8, 2048, 2048};
#endif
    return values;
}

std::atomic<uint32_t> g_prefetch_narrow{initial_tuning().prefetch_narrow},
    g_prefetch_wide{initial_tuning().prefetch_wide}, g_direct_tokens{initial_tuning().direct_tokens},
    g_near_narrow{initial_tuning().near_narrow}, g_near_wide{initial_tuning().near_wide};

Ahead ahead_of(Codes codes) noexcept {
    const bool wide = codes == Codes::kInt4 || codes == Codes::kInt8;
    return {(wide ? g_prefetch_wide : g_prefetch_narrow).load(std::memory_order_relaxed),
            (wide ? g_near_wide : g_near_narrow).load(std::memory_order_relaxed)};
}

// The set that goes with what active_isa() says: one name pins both, the kernels over records and these.
const PanelKernels* choose() noexcept {
    const char* const isa = active_isa();
    if (isa == nullptr) return nullptr;
#if defined(__x86_64__)
    if (std::strcmp(isa, "amx") == 0) return &panel_kernels_amx();
    if (std::strcmp(isa, "avx512") == 0 && __builtin_cpu_supports("avx512vnni")) return &panel_kernels_avx512vnni;
    if (std::strcmp(isa, "generic") != 0) return &panel_kernels_avx2;
#elif defined(__aarch64__)
    if (std::strcmp(isa, "generic") != 0) return &panel_kernels_neon;
#endif
    return &panel_kernels_generic;
}

}  // namespace

const PanelKernels* panel_kernels() noexcept {
    static const PanelKernels* const chosen = choose();
    return chosen;
}

Tuning tuning() noexcept {
    return {g_prefetch_narrow.load(std::memory_order_relaxed), g_prefetch_wide.load(std::memory_order_relaxed),
            g_direct_tokens.load(std::memory_order_relaxed), g_near_narrow.load(std::memory_order_relaxed),
            g_near_wide.load(std::memory_order_relaxed)};
}

Status set_tuning(const Tuning& values) noexcept {
    for (const uint32_t distance : {values.prefetch_narrow, values.prefetch_wide, values.near_narrow, values.near_wide})
        if (distance > 1u << 20)
            return Status::mismatch(Code::kValue, "tuning: prefetch distance", 0, 1u << 20, distance);
    if (values.direct_tokens > 1024)
        return Status::mismatch(Code::kValue, "tuning: direct tokens", 0, 1024, values.direct_tokens);
    g_prefetch_narrow.store(values.prefetch_narrow, std::memory_order_relaxed);
    g_prefetch_wide.store(values.prefetch_wide, std::memory_order_relaxed);
    g_direct_tokens.store(values.direct_tokens, std::memory_order_relaxed);
    g_near_narrow.store(values.near_narrow, std::memory_order_relaxed);
    g_near_wide.store(values.near_wide, std::memory_order_relaxed);
    return {};
}

void Rows::resize(const Prepacked& weights, const Prepacked::Expert& expert, uint64_t rows, Precision precision,
                  uint64_t terms) {
    cols_ = weights.cols();
    chunk_ = expert.chunk;
    chunks_ = ceil_div(cols_, chunk_);
    // Rows a multiple of 4 KiB apart would all fall into the same sets of the first-level cache.
    stride_ = ceil_div(chunks_ * chunk_, kLine) * kLine;
    if (stride_ % (2 * kLine) == 0) stride_ += kLine;
    offset_ = expert.offset;
    precision_ = precision;
    terms_ = precision == Precision::kFloat ? 1 : terms;
    if (precision == Precision::kFloat) {
        if (floats_.size() < rows * stride_) floats_.resize(rows * stride_);
        return;
    }
    const uint64_t values = (rows * terms_ + kRowsBeyond) * stride_;
    if (values_.size() < values) values_.resize(values);
    if (scales_.size() < rows * terms_ * chunks_) scales_.resize(rows * terms_ * chunks_);
}

void Rows::set(const PanelKernels& kernels, uint64_t row, const float* values) noexcept {
    if (precision_ == Precision::kFloat) {
        float* const to = floats_.data() + row * stride_;
        std::memcpy(to, values, cols_ * sizeof(float));
        std::fill(to + cols_, to + stride_, 0.0f);
        return;
    }
    int8_t* const first = values_.data() + row * terms_ * stride_;
    ActivationChunk* const scales = scales_.data() + row * terms_ * chunks_;
    kernels.quantize(values, cols_, chunk_, offset_, first, scales);
    if (terms_ == 1) return;
    for (uint64_t chunk = 0; chunk < chunks_; ++chunk) {
        float left[kMaxChunk];
        const uint64_t begin = chunk * chunk_, count = std::min<uint64_t>(chunk_, cols_ - begin);
        for (uint64_t k = 0; k < count; ++k)
            left[k] = values[begin + k] - scales[chunk].scale * static_cast<float>(first[begin + k]);
        kernels.quantize(left, count, chunk_, offset_, first + stride_ + begin, scales + chunks_ + chunk);
    }
}

void Rows::copy(uint64_t row, const Rows& from, uint64_t from_row) noexcept {
    if (precision_ == Precision::kFloat) {
        std::memcpy(floats_.data() + row * stride_, from.floats_.data() + from_row * stride_, stride_ * sizeof(float));
        return;
    }
    const uint64_t values = terms_ * stride_, scales = terms_ * chunks_;
    std::memcpy(values_.data() + row * values, from.values_.data() + from_row * values, values);
    std::memcpy(scales_.data() + row * scales, from.scales_.data() + from_row * scales,
                scales * sizeof(ActivationChunk));
}

QuantizedView Rows::quantized(uint64_t first) const noexcept {
    return {values_.data() + first * stride_, stride_, scales_.data() + first * chunks_, chunks_};
}

namespace {

// Buffers that a thread keeps between calls, so that steady-state calls do not allocate.
struct Scratch {
    std::vector<uint8_t> codes;
    std::vector<float> weights;
};

uint8_t* aligned(std::vector<uint8_t>& buffer, uint64_t bytes) {
    if (buffer.size() < bytes + kLine) buffer.resize(bytes + kLine);
    const auto address = reinterpret_cast<uintptr_t>(buffer.data());
    return buffer.data() + (kLine - address % kLine) % kLine;
}

QuantizedView advance(QuantizedView x, uint64_t tokens) noexcept {
    return {x.x + tokens * x.x_stride, x.x_stride, x.chunks + tokens * x.chunk_stride, x.chunk_stride};
}

// The scales and zeros of `part` become those of the unit from a panel on.
void begin_at(UnitView& part, const UnitView& unit, uint64_t panel) noexcept {
    part.scales = unit.scales + panel * unit.scales_stride;
    if (unit.zeros != nullptr) part.zeros = unit.zeros + panel * unit.zeros_stride;
}

// A panel of a unit, or some, with the codes unpacked: steps are then quads, a line each.
struct Unpacked {
    UnitSizes sizes;
    Codes codes;
    UnitView view;

    // codes_stride: whole chunks, although the last one's codes may end before.
    Unpacked(const UnitView& unit, const Prepacked::Expert& e, uint64_t cols) noexcept
        : sizes(e, cols), codes(e.codes), view(unit) {
        const uint32_t quads = step_cols(codes) / 4;
        view.codes = nullptr;
        view.codes_stride = uint64_t{unit.chunks} * unit.steps * quads * kLine;
        view.steps = unit.steps * quads;
        view.last_steps = unit.last_steps * quads;
    }

    // Panels [panel, panel + count) of `unit` to `out`, count * codes_stride bytes.
    void unpack(const PanelKernels& kernels, const UnitView& unit, uint64_t panel, uint32_t count,
                uint8_t* out) noexcept {
        const uint64_t step = step_cols(codes) / 4 * kLine;  // bytes of a panel's step when unpacked
        for (uint32_t p = 0; p < count; ++p) {
            const uint8_t* from = unit.codes + (panel + p) * unit.codes_stride;
            uint8_t* const to = out + p * view.codes_stride;
            for (uint64_t done = 0; done < sizes.all_steps; done += sizes.group_steps, from += sizes.group_bytes)
                kernels.unpack[static_cast<size_t>(codes)](from, std::min(sizes.group_steps, sizes.all_steps - done),
                                                           to + done * step);
            std::memset(to + sizes.all_steps * step, 0, view.codes_stride - sizes.all_steps * step);
        }
        view.codes = out;
        begin_at(view, unit, panel);
    }
};

}  // namespace

void multiply_unit(const PanelKernels& kernels, const Prepacked& weights, uint64_t expert, uint64_t unit,
                   const Rows& rows, uint64_t first, uint64_t tokens, float* y) {
    const Prepacked::Expert& e = weights.expert(expert);
    const UnitView view = unit_view(weights, expert, unit, ahead_of(e.codes));
    const auto scales = static_cast<size_t>(e.scales), zeros = static_cast<size_t>(e.zeros);
    const bool floats = rows.precision() == Precision::kFloat;
    if (!floats && tokens <= g_direct_tokens.load(std::memory_order_relaxed)) {
        const auto& table = kernels.direct[static_cast<size_t>(e.codes)][scales][zeros];
        const QuantizedView x = rows.quantized(first);
        for (uint64_t t = 0; t < tokens;) {
            const uint32_t size = tokens - t >= 4 ? 2 : tokens - t >= 2 ? 1 : 0;
            table[size](view, advance(x, t), y + t * kUnitRows, kUnitRows);
            t += uint64_t{1} << size;
        }
        // What is done with the results waits for the last lines of this unit, and the next one for that: its first lines
        // arrive meanwhile. Worth 1 to 4 % where units are short.
        if (tokens <= 2) {
            constexpr uint64_t kSome = 16 * kLine;
            const uint8_t* const next = view.scales + UnitSizes(e, weights.cols()).bytes;
            for (uint64_t at = 0; at < kSome; at += kLine) __builtin_prefetch(next + at, 0, 3);
        }
        return;
    }
    const uint32_t at_once = floats ? 1 : kernels.tile_panels[e.trits()];
    const uint64_t unit_bytes = UnitSizes(e, weights.cols()).bytes, coming_bytes = unit_bytes * at_once / kUnitPanels;
    // A share of the next unit.
    const auto coming = [&](uint32_t panel) { return view.scales + unit_bytes + panel / at_once * coming_bytes; };
    if (!floats && !e.trits() && tokens <= kernels.packed_tile_tokens) {
        UnitView part = view;
        part.coming_bytes = coming_bytes;
        for (uint32_t panel = 0; panel < kUnitPanels; panel += at_once) {
            part.codes = view.codes + panel * view.codes_stride;
            begin_at(part, view, panel);
            part.coming = coming(panel);
            kernels.packed_tile[scales][zeros](part, e.codes, rows.quantized(first), tokens, y + panel * kPanelRows,
                                               kUnitRows);
        }
        return;
    }
    thread_local Scratch scratch;
    Unpacked part(view, e, weights.cols());
    part.view.coming_bytes = coming_bytes;
    uint8_t* const codes = aligned(scratch.codes, part.view.codes_stride * at_once);
    const uint64_t cols = part.sizes.padded_cols(e);
    if (floats && scratch.weights.size() < cols * kPanelRows) scratch.weights.resize(cols * kPanelRows);
    for (uint32_t panel = 0; panel < kUnitPanels; panel += at_once) {
        part.view.coming = coming(panel);
        part.unpack(kernels, view, panel, at_once, codes);
        float* const to = y + panel * kPanelRows;
        if (!floats) {
            kernels.tile[e.trits()][scales][zeros](part.view, rows.quantized(first), tokens, to, kUnitRows);
            continue;
        }
        kernels.dequantize(part.view, 0, e.trits(), e.scales, e.offset, scratch.weights.data());
        kernels.float_tile(scratch.weights.data(), cols, rows.floats(first), rows.stride(), tokens, to, kUnitRows);
    }
}

void prefetch_unit(const Prepacked& weights, uint64_t expert, uint64_t unit) noexcept {
    const Prepacked::Expert& e = weights.expert(expert);
    constexpr uint64_t kLeast = 1024;  // the processor's own prefetchers see a new stream after some lines only
    const uint64_t bytes = UnitSizes(e, weights.cols()).bytes,
                   some = std::min(bytes, std::max<uint64_t>(kLeast, ahead_of(e.codes).far));
    const uint8_t* const from = weights.data() + e.at + unit * bytes;
    for (uint64_t at = 0; at < some; at += kLine) __builtin_prefetch(from + at, 0, 2);
}

Status Prepacked::dequantize(uint64_t index, float* out) const noexcept {
    const PanelKernels* const kernels = panel_kernels();
    if (kernels == nullptr)
        return Status::error(Code::kNoKernel, "prepacked: QMOE_FORCE_ISA names a set that is not available");
    if (index >= experts_) return Status::mismatch(Code::kValue, "prepacked: no such expert", 0, experts_, index);
    try {
        const Expert& e = expert(index);
        std::vector<uint8_t> codes;
        std::vector<float> weights;
        for (uint64_t panel = 0; panel < panels_of(rows_, order_); ++panel) {
            const UnitView view = unit_view(*this, index, panel / kUnitPanels, {});
            Unpacked part(view, e, cols_);
            codes.resize(part.view.codes_stride);
            weights.resize(part.view.codes_stride);
            part.unpack(*kernels, view, panel % kUnitPanels, 1, codes.data());
            kernels->dequantize(part.view, 0, e.trits(), e.scales, e.offset, weights.data());
            for (uint32_t r = 0; r < kPanelRows; ++r) {
                const uint64_t row = row_of(panel, r, rows_, order_);
                for (uint64_t k = 0; row < rows_ && k < cols_; ++k) out[row * cols_ + k] = weights[k * kPanelRows + r];
            }
        }
        return {};
    } catch (const std::bad_alloc&) {
        return Status::error(Code::kNoSpace, "prepacked: out of memory");
    }
}

}  // namespace qmoe
