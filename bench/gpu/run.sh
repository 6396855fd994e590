#!/usr/bin/env bash
# Builds on a machine with a GPU, tests there (also under compute-sanitizer) and measures. Results go to the folder given.
#   bench/gpu/run.sh OUT
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:?usage: bench/gpu/run.sh OUT}
site=$(mktemp -d)
export PYTHONPATH=$site PYTHONUNBUFFERED=1

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
# Build requirements and packages must be there already: such machines often have no network.
python3 -m pip install -q --no-build-isolation --no-deps --no-index --target "$site" .
python3 -c 'from qmoe_core import _C; print(_C.cuda_info())'

python3 -m pytest tests/gpu -p no:cacheprovider
# The caching allocator would hide writes outside a tensor.
for tool in memcheck racecheck initcheck synccheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 150 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
        python3 -m pytest tests/gpu -p no:cacheprovider -k "(5-7 or 33-129 or shape1 or shape2) or garbage or output_types" 2>&1 |
        tee "$out/sanitizer-$tool.log" | tail -n 3
done
python3 bench/gpu/dequantize.py --output "$out/dequantize-gpu.json"
python3 bench/gpu/int_linear.py --output "$out/int-linear.json"
