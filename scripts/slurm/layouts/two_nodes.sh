#!/usr/bin/env bash
# FSDP2 over two nodes into TP4 on the first: the rendezvous is an address and a token.
#SBATCH --nodes=2
#SBATCH --time=00:30:00
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
source "${SLURM_SUBMIT_DIR:-.}/scripts/slurm/common.sh"

RANKS_PER_NODE=${RANKS_PER_NODE:-4}
TRAINER_ARGS=(--trainer fsdp2)
ENGINE_ARGS=(--engine-tp 4)
run_case
