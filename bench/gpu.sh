#!/usr/bin/env bash
# Everything that can only be learned on a CUDA device, in at most 8 minutes and without network:
#
#     bench/gpu.sh OUT_DIR [options of `python -m bench`]
#     PARTS="tests backward memory" bench/gpu.sh OUT_DIR      # only these, in this order
#
# Builds the extension, runs the kernel tests and compute-sanitizer (where present), measures the
# ceilings and the suites. OUT_DIR gets report.json (as it goes), report.md with plots, report.txt
# and log.txt. A part that fails or runs out of time leaves a record that says so, and the next one
# starts. All parts together may take longer than 8 minutes: the last ones are cut then, and are
# best run by themselves, with `tests` before them.
set -u -o pipefail
out=$(realpath -m "${1:?usage: bench/gpu.sh OUT_DIR [options of python -m bench]}")
options=("${@:2}")
cd "$(dirname "$0")/.." && mkdir -p "$out"
python=${PYTHON:-python3}
total=${SECONDS_IN_ALL:-470}
parts=${PARTS:-tests ceilings gram step combine_adamw backward memory ratios distributed scaling solve train}
declare -A seconds_of=([tests]=150 [ceilings]=25 [gram]=65 [step]=55 [combine_adamw]=50
    [backward]=100 [memory]=45 [train]=300 [ratios]=40 [distributed]=60 [scaling]=35 [solve]=25)
for name in $parts; do
    : "${seconds_of[$name]:?PARTS must name parts of: ${!seconds_of[*]}}"
done
# The largest lists nearly fill the memory; without this, fragments of it would be lost.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True PYTHONUNBUFFERED=1

part() { # part NAME SECONDS COMMAND...
    local name=$1 seconds=$2 status=0
    ((seconds < total - SECONDS)) || seconds=$((total - SECONDS))
    if ((seconds > 0)); then
        timeout --kill-after=5 "$seconds" "${@:3}" || status=$?
        ((status == 0)) && return
    fi
    "$python" -m bench.records "$out" "$name" \
        "status $status with $seconds s at most (124, 137: killed when they were over)"
}

suite() { # suite NAME SECONDS: told to end by itself 15 seconds before it is killed
    part "$1" "$2" "$python" -m bench "$1" --out "$out" --device cuda --seconds "$(($2 - 15))" \
        "${options[@]}"
}

{
    # egg_info: `import raco_fast` reads its version from the metadata of an installation.
    part build 120 "$python" setup.py --quiet egg_info build_ext --inplace
    for name in $parts; do
        suite "$name" "${seconds_of[$name]}"
    done
    "$python" -m bench.report --out "$out" --render
    "$python" -m bench.records "$out" >"$out/report.txt"
    cat "$out/report.txt"
} 2>&1 | tee "$out/log.txt"
