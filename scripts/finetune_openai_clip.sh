#!/usr/bin/env bash
# Fine-tunes OpenAI's CLIP ViT-B/16 for long captions: context stretched from 77 to 248 tokens, both towers trained.
# Set the three variables, then: bash scripts/finetune_openai_clip.sh
# Flags are in scripts/recipes/finetune-openai-clip.yaml; flags given to this script are appended.
set -euo pipefail
DATA="${DATA:-data/long_captions}" # shards, or a .csv, .tsv or .parquet with images and captions
CACHE="${CACHE:-cache}"            # CLIP's weights are fetched here
LOGS="${LOGS:-logs}"               # results: LOGS/clip-long

cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1  # decoding runs in the workers
# Batches of captions differ in length, so memory fragments. The second name is that of older versions of PyTorch.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
export PYTORCH_CUDA_ALLOC_CONF="$PYTORCH_ALLOC_CONF"
# torchrun would stop at SIGHUP under nohup, too.
[[ -z "$(trap -p HUP)" ]] || export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # otherwise restarts find old addresses (pytorch issue 135712)
exec torchrun --standalone --nproc_per_node "${GPUS:-gpu}" --max-restarts 3 -m -- training.main \
    --config "$PWD/scripts/recipes/finetune-openai-clip.yaml" --train-data "$DATA" --cache-dir "$CACHE" --logs "$LOGS" "$@"
# Then: python -m training.main --model ViT-B-16-quickgelu --context-length 248 \
#           --pretrained LOGS/clip-long/checkpoints/epoch_3.pt --urban1k-retrieval ..
