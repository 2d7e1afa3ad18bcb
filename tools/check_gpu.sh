#!/usr/bin/env bash
# Checks what only a GPU can show: the tests that need one, the CUDA kernels under the tools of compute-sanitizer, and
# the benchmarks. `make check-gpu` calls it.
#   bash tools/check_gpu.sh [PYTHON]     PYTHON: with the project installed (default: .venv/bin/python)
# It needs the CUDA kernels, compute-sanitizer of a CUDA toolkit, and memory for 4 images of COCO's size. Every stage
# runs, whatever became of those before it; a summary ends the output, and the exit status is 1 if a stage failed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}

"$python" -W ignore -c '
import sys

import torch

from gkd_d2.losses import fused

if not torch.cuda.is_available():
    sys.exit("make check-gpu needs a GPU that torch can use, and there is none")
sys.exit(fused.unavailable_reason(torch.device("cuda")))'

summary=()
status=0
# pytest ends by itself when interrupted, and the next stage would begin.
trap 'exit 130' INT

stage() { # NAME COMMAND...
  local name=$1 begin=$SECONDS result=passed
  shift
  printf '\n=== %s: %s\n' "$name" "$*"
  "$@" || result="FAILED with status $?"
  [ "$result" = passed ] || status=1
  summary+=("$name: $result, $((SECONDS - begin)) s")
}

stage "tests" "$python" -m pytest -m cuda

# All types and both layouts, with whole vectors and remainders; few tensors and small ones, for the tools are slow.
selection="(test_equals_reference and (attention_gradient-abs or attention-relu)) or large_maps or box_counts or other_layouts"
if sanitizer=$(command -v compute-sanitizer || command -v "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer"); then
  for tool in memcheck initcheck racecheck synccheck; do
    # Memory of each tensor by itself, so that reading past one is seen.
    stage "sanitizer $tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 --launch-timeout 60 \
      "$python" -m pytest tests/losses/test_fused.py -m cuda -k "$selection"
  done
else
  status=1
  summary+=("sanitizer: FAILED, for compute-sanitizer is neither on PATH nor in bin/ of CUDA_HOME; a CUDA toolkit has it")
fi

for options in "--dtype float32" "--dtype float16" "--dtype bfloat16" "--layout channels_last"; do
  # shellcheck disable=SC2086 # two words
  stage "losses $options" "$python" tools/benchmark_losses.py --device cuda --shapes coco --batch 4 $options
done

for detector in frcnn retinanet; do
  stage "step $detector" "$python" tools/benchmark_step.py --config-file "configs/gkd_${detector}_kitti.yaml" \
    --device cuda --batch 4 --size 800 1333 --setting default --setting float16 --setting bfloat16
done

printf '\n=== summary\n'
printf '%s\n' "${summary[@]}"
exit "$status"
