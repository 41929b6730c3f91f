#!/usr/bin/env bash
#SBATCH --job-name=lotlip-cc3m
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=10
#SBATCH --time=1-00:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@300
# Pre-training on CC3M's 2.8M images: 8 GPUs, 4,096 pairs per step (O).
# Flags are in scripts/recipes/lotlip-cc3m.yaml; flags given to this script are appended.
# Set the three variables, then from the checkout: sbatch scripts/slurm_cc3m.sh
set -euo pipefail
DATA="${DATA:-/path/to/shards}"    # holds *.tar
CACHE="${CACHE:-/path/to/cache}"   # bert-base-uncased/ and vit_base_patch16_224.augreg_in21k/; download them before
LOGS="${LOGS:-logs}"               # visible to all nodes; results: LOGS/lotlip-cc3m

cd "${SLURM_SUBMIT_DIR:-.}"
source scripts/slurm_launch.sh
launch --config "$PWD/scripts/recipes/lotlip-cc3m.yaml" --train-data "$DATA" "$@"
