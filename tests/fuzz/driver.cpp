// Seeded mutation for compilers without libFuzzer: TARGET [iterations] [seed] [most seconds]. A run is determined by
// its seed, so a crash is found again by the same command; the input at fault is left in crash.bin. Fails when an input
// takes over a second.
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fuzz.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace qmoe::fuzz {
namespace {

// Seconds of processor time: a busy machine must not turn into a finding.
double now() {
    timespec time;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

Buffer current;

void keep_input() {
    FILE* const file = std::fopen("crash.bin", "wb");
    if (file == nullptr) return;
    std::fwrite(current.data(), 1, current.size(), file);
    std::fclose(file);
}
void on_signal(int number) {
    keep_input();
    signal(number, SIG_DFL);
    raise(number);
}

class Mutator {
  public:
    Mutator(uint64_t seed, std::vector<Buffer> corpus) : state_(seed), corpus_(std::move(corpus)) {}

    Buffer next() {
        Buffer bytes = corpus_[below(corpus_.size())];
        for (uint64_t n = 1 + below(below(4) == 0 ? 8 : 3); n > 0; --n) mutate(bytes);
        return bytes;
    }

  private:
    uint64_t random() {
        uint64_t z = (state_ += 0x9E3779B97F4A7C15u);
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        return z ^ (z >> 31);
    }
    uint64_t below(uint64_t n) { return random() % n; }
    // Headers come first and are small, so a third of all places lie among the first 256 bytes.
    size_t place(size_t size) { return static_cast<size_t>(below(below(3) == 0 ? std::min<size_t>(size, 256) : size)); }

    uint64_t interesting() {
        constexpr uint64_t kValues[] = {0,
                                        1,
                                        2,
                                        3,
                                        7,
                                        8,
                                        15,
                                        16,
                                        31,
                                        32,
                                        33,
                                        63,
                                        64,
                                        127,
                                        128,
                                        255,
                                        256,
                                        4095,
                                        4096,
                                        4097,
                                        32767,
                                        65535,
                                        65536,
                                        1u << 24,
                                        (1u << 24) + 1,
                                        0x7FFFFFFF,
                                        0x80000000,
                                        0xFFFFFFFF,
                                        1ull << 32,
                                        1ull << 42,
                                        1ull << 48,
                                        1ull << 62,
                                        (1ull << 63) - 1,
                                        1ull << 63,
                                        ~0ull - 15,
                                        ~0ull};
        return below(4) == 0 ? below(300) : kValues[below(std::size(kValues))];
    }

    void mutate(Buffer& bytes) {
        if (bytes.empty()) {
            bytes.push_back(static_cast<uint8_t>(random()));
            return;
        }
        const size_t at = place(bytes.size());
        switch (below(9)) {
            case 0: bytes[at] = static_cast<uint8_t>(bytes[at] ^ (1u << below(8))); return;
            case 1: bytes[at] = static_cast<uint8_t>(random()); return;
            case 2: {  // a field of 1, 2, 4 or 8 bytes, aligned like those of a header
                const size_t width = size_t{1} << below(4), field = at / width * width;
                const uint64_t value = interesting();
                std::memcpy(bytes.data() + field, &value, std::min(width, bytes.size() - field));
                return;
            }
            case 3: {  // a field nudged
                const size_t width = size_t{1} << below(4), field = at / width * width;
                if (field + width > bytes.size()) return;
                uint64_t value = 0;
                std::memcpy(&value, bytes.data() + field, width);
                value += below(2) == 0 ? 1 + below(16) : -(1 + below(16));
                std::memcpy(bytes.data() + field, &value, width);
                return;
            }
            case 4: bytes.resize(below(4) == 0 ? at : bytes.size() - std::min<size_t>(bytes.size(), below(32))); return;
            case 5: {  // a part of the same input again, over something or inserted
                const size_t n = std::min<size_t>(1 + below(64), bytes.size() - at), to = place(bytes.size());
                const Buffer part(bytes.begin() + static_cast<ptrdiff_t>(at),
                                  bytes.begin() + static_cast<ptrdiff_t>(at + n));
                if (below(2) == 0) {
                    bytes.insert(bytes.begin() + static_cast<ptrdiff_t>(to), part.begin(), part.end());
                } else {
                    std::copy_n(part.begin(), std::min(n, bytes.size() - to),
                                bytes.begin() + static_cast<ptrdiff_t>(to));
                }
                return;
            }
            case 6: {  // cut out
                const size_t n = std::min<size_t>(1 + below(32), bytes.size() - at);
                bytes.erase(bytes.begin() + static_cast<ptrdiff_t>(at), bytes.begin() + static_cast<ptrdiff_t>(at + n));
                return;
            }
            case 7: {  // the tail of another seed
                const Buffer& other = corpus_[below(corpus_.size())];
                const size_t from = std::min(other.size(), at);
                bytes.resize(at);
                bytes.insert(bytes.end(), other.begin() + static_cast<ptrdiff_t>(from), other.end());
                return;
            }
            default: {  // a decimal number in a text becomes another one
                size_t first = at;
                while (first < bytes.size() && !(bytes[first] >= '0' && bytes[first] <= '9')) ++first;
                size_t last = first;
                while (last < bytes.size() && bytes[last] >= '0' && bytes[last] <= '9') ++last;
                if (first == last || last - first > 20) return;
                const std::string number = std::to_string(interesting());
                bytes.erase(bytes.begin() + static_cast<ptrdiff_t>(first),
                            bytes.begin() + static_cast<ptrdiff_t>(last));
                bytes.insert(bytes.begin() + static_cast<ptrdiff_t>(first), number.begin(), number.end());
            }
        }
    }

    uint64_t state_;
    std::vector<Buffer> corpus_;
};

int run(uint64_t iterations, uint64_t seed, double most_seconds) {
    for (const int number : {SIGABRT, SIGSEGV, SIGBUS, SIGFPE}) signal(number, on_signal);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_set_death_callback(keep_input);
#endif
    const std::vector<Buffer> corpus = seeds();
    for (const Buffer& input : corpus) {
        const uint64_t before = accepted;
        current = input;
        LLVMFuzzerTestOneInput(input.data(), input.size());
        if (accepted == before) return std::printf("a seed was refused\n"), 1;
    }
    accepted = 0;
    Mutator mutator(seed, corpus);
    const double begin = now();
    double slowest = 0;
    uint64_t done = 0;
    while (done < iterations) {
        current = mutator.next();
        const double start = now();
        LLVMFuzzerTestOneInput(current.data(), current.size());
        slowest = std::max(slowest, now() - start);
        ++done;
        if (slowest > 1.0) {
            keep_input();
            return std::printf("input %llu took %.2f s\n", static_cast<unsigned long long>(done), slowest), 1;
        }
        if (now() - begin > most_seconds) break;
    }
    std::printf("%llu inputs, %llu accepted, 0 crashes, slowest %.1f ms, %.1f s\n",
                static_cast<unsigned long long>(done), static_cast<unsigned long long>(accepted), slowest * 1e3,
                now() - begin);
    // Stopped early: the machine was too slow for what was asked, which must not look like success.
    if (done < iterations)
        return std::printf("time was up before %llu inputs\n", static_cast<unsigned long long>(iterations)), 1;
    return accepted * 50 < done ? (std::printf("too few mutants got through to test anything\n"), 1) : 0;
}

}  // namespace

void fail(const char* what) {
    std::printf("broken: %s\n", what);
    std::fflush(stdout);
    std::abort();
}

}  // namespace qmoe::fuzz

int main(int argc, char** argv) {
    const uint64_t iterations = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 100000;
    const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
    const double most_seconds = argc > 3 ? std::strtod(argv[3], nullptr) : 600;
    return qmoe::fuzz::run(iterations, seed, most_seconds);
}
