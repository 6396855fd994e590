#include "json.h"

#include <cstring>

namespace qmoe {
namespace {

bool is_digit(uint8_t c) noexcept {
    return c >= '0' && c <= '9';
}

void append_utf8(uint32_t point, std::string& out) {
    if (point < 0x80) {
        out += static_cast<char>(point);
        return;
    }
    const int extra = point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
    static constexpr uint32_t kLead[] = {0, 0xC0, 0xE0, 0xF0};
    out += static_cast<char>(kLead[extra] | point >> (6 * extra));
    for (int i = extra - 1; i >= 0; --i) out += static_cast<char>(0x80 | ((point >> (6 * i)) & 0x3F));
}

// Length of the valid UTF-8 sequence at p, 0 if there is none: overlong forms, surrogates and points over 10FFFF are
// none.
size_t utf8_length(const uint8_t* p, size_t left) noexcept {
    const uint8_t lead = p[0];
    if (lead < 0x80) return 1;
    const size_t length = lead >= 0xC2 && lead <= 0xDF   ? 2
                          : (lead & 0xF0) == 0xE0        ? 3
                          : lead >= 0xF0 && lead <= 0xF4 ? 4
                                                         : 0;
    if (length == 0 || length > left) return 0;
    for (size_t i = 1; i < length; ++i)
        if ((p[i] & 0xC0) != 0x80) return 0;
    const uint8_t second = p[1];
    if ((lead == 0xE0 && second < 0xA0) || (lead == 0xED && second > 0x9F) || (lead == 0xF0 && second < 0x90) ||
        (lead == 0xF4 && second > 0x8F))
        return 0;
    return length;
}

}  // namespace

void JsonScanner::skip_space() noexcept {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r'))
        ++at_;
}

bool JsonScanner::accept(char c) noexcept {
    skip_space();
    if (at_ == text_.size() || text_[at_] != static_cast<uint8_t>(c)) return false;
    ++at_;
    return true;
}

Status JsonScanner::expect(char c) noexcept {
    if (accept(c)) return {};
    switch (c) {
        case '{': return refuse("JSON: expected an object");
        case '}': return refuse("JSON: expected a comma or the end of an object");
        case '[': return refuse("JSON: expected an array");
        case ']': return refuse("JSON: expected a comma or the end of an array");
        case ':': return refuse("JSON: expected a colon");
        case '"': return refuse("JSON: expected a string");
        default: return refuse("JSON: expected a comma");
    }
}

Status JsonScanner::string(std::string& out) {
    out.clear();
    QMOE_TRY(expect('"'));
    while (at_ < text_.size()) {
        const uint8_t c = text_[at_];
        if (c == '"') {
            ++at_;
            return {};
        }
        if (c == '\\') {
            QMOE_TRY(escape(out));
        } else {
            QMOE_TRY(plain_character(out));
        }
    }
    return refuse("JSON: a string does not end");
}

Status JsonScanner::plain_character(std::string& out) {
    if (text_[at_] < 0x20) return Status::error(Code::kName, "JSON: a raw control character in a string", offset());
    const size_t length = utf8_length(text_.data() + at_, text_.size() - at_);
    if (length == 0) return Status::error(Code::kName, "JSON: a string is not UTF-8", offset());
    out.append(reinterpret_cast<const char*>(text_.data() + at_), length);
    at_ += length;
    return {};
}

Status JsonScanner::hex4(uint32_t& out) noexcept {
    if (text_.size() - at_ < 4) return refuse("JSON: a \\u escape is cut short");
    out = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
        const uint8_t c = text_[at_], lower = c | 0x20;
        if (!is_digit(c) && !(lower >= 'a' && lower <= 'f'))
            return refuse("JSON: a \\u escape needs four hexadecimal digits");
        out = out << 4 | static_cast<uint32_t>(is_digit(c) ? c - '0' : lower - 'a' + 10);
    }
    return {};
}

Status JsonScanner::escape(std::string& out) {
    ++at_;
    if (at_ == text_.size()) return refuse("JSON: a string does not end");
    static constexpr char kFrom[] = "\"\\/bfnrt", kTo[] = "\"\\/\b\f\n\r\t";
    const uint8_t c = text_[at_];
    if (c != 'u') {
        const char* const found = c == 0 ? nullptr : std::strchr(kFrom, c);
        if (found == nullptr) return refuse("JSON: unknown escape");
        out += kTo[found - kFrom];
        ++at_;
        return {};
    }
    const uint64_t begin = offset() - 1;
    ++at_;
    uint32_t point = 0;
    QMOE_TRY(hex4(point));
    if (point >= 0xD800 && point <= 0xDFFF) {
        uint32_t low = 0;
        const bool paired = point < 0xDC00 && text_.size() - at_ >= 2 && text_[at_] == '\\' && text_[at_ + 1] == 'u';
        if (paired) {
            at_ += 2;
            QMOE_TRY(hex4(low));
        }
        if (low < 0xDC00 || low > 0xDFFF) return Status::error(Code::kName, "JSON: half of a surrogate pair", begin);
        point = 0x10000 + ((point - 0xD800) << 10) + (low - 0xDC00);
    }
    append_utf8(point, out);
    return {};
}

Status JsonScanner::number(uint64_t& out) noexcept {
    skip_space();
    const size_t begin = at_;
    out = 0;
    for (; at_ < text_.size() && is_digit(text_[at_]); ++at_)
        if (__builtin_mul_overflow(out, 10u, &out) || __builtin_add_overflow(out, text_[at_] - uint64_t{'0'}, &out))
            return Status::error(Code::kOverflow, "JSON: a number does not fit 64 bits", base_ + begin);
    if (at_ == begin) return refuse("JSON: expected a whole number without sign");
    if (at_ - begin > 1 && text_[begin] == '0') return refuse("JSON: a number with a leading zero");
    if (at_ < text_.size() && (text_[at_] == '.' || (text_[at_] | 0x20) == 'e'))
        return refuse("JSON: expected a whole number");
    return {};
}

Status JsonScanner::skip_scalar() {
    skip_space();
    if (at_ < text_.size() && text_[at_] == '"') {
        std::string ignored;
        return string(ignored);
    }
    for (const char* literal : {"true", "false", "null"}) {
        const size_t length = std::strlen(literal);
        if (text_.size() - at_ >= length && std::memcmp(text_.data() + at_, literal, length) == 0) {
            at_ += length;
            return {};
        }
    }
    const auto digits = [this] {
        const size_t begin = at_;
        while (at_ < text_.size() && is_digit(text_[at_])) ++at_;
        return at_ > begin;
    };
    const auto take = [this](char c) {
        return at_ < text_.size() && text_[at_] == static_cast<uint8_t>(c) ? (++at_, true) : false;
    };
    take('-');
    if (!digits()) return refuse("JSON: expected a value");
    if (take('.') && !digits()) return refuse("JSON: expected digits after the point");
    if (take('e') || take('E')) {
        if (!take('-')) take('+');
        if (!digits()) return refuse("JSON: expected digits in the exponent");
    }
    return {};
}

Status JsonScanner::skip_value() {
    constexpr uint32_t kMaxDepth = 32;
    uint64_t objects = 0;  // a stack of bits: is the container at this depth an object?
    uint32_t depth = 0;
    std::string ignored;
    const auto key = [&]() -> Status {
        QMOE_TRY(string(ignored));
        return expect(':');
    };
    while (true) {
        const bool object = accept('{');
        if (object || accept('[')) {
            if (depth == kMaxDepth) return Status::error(Code::kLimit, "JSON: nested too deeply", offset());
            if (!accept(object ? '}' : ']')) {
                objects = objects << 1 | static_cast<uint64_t>(object);
                ++depth;
                if (object) QMOE_TRY(key());
                continue;
            }
        } else {
            QMOE_TRY(skip_scalar());
        }
        // A value ended: another one follows, or its containers end too.
        while (depth > 0 && !accept(',')) {
            QMOE_TRY(expect((objects & 1) != 0 ? '}' : ']'));
            objects >>= 1;
            --depth;
        }
        if (depth == 0) return {};
        if ((objects & 1) != 0) QMOE_TRY(key());
    }
}

Status JsonScanner::end() noexcept {
    skip_space();
    return at_ == text_.size() ? Status{} : refuse("JSON: text after the end");
}

}  // namespace qmoe
