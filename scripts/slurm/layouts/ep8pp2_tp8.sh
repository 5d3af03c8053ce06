#!/usr/bin/env bash
# Megatron EP8 PP2 into TP8: experts whole on one side, cut in eight on the other.
#SBATCH --nodes=1
#SBATCH --time=00:30:00
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
source "${SLURM_SUBMIT_DIR:-.}/scripts/slurm/common.sh"

RANKS_PER_NODE=${RANKS_PER_NODE:-16}
TRAINER_ARGS=(--trainer pp=2,ep=8)
ENGINE_ARGS=(--engine-tp 8)
run_case
