// The JSON scanner: what it reads and what it refuses.
#include "json.h"
#include "testing.h"

using namespace qmoe;

namespace {

std::span<const uint8_t> view(std::string_view text) {
    return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}
Code string_code(std::string_view text, std::string* out = nullptr) {
    JsonScanner scan(view(text));
    std::string value;
    const Status status = scan.string(value);
    if (out != nullptr) *out = value;
    return status.code;
}
std::string parsed(std::string_view text) {
    std::string out;
    CHECK(string_code(text, &out) == Code::kOk);
    return out;
}
Code number_code(std::string_view text, uint64_t expected = 0) {
    JsonScanner scan(view(text));
    uint64_t value = 0;
    const Status status = scan.number(value);
    if (status.ok()) CHECK(value == expected);
    return status.code;
}
Code value_code(std::string_view text) {
    JsonScanner scan(view(text));
    const Status status = scan.skip_value();
    return status.ok() ? scan.end().code : status.code;
}
std::string repeat(std::string_view text, int n) {
    std::string out;
    for (int i = 0; i < n; ++i) out += text;
    return out;
}

}  // namespace

TEST_SUITE("json") {
    TEST_CASE("strings: plain, escaped and beyond ASCII") {
        CHECK(parsed(" \"\"") == "");
        CHECK(parsed("\"a b\"") == "a b");
        CHECK(parsed(R"("\"\\\/\b\f\n\r\t")") == "\"\\/\b\f\n\r\t");
        CHECK(parsed(R"("\u0041\u00e9\u20AC\ud83d\ude00\u0000")") ==
              std::string("A\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\0", 11));
        CHECK(parsed("\"\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\xF4\x8F\xBF\xBF\"") ==
              "\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\xF4\x8F\xBF\xBF");
    }
    TEST_CASE("E_NAME: strings that are no UTF-8") {
        for (const char* bad : {"\"\x80\"", "\"\xC0\x80\"", "\"\xC1\xBF\"", "\"\xE0\x9F\xBF\"", "\"\xED\xA0\x80\"",
                                "\"\xF0\x8F\xBF\xBF\"", "\"\xF4\x90\x80\x80\"", "\"\xF5\x80\x80\x80\"", "\"\xFF\"",
                                "\"\xC3\"", "\"\xE2\x82\"", "\"\xC3(\"", R"("\ud800")", R"("\ud800x")", R"("\udc00")",
                                R"("\ud800\ud800")", "\"\n\"", "\"\x01\""})
            CHECK(string_code(bad) == Code::kName);
    }
    TEST_CASE("E_CORRUPT: strings cut short, unknown escapes") {
        for (const char* bad :
             {"", "x", "\"", "\"abc", "\"\\", "\"\\\"", R"("\x41")", R"("\u12")", R"("\u12G4")", R"("\U0041")"})
            CHECK(string_code(bad) == Code::kCorrupt);
    }
    TEST_CASE("whole numbers") {
        CHECK(number_code("0", 0) == Code::kOk);
        CHECK(number_code(" 18446744073709551615", ~0ull) == Code::kOk);
        CHECK(number_code("18446744073709551616") == Code::kOverflow);
        CHECK(number_code("99999999999999999999999") == Code::kOverflow);
        for (const char* bad : {"", "-1", "+1", "01", "00", "1.0", "1e3", "1E3", ".5", "x", "\"1\""})
            CHECK(number_code(bad) == Code::kCorrupt);
    }
    TEST_CASE("any value can be skipped") {
        for (const char* good : {"1", "-0.5e+10", "true", "false", "null", "\"x\"", "[]", "{}", "[1,[2,{\"a\":[]}],{}]",
                                 R"({"a":{"b":[1,2,{"c":null}]},"d":"e"})", " [ 1 , 2 ] "})
            CHECK(value_code(good) == Code::kOk);
        for (const char* bad : {"", "[", "]", "[1", "[1,]", "{\"a\"}", "{\"a\":}", "{a:1}", "{\"a\":1,}", "[1}",
                                "{\"a\":1]", "1 2", "-", "1.", "1e", "tru", "[,]", "{\"a\" 1}"})
            CHECK(value_code(bad) == Code::kCorrupt);
    }
    TEST_CASE("E_LIMIT: nesting is bounded and costs no stack") {
        CHECK(value_code(repeat("[", 32) + repeat("]", 32)) == Code::kOk);
        CHECK(value_code(repeat("[", 33) + repeat("]", 33)) == Code::kLimit);
        CHECK(value_code(repeat("{\"a\":", 1000000)) == Code::kLimit);
    }
    TEST_CASE("refusals point at the byte") {
        JsonScanner scan(view("  {\"a\" 1}"), 100);
        REQUIRE(scan.expect('{').ok());
        std::string key;
        REQUIRE(scan.string(key).ok());
        CHECK(scan.expect(':').offset == 107);
    }
}
