#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "qmoe/matmul.h"

int main(int argc, char** argv) {
    // Runs pinned to an instruction set that this machine lacks are skipped, and say so; "none" is the refusal's own
    // test.
    const char* const forced = std::getenv("QMOE_FORCE_ISA");
    if (forced != nullptr && std::strcmp(forced, "none") != 0 && qmoe::active_isa() == nullptr) {
        std::printf("skipped: this machine or build has no %s kernels\n", forced);
        return 77;
    }
    doctest::Context context(argc, argv);
    return context.run();
}
