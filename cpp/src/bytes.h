// Little-endian loads and stores at any alignment.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <vector>

// For functions that files of different instruction sets share: an out-of-line copy could be merged by the linker into
// one that the machine cannot run. Layouts are also computed by kernels on the GPU.
#if defined(__CUDACC__)
#define QMOE_INLINE __host__ __device__ inline
#else
#define QMOE_INLINE [[gnu::always_inline]] inline
#endif

namespace qmoe {

static_assert(std::endian::native == std::endian::little, "stored numbers are little-endian and read in place");

template <class T>
QMOE_INLINE T load(const uint8_t* p) noexcept {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

template <class T>
QMOE_INLINE void store(uint8_t* p, T value) noexcept {
    std::memcpy(p, &value, sizeof value);
}

template <class T>
inline void append(std::vector<uint8_t>& out, T value) {
    const size_t at = out.size();
    out.resize(at + sizeof value);
    store(out.data() + at, value);
}

inline bool all_zero(const uint8_t* p, size_t n) noexcept {
    uint8_t any = 0;
    for (size_t i = 0; i < n; ++i) any |= p[i];
    return any == 0;
}

}  // namespace qmoe
