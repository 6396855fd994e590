// What this machine can do at most, for scale: reading memory, and the int8, float32 and AMX arithmetic.
//
//   dram_read/streams:S/ahead:B/cache:C/.../threads:T   bytes_per_second of T threads, each reading S streams of its
//                                     own buffer in turn and prefetching B bytes ahead into that cache
//   vpdpbusd, fma_float32, amx_int8   operations per second (a multiplication and an addition are two)
//
// Buffers are far larger than any cache. `--megabytes=N` changes their size per thread. Compiled for the machine that
// builds it: a loop of narrow loads would be slower than the memory. The arithmetic is assembly, so that no compiler
// may leave it out; it is compiled everywhere and registered where the processor has it.
#include <sys/mman.h>

#include <array>
#include <cstring>
#include <memory>

#include "harness.h"
#include "reading.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qmoe::bench {
namespace {

uint64_t g_bytes = uint64_t{512} << 20;

// Memory in huge pages where the system gives them: page walks are not the limit that is looked for.
class Pages {
  public:
    explicit Pages(uint64_t bytes) : bytes_(bytes) {
        void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) throw std::runtime_error("no memory");
        madvise(p, bytes, MADV_HUGEPAGE);
        std::memset(p, 1, bytes);
        data_ = static_cast<const char*>(p);
    }
    ~Pages() { munmap(const_cast<char*>(data_), bytes_); }
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;
    const char* data() const { return data_; }

  private:
    const char* data_;
    uint64_t bytes_;
};

template <uint64_t S>
void dram_read(benchmark::State& state) {
    static std::array<std::unique_ptr<Pages>, 2> buffers;  // each thread fills its own, on its own node
    auto& pages = buffers[static_cast<size_t>(state.thread_index())];
    if (pages == nullptr) pages = std::make_unique<Pages>(g_bytes);
    // Streams that start a power of two apart would meet in the same sets of the cache and banks of the memory.
    constexpr uint64_t kStagger = 4096 + 5 * sizeof(Line);
    const uint64_t length = (g_bytes / S - kStagger) / sizeof(Line) * sizeof(Line);
    const auto ahead = static_cast<uint64_t>(state.range(0));
    const bool to_l1 = state.range(1) == 1;
    for (auto _ : state)
        benchmark::DoNotOptimize(read_streams<S>(pages->data(), length, length + kStagger, ahead, to_l1));
    state.SetBytesProcessed(static_cast<int64_t>(static_cast<uint64_t>(state.iterations()) * S * length));
}

#if defined(__x86_64__)

constexpr int64_t kSteps = 10000;

void report(benchmark::State& state, double per_step) {
    const double operations = static_cast<double>(state.iterations() * kSteps) * per_step;
    state.counters["operations"] = benchmark::Counter(operations, benchmark::Counter::kIsRate);
}

// 14 independent chains: enough to fill two units of five cycles' latency.
constexpr int kChains = 14;
#define QMOE_CHAINS(instruction) ".irp r,0,1,2,3,4,5,6,7,8,9,10,11,12,13\n" instruction "\n.endr"
#define QMOE_CLOBBERS                                                                                          \
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", \
        "xmm13", "xmm14", "xmm15"

void vpdpbusd(benchmark::State& state) {
    for (auto _ : state)
        for (int64_t i = 0; i < kSteps; ++i)
            asm volatile(QMOE_CHAINS("vpdpbusd %%zmm14, %%zmm15, %%zmm\\r")::: QMOE_CLOBBERS);
    report(state, kChains * 64 * 2);
}

#define QMOE_ZERO "vpxor %%xmm14, %%xmm14, %%xmm14\nvpxor %%xmm15, %%xmm15, %%xmm15\n"

// Multiplies zeros: other values could become denormal numbers, which are slow.
template <int Bits>
void fma_float32(benchmark::State& state) {
    for (auto _ : state)
        for (int64_t i = 0; i < kSteps; ++i) {
            if constexpr (Bits == 512)
                asm volatile(QMOE_ZERO QMOE_CHAINS("vfmadd231ps %%zmm14, %%zmm15, %%zmm\\r")::: QMOE_CLOBBERS);
            else
                asm volatile(QMOE_ZERO QMOE_CHAINS("vfmadd231ps %%ymm14, %%ymm15, %%ymm\\r")::: QMOE_CLOBBERS);
        }
    report(state, kChains * Bits / 32 * 2);
}

// The kernel gives a process the tile registers only on request (Linux, Documentation/arch/x86/xstate.rst).
bool have_amx_int8() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kTile) == 0 || (d & kInt8) == 0) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Four accumulators, 2 x 2 tiles, as a real kernel has them. The "memory" clobbers and operands keep the stores of the
// configuration before the instruction that loads it.
void amx_int8(benchmark::State& state) {
    struct alignas(64) Config {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static_assert(sizeof(Config) == 64);
    const Config config;
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
    asm volatile(
        "tilezero %%tmm0\ntilezero %%tmm1\ntilezero %%tmm2\ntilezero %%tmm3\n"
        "tilezero %%tmm4\ntilezero %%tmm5\ntilezero %%tmm6\ntilezero %%tmm7" ::);
    for (auto _ : state)
        for (int64_t i = 0; i < kSteps; ++i)
            asm volatile(
                "tdpbusd %%tmm6, %%tmm4, %%tmm0\ntdpbusd %%tmm7, %%tmm4, %%tmm1\n"
                "tdpbusd %%tmm6, %%tmm5, %%tmm2\ntdpbusd %%tmm7, %%tmm5, %%tmm3" ::);
    asm volatile("tilerelease" ::);
    report(state, 4.0 * 16 * 16 * 64 * 2);
}

#endif

template <uint64_t S>
void add_dram_read() {
    const std::string name = "dram_read/streams:" + std::to_string(S);
    benchmark::RegisterBenchmark(name.c_str(), dram_read<S>)
        ->ArgNames({"ahead", "cache"})
        ->ArgsProduct({{0, 1024, 2048}, {1, 2}})
        ->Threads(1)
        ->Threads(2)
        ->UseRealTime()
        ->Unit(benchmark::kMillisecond);
}

void add_arithmetic(const char* name, void (*body)(benchmark::State&)) {
    benchmark::RegisterBenchmark(name, body)->Threads(1)->Threads(2)->UseRealTime();
}

}  // namespace
}  // namespace qmoe::bench

int main(int argc, char** argv) {
    using namespace qmoe::bench;
    g_bytes = option(argc, argv, "megabytes", 512) << 20;
    add_dram_read<1>();
    add_dram_read<4>();
    add_dram_read<8>();
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512vnni")) add_arithmetic("vpdpbusd", vpdpbusd);
    if (__builtin_cpu_supports("avx512f"))
        add_arithmetic("fma_float32", fma_float32<512>);
    else if (__builtin_cpu_supports("fma"))
        add_arithmetic("fma_float32", fma_float32<256>);
    if (have_amx_int8()) add_arithmetic("amx_int8", amx_int8);
#endif
    return run(argc, argv);
}
