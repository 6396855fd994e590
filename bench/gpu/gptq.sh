#!/usr/bin/env bash
# Calibrated quantization on a machine with a GPU: builds, tests, measures, and tests under compute-sanitizer. What fails
# does not keep the rest from running, but the exit status tells.
#   bench/gpu/gptq.sh OUT [options of gptq_throughput.py]
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:?usage: bench/gpu/gptq.sh OUT [options of gptq_throughput.py]}
shift
site=$(mktemp -d)
export PYTHONPATH=$site PYTHONUNBUFFERED=1
failed=0
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) python3 -m pip install -q --no-build-isolation --no-deps --no-index --target "$site" .
timeout 240 python3 -m pytest -q tests/gpu tests/python/test_calibration.py -k "gpu or cuda" -p no:cacheprovider || failed=1
python3 bench/gpu/gptq_throughput.py --output "$out/gptq-gpu.json" "$@" || failed=1
for tool in memcheck racecheck; do
    # The caching allocator would hide writes outside a tensor.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 200 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
        python3 -m pytest -q tests/gpu/test_feedback.py -p no:cacheprovider -k "(twin and (shape1 or shape2)) or chosen or sums" 2>&1 |
        tee "$out/sanitizer-$tool.log" | tail -n 3 || failed=1
done
exit "$failed"
