#!/usr/bin/env bash
# Megatron TP2 into TP4: columns and rows are halved again.
#SBATCH --nodes=1
#SBATCH --time=00:30:00
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
source "${SLURM_SUBMIT_DIR:-.}/scripts/slurm/common.sh"

RANKS_PER_NODE=${RANKS_PER_NODE:-2}
TRAINER_ARGS=(--trainer tp=2)
ENGINE_ARGS=(--engine-tp 4)
run_case
