#!/usr/bin/env bash
# Megatron EP4 TP2 PP2 on one node into TP4 on another: the two grids, in two stages.
#SBATCH --nodes=2
#SBATCH --time=00:30:00
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
source "${SLURM_SUBMIT_DIR:-.}/scripts/slurm/common.sh"

ENGINE_APART=1
RANKS_PER_NODE=${RANKS_PER_NODE:-8}
TRAINER_ARGS=(--trainer tp=2,pp=2,ep=4,etp=1)
ENGINE_ARGS=(--engine-tp "${ENGINE_TP:-4}")
run_case
