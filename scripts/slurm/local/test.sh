#!/usr/bin/env bash
# `make slurm-test`: a SLURM of this machine runs the part of the matrix that two processors can.
set -euo pipefail
cd "$(dirname "$0")/../../.."
: "${PYTHON:=python}"
home=$(mktemp -d "${TMPDIR:-/tmp}/fp8sync-slurm.XXXXXX")
results=${RESULTS:-reports/slurm}
rm -rf "$results"

trap 'scripts/slurm/local/cluster.sh down "$home"; rm -rf "$home"' EXIT
scripts/slurm/local/cluster.sh up "$home"
export SLURM_CONF=$home/slurm.conf PYTHON OMP_NUM_THREADS=1
"$PYTHON" scripts/slurm/tiny_models.py "$home/models"
run() {
    "$PYTHON" scripts/slurm/matrix.py submit --trainers bf16 --results "$results" --wait 900 "$@"
}
run --models dense="$home/models/dense" --engines fp8 --layouts dp2_dp1 fsdp2_tp2
run --models dense="$home/models/dense" --engines bf16 --layouts fsdp2_dp1
run --models gated-moe="$home/models/moe" --engines fp8 --layouts dp2_dp1
"$PYTHON" scripts/slurm/matrix.py summary "$results"
