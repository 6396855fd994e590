// What a fuzz target offers: libFuzzer's entry point, and what our own driver needs where there is no libFuzzer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace qmoe::fuzz {

using Buffer = std::vector<uint8_t>;

std::vector<Buffer> seeds();

// Inputs that got through all checks, and so reached what lies behind them.
extern uint64_t accepted;

// Reports a broken invariant and aborts, which both libFuzzer and the driver take for a crash.
[[noreturn]] void fail(const char* what);
inline void expect(bool condition, const char* what) {
    if (!condition) fail(what);
}

}  // namespace qmoe::fuzz
