#!/usr/bin/env bash
# `make slurm-test`: a SLURM of two nodes on this machine runs the part of the matrix that two processors can.
# Megatron's rows need the environment of `make test-megatron`; without it they are listed as not run.
set -euo pipefail
cd "$(dirname "$0")/../../.."
: "${PYTHON:=python}" "${MEGATRON_PYTHON:=$PWD/.venv-megatron/bin/python}"
home=$(mktemp -d "${TMPDIR:-/tmp}/fp8sync-slurm.XXXXXX")
results=$(realpath -m "${RESULTS:-reports/slurm}")
models=$home/models
rm -rf "$results"

trap 'scripts/slurm/local/cluster.sh down "$home"; rm -rf "$home"' EXIT
scripts/slurm/local/cluster.sh up "$home"
export SLURM_CONF=$home/slurm.conf PYTHON OMP_NUM_THREADS=1
export ROWS=4 LENGTH=48 RANKS_PER_NODE=2 ENGINE_TP=2 MAX_RANKS=4
"$PYTHON" scripts/slurm/tiny_models.py "$models"

run() { # TRAINERS ENGINES LAYOUTS MODEL...
    local pairs=() model
    for model in "${@:4}"; do pairs+=("$model=$models/$model"); done
    # shellcheck disable=SC2086
    "$PYTHON" scripts/slurm/matrix.py submit --results "$results" --trainers $1 --engines $2 --layouts $3 --models "${pairs[@]}"
}
# One job is cut off and requeued, which SLURM would put off for two minutes.
requeued=dense_bf16_bf16_fsdp2_dp1
requeue() {
    timeout 60 bash -c "until grep -qs 'start 0' '$results'/logs/$requeued-*.log; do sleep 1; done"
    local job
    job=$(squeue --noheader --name="$requeued" --format=%i)
    scontrol requeue "$job"
    sleep 3
    scontrol update JobId="$job" StartTime=now
}

run bf16 bf16 fsdp2_dp1 dense
requeue
run bf16 fp8 two_nodes hybrid mla
run bf16 fp8 "dp2_dp1 fsdp2_tp2 two_nodes" dense
run bf16 fp8-kv dp2_dp1 dense
run bf16 fp8 dp2_dp1 gated-moe
RANKS_PER_NODE=1 ENGINE_TP=1 run bf16 fp8 fsdp2_nodes dense

if [[ -x $MEGATRON_PYTHON ]]; then
    export ENGINE_PYTHON=$PYTHON PYTHON=$MEGATRON_PYTHON VERIFY=scripts.slurm.local.megatron_cpu
fi
unset RANKS_PER_NODE ENGINE_TP
run "bf16 fp8" fp8 tp2_tp4 dense
run fp8 bf16 tp2_tp4 dense # converted on the way
run bf16 fp8 tp2pp2_tp4 dense
run bf16 fp8 "ep4tp2_tp4 ep4tp2pp2_tp4 ep8pp2_tp8" gated-moe
may_not_run=("mla_*" "hybrid_*" "*_ep4tp2pp2_tp4" "*_ep8pp2_tp8")
if [[ -z ${ENGINE_PYTHON:-} ]]; then may_not_run+=("*_tp2_tp4" "*_tp2pp2_tp4" "*_ep4tp2_tp4"); fi

timeout 1800 bash -c 'while [[ -n $(squeue --noheader) ]]; do sleep 2; done'
grep --quiet "start 1" "$results"/logs/$requeued-*.log
"${ENGINE_PYTHON:-$PYTHON}" scripts/slurm/matrix.py summary "$results" --may-not-run "${may_not_run[@]}" \
    --report "$results/matrix.html"
