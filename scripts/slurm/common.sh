# What every job of the matrix shares. A layout script sets LAYOUT, TRAINER_ARGS, RANKS_PER_NODE and
# ENGINE_ARGS, then calls run_case. Everything else comes from the environment that `matrix.py submit` gives.
set -euo pipefail

# ===== BEGIN CONFIG ===== (each may be set outside)
: "${CASE:?set by matrix.py submit}"        # <model>_<trainer>_<engine>_<layout>
: "${MODEL_PATH:?folder of a BF16 Hugging Face checkpoint}"
: "${RECIPE:=blockwise}"                    # blockwise, blockwise-pow2, blockwise-fp32, bf16
: "${RESULTS:=$PWD/results}"                # on a file system that all nodes share
: "${PYTHON:=python}"
: "${CONTAINER:=}"                          # image for pyxis' --container-image; empty: none
: "${MOUNTS:=$PWD:$PWD}"
: "${ROWS:=8}" "${LENGTH:=64}"
: "${PORT:=29400}"                          # below the ephemeral range
: "${DRYRUN:=}"                             # 1: print the command, run nothing
# ===== END CONFIG =====

say() { echo "$(date -u +%FT%TZ) $CASE: $*"; }

# A job that was requeued after it had finished does nothing; one that was cut off starts over.
finished() { [[ -s $RESULTS/$CASE.json ]]; }

in_container() {
    local flags=()
    [[ -n $CONTAINER ]] && flags=(--container-image="$CONTAINER" --container-mounts="$MOUNTS" --no-container-mount-home)
    srun --ntasks-per-node=1 --kill-on-bad-exit=1 "${flags[@]}" "$@"
}

run_case() {
    mkdir -p "$RESULTS"
    if finished; then say "already done"; return; fi
    local nodes=${SLURM_JOB_NUM_NODES:-1} head=127.0.0.1
    if ((nodes > 1)); then head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1); fi
    local unfinished=$RESULTS/.$CASE.$$.json
    local command=("$PYTHON" -m torch.distributed.run
        --nnodes="$nodes" --nproc-per-node="$RANKS_PER_NODE"
        --rdzv-backend=c10d --rdzv-endpoint="$head:$PORT" --rdzv-id="${SLURM_JOB_ID:-0}"
        -m fp8sync.verify.command "$MODEL_PATH" --recipe "$RECIPE"
        --rows "$ROWS" --length "$LENGTH" --host "$head" --json "$unfinished"
        "${TRAINER_ARGS[@]}" "${ENGINE_ARGS[@]}" ${CASE_ARGS:-})
    say "start ${SLURM_RESTART_COUNT:-0}: ${command[*]}"
    if [[ -n $DRYRUN ]]; then return; fi
    local status=0
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} in_container "${command[@]}" || status=$?
    # Whole or not at all; a failed verdict is a result, too. Whatever wrote none is told by the log.
    if [[ -s $unfinished ]]; then mv "$unfinished" "$RESULTS/$CASE.json"; fi
    say "end with status $status"
    return "$status"
}
