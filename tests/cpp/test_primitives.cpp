// Checksums, half-precision conversions and checked arithmetic.
#include <cmath>
#include <limits>
#include <string_view>

#include "crc32c_portable.h"
#include "half.h"
#include "qmoe/checked.h"
#include "qmoe/crc32c.h"
#include "testing.h"

using namespace qmoe;
using test::Buffer;

TEST_SUITE("primitives") {
    TEST_CASE("crc32c: the vectors of RFC 3720 B.4") {
        Buffer zeros(32, 0), ones(32, 0xFF), up(32), down(32);
        for (uint8_t i = 0; i < 32; ++i) {
            up[i] = i;
            down[i] = static_cast<uint8_t>(31 - i);
        }
        const Buffer read_pdu = {0x01, 0xC0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,    0, 0, 0, 0,
                                 0x14, 0,    0, 0, 0, 0, 4, 0, 0, 0, 0, 0x14, 0, 0, 0, 0x18,
                                 0x28, 0,    0, 0, 0, 0, 0, 0, 2, 0, 0, 0,    0, 0, 0, 0};
        for (const auto crc : {&crc32c, &crc32c_portable}) {
            CHECK(crc(zeros, 0) == 0x8A9136AAu);
            CHECK(crc(ones, 0) == 0x62A8AB43u);
            CHECK(crc(up, 0) == 0x46DD794Eu);
            CHECK(crc(down, 0) == 0x113FDB5Cu);
            CHECK(crc(read_pdu, 0) == 0xD9963A56u);
            CHECK(crc({}, 0) == 0u);
        }
    }

    TEST_CASE("crc32c: portable and instruction agree at every length and alignment, and continue from a seed") {
        test::Random random(3);
        Buffer bytes(400);
        for (uint8_t& b : bytes) b = static_cast<uint8_t>(random.next());
        for (size_t first = 0; first < 9; ++first)
            for (size_t n = 0; n + first <= 300; ++n) {
                const auto part = std::span<const uint8_t>(bytes).subspan(first, n);
                const uint32_t whole = crc32c(part);
                REQUIRE(whole == crc32c_portable(part));
                REQUIRE(whole == crc32c(part.subspan(n / 3), crc32c(part.first(n / 3))));
                REQUIRE(whole == crc32c_portable(part.subspan(n / 3), crc32c_portable(part.first(n / 3))));
            }
    }

    TEST_CASE("half: all 65536 values convert as IEEE 754 says, and back") {
        for (uint32_t h = 0; h < 65536; ++h) {
            const int exponent = static_cast<int>(h >> 10 & 31), mantissa = static_cast<int>(h & 1023);
            const float sign = (h & 0x8000) != 0 ? -1.0f : 1.0f;
            const float value = half_to_float(static_cast<uint16_t>(h));
            if (exponent == 31) {
                REQUIRE((mantissa == 0 ? std::isinf(value) : std::isnan(value)));
                REQUIRE(std::signbit(value) == (sign < 0));
            } else {
                const double magnitude =
                    exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
                REQUIRE(static_cast<double>(value) == static_cast<double>(sign) * magnitude);
                REQUIRE(std::signbit(value) == (sign < 0));
            }
            const uint16_t back = float_to_half(value);
            if (std::isnan(value)) {
                REQUIRE(std::isnan(half_to_float(back)));
            } else {
                REQUIRE(back == h);
            }
        }
    }

    TEST_CASE("half: between all neighbours, the middle rounds to even and everything else to the nearer one") {
        for (uint16_t h = 0; h < 0x7C00; ++h) {
            const float low = half_to_float(h);
            // Beyond the largest half, infinity begins where 65536 would be.
            const float high = h == 0x7BFF ? 65536.0f : half_to_float(static_cast<uint16_t>(h + 1));
            const float middle = low + (high - low) / 2;
            const uint16_t even = (h & 1) == 0 ? h : static_cast<uint16_t>(h + 1);
            REQUIRE(float_to_half(middle) == even);
            REQUIRE(float_to_half(std::nextafter(middle, 0.0f)) == h);
            REQUIRE(float_to_half(std::nextafter(middle, 1e9f)) == h + 1);
            REQUIRE(float_to_half(-middle) == (even | 0x8000));
        }
        CHECK(float_to_half(std::numeric_limits<float>::max()) == 0x7C00);
        CHECK(float_to_half(std::numeric_limits<float>::denorm_min()) == 0);
    }

    TEST_CASE("bfloat16: all 65536 values survive, and the middle between neighbours rounds to even") {
        for (uint32_t b = 0; b < 65536; ++b) {
            const float value = bfloat_to_float(static_cast<uint16_t>(b));
            const uint16_t back = float_to_bfloat(value);
            if (std::isnan(value)) {
                REQUIRE(std::isnan(bfloat_to_float(back)));
                continue;
            }
            REQUIRE(back == b);
            if ((b & 0x7FFF) >= 0x7F80) continue;
            const auto bits = std::bit_cast<uint32_t>(value);
            const uint32_t even = (b & 1) == 0 ? b : b + 1;
            REQUIRE(float_to_bfloat(std::bit_cast<float>(bits | 0x8000u)) == even);
            REQUIRE(float_to_bfloat(std::bit_cast<float>(bits | 0x7FFFu)) == b);
            REQUIRE(float_to_bfloat(std::bit_cast<float>(bits | 0x8001u)) == b + 1);
        }
        // A NaN whose payload lies in the dropped bits stays a NaN.
        CHECK(std::isnan(bfloat_to_float(float_to_bfloat(std::bit_cast<float>(0x7F800001u)))));
    }

    TEST_CASE("checked arithmetic refuses exactly what does not fit") {
        constexpr uint64_t top = std::numeric_limits<uint64_t>::max();
        uint64_t out = 0;
        CHECK(checked_add(top - 1, 1, out));
        CHECK(out == top);
        CHECK_FALSE(checked_add(top, 1, out));
        CHECK(checked_mul(uint64_t{1} << 32, (uint64_t{1} << 32) - 1, out));
        CHECK_FALSE(checked_mul(uint64_t{1} << 32, uint64_t{1} << 32, out));
        CHECK(checked_round_up(33, 16, out));
        CHECK(out == 48);
        CHECK_FALSE(checked_round_up(top - 3, 16, out));
        CHECK(ceil_div(top, 2) == uint64_t{1} << 63);
    }

    TEST_CASE("every code has a name of its own") {
        std::vector<std::string_view> seen;
        for (uint16_t c = 0; c <= static_cast<uint16_t>(Code::kNoKernel); ++c) {
            const std::string_view name = code_name(static_cast<Code>(c));
            for (const std::string_view other : seen) CHECK(name != other);
            seen.push_back(name);
        }
    }
}
