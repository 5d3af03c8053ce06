#!/usr/bin/env bash
# Builds wheel and sdist, installs each in an environment of its own, and tries it there. The environments
# see the packages of the builder's (torch above all) behind their own: what is tried is fp8sync alone.
set -euo pipefail
cd "$(dirname "$0")/.."
builder=$(realpath -s "${BUILDER:-.venv/bin/python}")
home=$(mktemp -d "${TMPDIR:-/tmp}/fp8sync-dist.XXXXXX")
trap 'rm -rf "$home"' EXIT

packages() { "$1" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'; }

mkdir -p "$home/source" "$home/dist"
git archive --format=tar HEAD | tar -x -C "$home/source"
(
    cd "$home/source"
    for kind in sdist wheel; do
        "$builder" -c "from setuptools import build_meta; build_meta.build_$kind('$home/dist')" \
            >"$home/log" 2>&1 || { cat "$home/log"; exit 1; }
    done
)

unset PYTHONPATH
cd "$home"
for archive in "$home"/dist/*; do
    where=$home/try-$(basename "$archive")
    "$builder" -m venv --without-pip "$where"
    packages "$builder" >"$(packages "$where/bin/python")/seen.pth"
    "$builder" -m pip --python "$where/bin/python" --quiet --disable-pip-version-check \
        install --no-deps --no-build-isolation --ignore-installed "$archive"
    "$where/bin/python" - "$where" <<'EOF'
import sys
from importlib import metadata, resources

import torch

import fp8sync
import fp8sync_kernels

for package in (fp8sync, fp8sync_kernels):
    assert package.__file__.startswith(sys.argv[1]), package.__file__
    assert resources.files(package).joinpath("py.typed").is_file(), package
entry_points = metadata.distribution("fp8sync").entry_points
assert any(entry.group == "vllm.general_plugins" for entry in entry_points)
assert fp8sync_kernels.quantize_blockwise(torch.randn(128, 128), "pow2").scale_inv.shape == (1, 1)
EOF
    "$where/bin/fp8sync" plan --model qwen3-30b-a3b --trainer tp=2,pp=2,dp=2,ep=4,etp=1 --engine tp=2 >/dev/null
    "$where/bin/fp8sync" doctor | grep "plan on paper" >/dev/null
    echo "ok: $(basename "$archive")"
done
