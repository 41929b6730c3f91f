#!/usr/bin/env bash
#SBATCH --job-name=lotlip-100m
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=10
#SBATCH --time=7-00:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@300
# Pre-training on 100M images, the 30M of slurm_30m.sh + LAION (49M) + COYO (24M) (P): 32 GPUs, 16,384 pairs per step (O).
# Flags are in scripts/recipes/lotlip-100m.yaml; flags given to this script are appended.
# Set the three variables, then from the checkout: sbatch scripts/slurm_100m.sh
set -euo pipefail
DATA="${DATA:-/path/to/shards}"    # holds cc3m/, cc12m/, yfcc15m/, laion/ and coyo/, each with its *.tar
CACHE="${CACHE:-/path/to/cache}"   # bert-base-uncased/ and vit_base_patch16_224.augreg_in21k/; download them before
LOGS="${LOGS:-logs}"               # visible to all nodes; results: LOGS/lotlip-100m

cd "${SLURM_SUBMIT_DIR:-.}"
source scripts/slurm_launch.sh
launch --config "$PWD/scripts/recipes/lotlip-100m.yaml" --train-data "$DATA/cc3m::$DATA/cc12m::$DATA/yfcc15m::$DATA/laion::$DATA/coyo" "$@"
