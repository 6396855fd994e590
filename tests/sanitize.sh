#!/bin/sh
# Builds the C++ tests and fuzzers with AddressSanitizer and UndefinedBehaviorSanitizer and runs all of them.
#   tests/sanitize.sh [BUILD_DIRECTORY]      JOBS=n: compile with n jobs (2); FUZZ=n: inputs per fuzz target (100000)
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-$root/build-asan}
started=$(date +%s)
cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DQMOE_SANITIZE=ON -DQMOE_TESTS=ON -DQMOE_PYTHON=OFF -DQMOE_CUDA=OFF \
    -DQMOE_FUZZ_ITERATIONS="${FUZZ:-100000}"
cmake --build "$build" -j "${JOBS:-2}"
# Leaks count as errors too. An allocation that a hostile size asks for must fail softly, not end the process.
export ASAN_OPTIONS=detect_leaks=1:allocator_may_return_null=1:strict_string_checks=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
if ctest --test-dir "$build" --output-on-failure --verbose > "$build/sanitize.log" 2>&1; then
    grep -E "test cases:|inputs, |payloads|refused by verify|bit flips|hostile|skipped:" "$build/sanitize.log" | sed 's/^[0-9]*: //'
    echo "sanitize: all tests passed under ASan and UBSan in $(($(date +%s) - started)) s"
else
    tail -n 100 "$build/sanitize.log"
    echo "sanitize: FAILED, see $build/sanitize.log"
    exit 1
fi
