#!/usr/bin/env bash
# Runs the whole test suite on several versions of Python, torch and Detectron2: each row in a clone of this repository
# with an environment of its own. `make matrix` calls it.
#   bash tools/matrix.sh [ROW ...]     ROW: Python,torch,Detectron2, such as 3.12,2.9.1,0.5 or 3.12,2.15.0,head
# Environment: DETECTRON2 is the folder of HEAD's source, without which its rows are left out. MATRIX is the folder of
# the clones (default: build/matrix), about 8 GB each; they stay, and another call installs only what has changed.
# SETUP_ONLY=1 runs no tests.
# What is committed is tested, without CUDA kernels. Every row runs, whatever became of those before it; a table ends
# the output, and the exit status is 1 if a row failed.
set -euo pipefail
cd "$(dirname "$0")/.."
# The least versions, one between, and the latest. `make test` runs 3.11,2.15.0,0.5.
rows=${*:-3.10,2.4.1,0.5 3.12,2.9.1,0.5 3.13,2.15.0,0.5 3.12,2.15.0,head}
head=${DETECTRON2:+$(realpath "$DETECTRON2")}
folder=$(realpath -m "${MATRIX:-build/matrix}")
goal=test
[ -z "${SETUP_ONLY:-}" ] || goal=setup

mkdir -p "$folder"
# Samples that lie beside this project lie beside the clones too.
[ ! -d ../shared ] || ln -sfn "$(realpath ../shared)" "$folder/shared"

export FORCE_CPU=1
table="row|passed|skipped|failed|minutes"
status=0
trap 'exit 130' INT
for row in $rows; do
  IFS=, read -r python torch detectron2 <<<"$row"
  clone=$folder/${row//,/-} begin=$SECONDS
  log=$clone.log
  unset DETECTRON2 DETECTRON2_TOOLS
  if [ "$detectron2" = head ]; then
    if [ -z "$head" ]; then
      table+=$'\n'"$row|left out: DETECTRON2 names no folder"
      continue
    fi
    export DETECTRON2=$head DETECTRON2_TOOLS=$head/tools
  fi
  printf '\n=== %s: %s\n' "$row" "$log"
  if [ -d "$clone" ]; then
    git -C "$clone" fetch --quiet origin HEAD
    git -C "$clone" reset --quiet --hard FETCH_HEAD
  else
    git clone --quiet . "$clone"
  fi
  result=0
  make --directory "$clone" $goal PYTHON="python$python" TORCH="$torch" >"$log" 2>&1 || result=$?
  [ "$result" = 0 ] || status=1
  if [ "$goal" = setup ]; then
    table+=$'\n'"$row|set up with status $result"
    continue
  fi
  # The last line of pytest, such as "1 failed, 980 passed, 20 skipped in 700.12s (0:11:40)".
  last=$(tail -n 1 <<<"$(grep -E '^[= ]*[0-9]+ (failed|passed|skipped).* in [0-9.]+s' "$log" || true)")
  count() { grep -oE "[0-9]+ $1" <<<"$last" | cut -d ' ' -f 1 || echo 0; }
  failed=$(( $(count failed) + $(count error) ))
  [ -n "$last" ] || failed="status $result"
  table+=$'\n'"$row|$(count passed)|$(count skipped)|$failed|$(((SECONDS - begin + 30) / 60))"
done
printf '\n'
column -t -s '|' <<<"$table"
exit "$status"
