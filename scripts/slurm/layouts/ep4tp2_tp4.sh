#!/usr/bin/env bash
# Megatron EP4 TP2 into TP4: dense and expert ranks follow two grids.
#SBATCH --nodes=1
#SBATCH --time=00:30:00
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
source "${SLURM_SUBMIT_DIR:-.}/scripts/slurm/common.sh"

RANKS_PER_NODE=${RANKS_PER_NODE:-4}
TRAINER_ARGS=(--trainer tp=2,ep=4,etp=1)
ENGINE_ARGS=(--engine-tp 4)
run_case
