#!/usr/bin/env bash
# Fine-tunes OpenAI's CLIP ViT-B/16 for long captions: context stretched from 77 to 248 tokens, both towers trained.
# Set the three variables, then: bash scripts/finetune_openai_clip.sh
#
# The stretch is Long-CLIP's (arXiv 2403.15378; P): the first 20 positions stay, the others are interpolated. So is the
# global batch of 2,048 (P, its authors' issues): here 8 GPUs x 256. Learning rates, warm-up, decay and epochs are ours.
set -euo pipefail
DATA="${DATA:-data/long_captions}" # shards, or a .csv, .tsv or .parquet with images and captions
CACHE="${CACHE:-cache}"            # CLIP's weights are fetched here
LOGS="${LOGS:-logs}"               # results: LOGS/clip-long

cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1  # decoding runs in the workers
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # restarts would meet what is left of the last try (pytorch issue 135712)
# OpenAI's weights want QuickGELU: named in the model, so that an evaluation of the checkpoint has it, too.
exec torchrun --standalone --nproc_per_node "${GPUS:-gpu}" --max-restarts 3 -m -- training.main \
    --model ViT-B-16-quickgelu --pretrained openai --context-length 248 \
    --train-data "$DATA" --cache-dir "$CACHE" --logs "$LOGS" --name clip-long \
    --num-long-captions 1 --batch-size 256 --epochs 3 --lr 1e-5 --text-lr 2e-5 --warmup 200 --wd 0.05 \
    --grad-clip-norm 1.0 --local-loss --precision amp_bf16 --workers 8 --save-most-recent --resume latest "$@"
# Then: python -m training.main --model ViT-B-16-quickgelu --context-length 248 \
#           --pretrained LOGS/clip-long/checkpoints/epoch_3.pt --urban1k-retrieval ..
