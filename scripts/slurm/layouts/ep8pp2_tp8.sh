#!/usr/bin/env bash
# Megatron EP8 PP2 on two nodes into TP8 on a third: experts whole on one side, cut in eight on the other.
#SBATCH --nodes=3
#SBATCH --time=00:30:00
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
source "${SLURM_SUBMIT_DIR:-.}/scripts/slurm/common.sh"

ENGINE_APART=1
RANKS_PER_NODE=${RANKS_PER_NODE:-8}
TRAINER_ARGS=(--trainer pp=2,ep=8)
ENGINE_ARGS=(--engine-tp "${ENGINE_TP:-8}")
run_case
