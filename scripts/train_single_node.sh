#!/usr/bin/env bash
# CC3M-scale pre-training on all GPUs of one machine. Set the three variables, then: bash scripts/train_single_node.sh
# Flags are in scripts/recipes/lotlip-cc3m.yaml; flags given to this script are appended:
# bash scripts/train_single_node.sh --batch-size 256 --accum-freq 2
set -euo pipefail
DATA="${DATA:-data/cc3m}"      # shards: *.tar
CACHE="${CACHE:-cache}"        # bert-base-uncased/ and vit_base_patch16_224.augreg_in21k/; fetched here if missing
LOGS="${LOGS:-logs}"           # results: LOGS/lotlip-cc3m

cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1  # decoding runs in the workers
# Batches of captions differ in length, so memory fragments. The second name is that of older versions of PyTorch.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
export PYTORCH_CUDA_ALLOC_CONF="$PYTORCH_ALLOC_CONF"
# torchrun would stop at SIGHUP under nohup, too.
[[ -z "$(trap -p HUP)" ]] || export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # otherwise restarts find old addresses (pytorch issue 135712)

exec torchrun --standalone --nproc_per_node "${GPUS:-gpu}" --max-restarts 3 -m -- training.main \
    --config "$PWD/scripts/recipes/lotlip-cc3m.yaml" --train-data "$DATA" --cache-dir "$CACHE" --logs "$LOGS" "$@"
