#!/usr/bin/env bash
# FSDP2 over two ranks into TP2: both sides are cut, along different dims.
#SBATCH --nodes=1
#SBATCH --time=00:30:00
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
source "${SLURM_SUBMIT_DIR:-.}/scripts/slurm/common.sh"

RANKS_PER_NODE=${RANKS_PER_NODE:-2}
TRAINER_ARGS=(--trainer fsdp2)
ENGINE_ARGS=(--engine-tp 2)
run_case
