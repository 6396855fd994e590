// Every test's first include: doctest, which shows codes by their names, and the shared support.
#pragma once

#include <doctest/doctest.h>

#include "qmoe/status.h"
#include "support.h"

namespace doctest {
template <>
struct StringMaker<qmoe::Code> {
    static String convert(qmoe::Code code) { return qmoe::code_name(code); }
};
}  // namespace doctest
