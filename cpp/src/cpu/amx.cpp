// Many tokens with AMX: 16 x 16 int32 tiles of tokens x rows, int8 activations (signed) times codes (unsigned).
//
// A line of unpacked codes is a row of a B tile as it is. A chunk is one or two tile products deep; its sums then leave
// the tiles and are scaled in vector registers, which takes as long as the products do, while the products of the next
// chunk run: a few per cent faster than one after the other, a fifth with groups of 64 columns. Two panels by two blocks
// of tokens at a time: four tiles of sums, two of each operand.
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "cpu/panels.h"
#include "half.h"
#include "qmoe/checked.h"

namespace qmoe {

extern const PanelKernels panel_kernels_avx512vnni;
const PanelKernels& panel_kernels_amx() noexcept;

namespace {

constexpr uint32_t kRows = 16, kPanels = 2, kBlocks = 2;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t colsb[16] = {};
    uint8_t rows[16] = {};
};

// Sums are tiles 0-3, activations 4 and 5, codes 6 and 7. `depth` columns a product: at most 64.
void configure(uint32_t depth) noexcept {
    TileConfig config;
    for (int t = 0; t < 4; ++t) config.colsb[t] = 64, config.rows[t] = kRows;
    for (int t = 4; t < 6; ++t) config.colsb[t] = static_cast<uint16_t>(depth), config.rows[t] = kRows;
    for (int t = 6; t < 8; ++t) config.colsb[t] = 64, config.rows[t] = static_cast<uint8_t>(depth / 4);
    // GCC 12's intrinsic does not say that it reads memory, so the stores above may be left out.
    asm volatile("ldtilecfg %0" ::"m"(config));
}

using TileSums = int32_t[kBlocks * kPanels][kRows][kPanelRows];

// What adds a chunk's sums, scaled, to y. What all tokens share is loaded once.
template <Scales kScales, Zeros kZeros>
struct Flush {
    const int32_t (*sums)[kRows][kPanelRows];
    const ActivationChunk* chunks;  // of the first token
    float* y;
    uint64_t chunk_stride, y_stride;
    bool begins;  // y holds nothing yet
    __m512 scale[kPanels];
    __m512i zero[kPanels];

    Flush(const TileSums& of, const UnitView& unit, const uint8_t* scales, const uint8_t* zeros, const QuantizedView& x,
          uint64_t first, uint32_t chunk, float* to, uint64_t stride) noexcept
        : sums(of),
          chunks(x.chunks + first * x.chunk_stride + chunk),
          y(to + first * stride),
          chunk_stride(x.chunk_stride),
          y_stride(stride),
          begins(chunk == 0) {
        for (uint32_t p = 0; p < kPanels; ++p) {
            const uint8_t* const s = scales + p * unit.scales_stride;
            if constexpr (kScales == Scales::kFloat16)
                scale[p] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(s)));
            else
                scale[p] = _mm512_loadu_ps(s);
            if constexpr (kZeros == Zeros::kStored)
                zero[p] = _mm512_cvtepu8_epi32(
                    _mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros + p * unit.zeros_stride)));
        }
    }

    // Tokens [from, to) of the block.
    void operator()(uint64_t from, uint64_t to) const noexcept {
        for (uint64_t t = from; t < to; ++t) {
            const ActivationChunk& of = chunks[t * chunk_stride];
            const __m512 factor = _mm512_set1_ps(of.scale), correction = _mm512_set1_ps(of.correction);
            for (uint32_t p = 0; p < kPanels; ++p) {
                float* const at = y + t * y_stride + p * kPanelRows;
                __m512i sum = _mm512_load_si512(sums[t / kRows * kPanels + p][t % kRows]);
                if constexpr (kZeros == Zeros::kStored)
                    sum = _mm512_dpwssd_epi32(sum, zero[p], _mm512_set1_epi32(of.negative_sum));
                const __m512 value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, correction);
                const __m512 before = begins ? _mm512_setzero_ps() : _mm512_loadu_ps(at);
                _mm512_storeu_ps(at, _mm512_fmadd_ps(value, scale[p], before));
            }
        }
    }
};

// Blocks of up to 32 tokens times two panels, chunk by chunk. The sums of a block and chunk are scaled while the tiles
// multiply the next one: a share of the tokens after each product.
template <Scales kScales, Zeros kZeros>
class Multiplier {
  public:
    // `sums` are apart from all else, which can then be in registers.
    Multiplier(TileSums (&sums)[2], const UnitView& unit, const QuantizedView& x, uint32_t chunk_cols, uint64_t tokens,
               float* y, uint64_t y_stride) noexcept
        : sums_(sums),
          unit_(unit),
          x_(x),
          chunk_cols_(chunk_cols),
          depth_(std::min(chunk_cols, 64u)),
          y_(y),
          y_stride_(y_stride),
          coming_(unit, uint64_t{unit.chunks} * ceil_div(tokens, kBlocks * kRows)) {
        configure(depth_);
    }
    ~Multiplier() { asm volatile("tilerelease"); }
    Multiplier(const Multiplier&) = delete;
    Multiplier& operator=(const Multiplier&) = delete;

    // Tokens first .. first + count - 1; the panels' codes of the chunk are at b0 and b1.
    [[gnu::always_inline]] void multiply(uint64_t first, uint64_t count, uint32_t chunk, const uint8_t* b0,
                                         const uint8_t* b1, const uint8_t* scales, const uint8_t* zeros) noexcept {
        const int8_t* const a = x_.x + first * x_.x_stride + uint64_t{chunk} * chunk_cols_;
        const auto stride = static_cast<long>(x_.x_stride);
        const bool both = count > kRows;
        const uint32_t products = chunk_cols_ / depth_;
        const uint64_t share = ceil_div(before_count_, products * (both ? 4 : 2));
        uint64_t done = 0;
        const auto go_on = [&] {
            if (!before_) return;
            const uint64_t until = std::min(before_count_, done + share);
            (*before_)(done, until);
            done = until;
        };
        coming_.ask();
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (uint32_t p = 0; p < products; ++p) {
            const uint64_t line = uint64_t{p} * depth_ * kPanelRows;
            _tile_loadd(4, a + p * depth_, stride);
            _tile_loadd(6, b0 + line, 64);
            _tile_dpbsud(0, 4, 6);
            go_on();
            _tile_loadd(7, b1 + line, 64);
            _tile_dpbsud(1, 4, 7);
            go_on();
            if (both) {
                _tile_loadd(5, a + kRows * x_.x_stride + p * depth_, stride);
                _tile_dpbsud(2, 5, 6);
                go_on();
                _tile_dpbsud(3, 5, 7);
                go_on();
            }
        }
        turn_ ^= 1;
        TileSums& now = sums_[turn_];
        _tile_stored(0, now[0], 64);
        _tile_stored(1, now[1], 64);
        if (both) {
            _tile_stored(2, now[2], 64);
            _tile_stored(3, now[3], 64);
        }
        asm volatile("" ::: "memory");  // the stores above are not known to the compiler
        before_.emplace(now, unit_, scales, zeros, x_, first, chunk, y_, y_stride_);
        before_count_ = count;
    }
    // Scales what is left.
    void finish() noexcept { (*before_)(0, before_count_); }

  private:
    TileSums (&sums_)[2];
    const UnitView& unit_;
    const QuantizedView& x_;
    const uint32_t chunk_cols_, depth_;
    float* const y_;
    const uint64_t y_stride_;
    Coming coming_;
    uint32_t turn_ = 0;
    std::optional<Flush<kScales, kZeros>> before_;
    uint64_t before_count_ = 0;
};

// Where a chunk's scales and zeros are.
struct Groups {
    const uint8_t *scales, *zeros;
    uint32_t within = 0;

    void advance(const UnitView& unit) noexcept {
        if (++within < unit.repeat) return;
        within = 0;
        scales += unit.scale_step;
        if (zeros != nullptr) zeros += unit.zero_step;
    }
};

template <Scales kScales, Zeros kZeros>
void tile(const UnitView& unit, const QuantizedView& x, uint64_t tokens, float* y, uint64_t y_stride) noexcept {
    const uint32_t chunk_cols = unit.steps * 4;
    alignas(64) TileSums sums[2];
    Multiplier<kScales, kZeros> multiplier(sums, unit, x, chunk_cols, tokens, y, y_stride);
    for (uint64_t first = 0; first < tokens; first += kBlocks * kRows) {
        Groups groups{unit.scales, unit.zeros};
        for (uint32_t chunk = 0; chunk < unit.chunks; ++chunk, groups.advance(unit)) {
            const uint8_t* const b = unit.codes + uint64_t{chunk} * chunk_cols * kPanelRows;
            multiplier.multiply(first, std::min<uint64_t>(tokens - first, kBlocks * kRows), chunk, b,
                                b + unit.codes_stride, groups.scales, groups.zeros);
        }
    }
    multiplier.finish();
}

// From packed lines: a chunk is unpacked into the first-level cache and multiplied there, by all tokens, whose sums had
// better be there too.
constexpr uint64_t kPackedTokens = 64;
template <Scales kScales, Zeros kZeros>
void packed_tile(const UnitView& unit, Codes codes, const QuantizedView& x, uint64_t tokens, float* y,
                 uint64_t y_stride) noexcept {
    const uint32_t chunk_cols = unit.steps * step_cols(codes);
    const uint64_t step_bytes = uint64_t{kUnitPanels} * step_lines(codes) * kLine;
    const auto unpack = panel_kernels_avx512vnni.unpack[static_cast<size_t>(codes)];
    alignas(64) uint8_t lines[kPanels][kMaxChunk * kPanelRows] = {};  // behind the last column: codes times zero
    alignas(64) TileSums sums[2];
    Multiplier<kScales, kZeros> multiplier(sums, unit, x, chunk_cols, tokens, y, y_stride);
    Groups groups{unit.scales, unit.zeros};
    const uint8_t* from = unit.codes;
    for (uint32_t chunk = 0; chunk < unit.chunks; ++chunk, groups.advance(unit)) {
        const uint32_t steps = chunk + 1 == unit.chunks ? unit.last_steps : unit.steps;
        for (uint32_t p = 0; p < kPanels; ++p) unpack(from + p * unit.codes_stride, steps, lines[p]);
        from += steps * step_bytes + (groups.within + 1 == unit.repeat ? unit.gap : 0);
        for (uint64_t first = 0; first < tokens; first += kBlocks * kRows)
            multiplier.multiply(first, std::min<uint64_t>(tokens - first, kBlocks * kRows), chunk, lines[0], lines[1],
                                groups.scales, groups.zeros);
    }
    multiplier.finish();
}

}  // namespace

// AVX-512 VNNI's, and tiles for what is not ternary: two dot products per weight would need two sums.
const PanelKernels& panel_kernels_amx() noexcept {
    static const PanelKernels kernels = [] {
        PanelKernels k = panel_kernels_avx512vnni;
        k.isa = "amx";
        k.tile[0][0][0] = tile<Scales::kFloat16, Zeros::kConstant>;
        k.tile[0][0][1] = tile<Scales::kFloat16, Zeros::kStored>;
        k.tile[0][1][0] = tile<Scales::kFloat32, Zeros::kConstant>;
        k.tile[0][1][1] = tile<Scales::kFloat32, Zeros::kStored>;
        k.tile_panels[0] = kPanels;
        k.packed_tile[0][0] = packed_tile<Scales::kFloat16, Zeros::kConstant>;
        k.packed_tile[0][1] = packed_tile<Scales::kFloat16, Zeros::kStored>;
        k.packed_tile[1][0] = packed_tile<Scales::kFloat32, Zeros::kConstant>;
        k.packed_tile[1][1] = packed_tile<Scales::kFloat32, Zeros::kStored>;
        k.packed_tile_tokens = kPackedTokens;
        return k;
    }();
    return kernels;
}

}  // namespace qmoe
