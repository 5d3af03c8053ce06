#!/usr/bin/env bash
# Megatron EP4 into EP4: whole experts on both sides.
#SBATCH --nodes=1
#SBATCH --time=00:30:00
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
source "${SLURM_SUBMIT_DIR:-.}/scripts/slurm/common.sh"

RANKS_PER_NODE=${RANKS_PER_NODE:-4}
TRAINER_ARGS=(--trainer ep=4)
ENGINE_ARGS=(--engine-tp 4 --engine-ep)
run_case
