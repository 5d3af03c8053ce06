# What every job of the matrix shares. A layout script sets RANKS_PER_NODE, TRAINER_ARGS and ENGINE_ARGS, and
# ENGINE_APART=1 if the engine has the last node for itself, then calls run_case. Everything else comes from the
# environment that `matrix.py submit` gives.
set -euo pipefail

# ===== BEGIN CONFIG ===== (each may be set outside)
: "${CASE:?set by matrix.py submit}"        # <model>_<trainer>_<engine>_<layout>
: "${MODEL_PATH:?folder of a BF16 Hugging Face checkpoint}"
: "${RECIPE:=blockwise}"                    # blockwise, blockwise-pow2, blockwise-fp32, bf16
: "${RESULTS:=$PWD/results}"                # on a file system that all nodes share
: "${PYTHON:=python}"                       # the trainer's
: "${ENGINE_PYTHON:=$PYTHON}"               # vLLM's, where it has an environment of its own
: "${VERIFY:=fp8sync.verify.command}"       # module that torchrun starts
: "${CONTAINER:=}"                          # image for pyxis' --container-image; empty: none
: "${MOUNTS:=$PWD:$PWD}"
: "${ROWS:=8}" "${LENGTH:=64}"              # an engine on another node answers in JSON: 100 bytes x vocabulary a token
: "${PORT:=29400}" "${ENGINE_PORT:=28199}"  # below the ephemeral range
: "${INTERFACE:=}"                          # network interface for gloo and NCCL; empty: they pick
: "${MAX_RANKS:=}"                          # trainer ranks that a node can hold; empty: any number
: "${DRYRUN:=}"                             # 1: print the commands, run nothing
# ===== END CONFIG =====

say() { echo "$(date -u +%FT%TZ) $CASE: $*"; }

# A job that was requeued after it had finished does nothing; one that was cut off starts over.
finished() { [[ -s $RESULTS/$CASE.json ]] && ! grep -q '"not_run"' "$RESULTS/$CASE.json"; }

# srun --nodes=N --nodelist=... COMMAND: one task on each of these nodes, beside other steps of the job.
step() {
    local where=("$1" "$2") flags=(--ntasks-per-node=1 --overlap --kill-on-bad-exit=1)
    shift 2
    [[ -n $CONTAINER ]] && flags+=(--container-image="$CONTAINER" --container-mounts="$MOUNTS" --no-container-mount-home)
    if [[ -n $DRYRUN ]]; then echo srun "${where[@]}" "${flags[@]}" "$@"; else srun "${where[@]}" "${flags[@]}" "$@"; fi
}

run_case() {
    mkdir -p "$RESULTS/logs"
    if finished; then say "already done"; return; fi
    rm -f "$RESULTS/.$CASE".*
    if [[ -n $MAX_RANKS ]] && ((RANKS_PER_NODE > MAX_RANKS)); then
        say "not run"
        echo "{\"not_run\": \"$RANKS_PER_NODE trainer ranks on a node, which holds $MAX_RANKS\"}" >"$RESULTS/$CASE.json"
        return
    fi

    local nodes head=127.0.0.1 engine=127.0.0.1 trainers apart=${ENGINE_APART:-}
    mapfile -t nodes < <(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}")
    trainers=$((${#nodes[@]} - (apart ? 1 : 0)))
    # One node keeps to its loopback; several reach each other by name.
    if ((${#nodes[@]} > 1)); then head=${nodes[0]} engine=${nodes[-1]}; fi
    if [[ -n $INTERFACE ]]; then export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE; fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

    local unfinished=$RESULTS/.$CASE.json
    local command=("$PYTHON" -m torch.distributed.run
        --nnodes="$trainers" --nproc-per-node="$RANKS_PER_NODE"
        --rdzv-backend=c10d --rdzv-endpoint="$head:$PORT" --rdzv-id="${SLURM_JOB_ID:-0}"
        -m "$VERIFY" "$MODEL_PATH" --recipe "$RECIPE"
        --rows "$ROWS" --length "$LENGTH" --host "$head" --json "$unfinished"
        "${TRAINER_ARGS[@]}" "${ENGINE_ARGS[@]}" ${CASE_ARGS:-})
    say "start ${SLURM_RESTART_COUNT:-0} on ${nodes[*]}"

    local host="" shared=$RESULTS/logs/$CASE-${SLURM_JOB_ID:-0}.engine
    if [[ -n $apart || $ENGINE_PYTHON != "$PYTHON" ]]; then
        rm -rf "$shared"
        mkdir -p "$shared"
        command+=(--engine-at "$shared")
        local beside=0
        if [[ -z $apart ]]; then beside=$RANKS_PER_NODE; fi
        step --nodes=1 --nodelist="${nodes[-1]}" "$ENGINE_PYTHON" -m fp8sync.verify.host "$shared" \
            --address "$engine" --port "$ENGINE_PORT" --trainers-here "$beside" &
        host=$!
    fi
    local status=0
    step --nodes="$trainers" --nodelist="$(IFS=,; echo "${nodes[*]:0:trainers}")" "${command[@]}" || status=$?
    if [[ -n $host ]]; then
        if [[ -z $DRYRUN ]]; then kill "$host" 2>/dev/null || true; fi
        wait "$host" || true
    fi
    # Whole or not at all; a failed verdict is a result, too. Whatever wrote none is told by the log.
    if [[ -s $unfinished ]]; then mv "$unfinished" "$RESULTS/$CASE.json"; fi
    say "end with status $status"
    return "$status"
}
