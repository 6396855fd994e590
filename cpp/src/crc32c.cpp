#include "qmoe/crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

#include "crc32c_portable.h"

namespace qmoe {
namespace {

constexpr uint32_t kPolynomial = 0x82F63B78u;  // 0x1EDC6F41 bit-reversed

// table[k][b]: the CRC of byte b followed by k zero bytes, so that 8 bytes advance with 8 independent look-ups.
constexpr auto make_tables() {
    std::array<std::array<uint32_t, 256>, 8> table{};
    for (uint32_t b = 0; b < 256; ++b) {
        uint32_t crc = b;
        for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? kPolynomial : 0);
        table[0][b] = crc;
    }
    for (size_t k = 1; k < 8; ++k)
        for (uint32_t b = 0; b < 256; ++b) table[k][b] = (table[k - 1][b] >> 8) ^ table[0][table[k - 1][b] & 255];
    return table;
}
constexpr auto kTable = make_tables();

uint32_t crc_portable(const uint8_t* p, size_t n, uint32_t crc) noexcept {
    for (; n >= 8; n -= 8, p += 8) {
        uint32_t low = 0, high = 0;
        std::memcpy(&low, p, 4);
        std::memcpy(&high, p + 4, 4);
        low ^= crc;
        crc = kTable[7][low & 255] ^ kTable[6][(low >> 8) & 255] ^ kTable[5][(low >> 16) & 255] ^ kTable[4][low >> 24] ^
              kTable[3][high & 255] ^ kTable[2][(high >> 8) & 255] ^ kTable[1][(high >> 16) & 255] ^
              kTable[0][high >> 24];
    }
    for (; n != 0; --n, ++p) crc = (crc >> 8) ^ kTable[0][(crc ^ *p) & 255];
    return crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) uint32_t crc_sse42(const uint8_t* p, size_t n, uint32_t crc) noexcept {
    uint64_t wide = crc;
    for (; n >= 8; n -= 8, p += 8) {
        uint64_t word = 0;
        std::memcpy(&word, p, 8);
        wide = _mm_crc32_u64(wide, word);
    }
    crc = static_cast<uint32_t>(wide);
    for (; n != 0; --n, ++p) crc = _mm_crc32_u8(crc, *p);
    return crc;
}
#endif

}  // namespace

uint32_t crc32c_portable(std::span<const uint8_t> bytes, uint32_t seed) noexcept {
    return ~crc_portable(bytes.data(), bytes.size(), ~seed);
}

uint32_t crc32c(std::span<const uint8_t> bytes, uint32_t seed) noexcept {
#if defined(__x86_64__)
    static const bool has_sse42 = __builtin_cpu_supports("sse4.2");
    if (has_sse42) return ~crc_sse42(bytes.data(), bytes.size(), ~seed);
#endif
    return crc32c_portable(bytes, seed);
}

}  // namespace qmoe
