#!/usr/bin/env bash
# FSDP2 over two ranks into one worker: no rank holds a whole matrix.
#SBATCH --nodes=1
#SBATCH --time=00:30:00
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
source "${SLURM_SUBMIT_DIR:-.}/scripts/slurm/common.sh"

RANKS_PER_NODE=${RANKS_PER_NODE:-2}
TRAINER_ARGS=(--trainer fsdp2)
ENGINE_ARGS=(--engine-tp 1)
run_case
