#!/usr/bin/env bash
# FSDP2 over two nodes, TP4 on the first: one torchrun across both.
#SBATCH --nodes=2
#SBATCH --time=00:30:00
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
source "${SLURM_SUBMIT_DIR:-.}/scripts/slurm/common.sh"

RANKS_PER_NODE=${RANKS_PER_NODE:-4}
TRAINER_ARGS=(--trainer fsdp2)
ENGINE_ARGS=(--engine-tp "${ENGINE_TP:-4}")
run_case
