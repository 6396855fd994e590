#!/usr/bin/env bash
# Builds on a machine with a GPU, for that GPU alone, and then tests there (also under compute-sanitizer) and measures, or
# does some of that. Results go to the folder given. What fails does not keep the rest from running, but the exit status
# tells.
#   bench/gpu/run.sh OUT [PART ...]    parts: tests sanitizer dequantize int_linear int_experts ternary ternary_codec
#                                             pruning_throughput
# TESTS: what pytest is to run, instead of tests/gpu.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:?usage: bench/gpu/run.sh OUT [PART ...]}
shift
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(tests sanitizer dequantize int_linear int_experts ternary ternary_codec pruning_throughput)
site=$(mktemp -d)
export PYTHONPATH=$site PYTHONUNBUFFERED=1
failed=0

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
[ "$architecture" = 90 ] && architecture=90a
# Build requirements and packages must be there already: such machines often have no network.
CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) python3 -m pip install -q --no-build-isolation --no-deps --no-index \
    --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES="$architecture-real" --target "$site" .
python3 -c 'from qmoe_core import _C; print(_C.cuda_info())'

for part in "${parts[@]}"; do
    printf '=== %s, after %d s\n' "$part" $SECONDS
    case $part in
    tests)
        # References are made by the CPU: a process a core, of one thread each, where that can be.
        workers=$(python3 -c 'import importlib.util as u; print("-n auto" if u.find_spec("xdist") else "")')
        # shellcheck disable=SC2086
        OMP_NUM_THREADS=1 python3 -m pytest ${TESTS:-tests/gpu} $workers -p no:cacheprovider >"$out/tests.log" 2>&1 ||
            failed=1
        # A run that broke off has no such line, and must not end this script.
        grep -E '^(FAILED|ERROR|E  )|^[.FEsx]+ +\[100%\]|passed|failed' "$out/tests.log" | cut -c 1-200 | tail -n 30 ||
            tail -n 5 "$out/tests.log"
        ;;
    sanitizer)
        for tool in memcheck racecheck initcheck synccheck; do
            # The caching allocator would hide writes outside a tensor.
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 150 compute-sanitizer --tool "$tool" --error-exitcode 9 \
                --target-processes all python3 -m pytest tests/gpu -p no:cacheprovider \
                -k "(5-7 or 33-129 or shape1 or shape2) or garbage or output_types" 2>&1 |
                tee "$out/sanitizer-$tool.log" | tail -n 3 || failed=1
        done
        ;;
    *) python3 "bench/gpu/$part.py" --output "$out/${part//_/-}.json" || failed=1 ;;
    esac
done
exit "$failed"
