# The flags that all pre-training scripts share; they source this file and append what belongs to their scale.
#
#   P  published: paper (arXiv 2410.05249), model cards, checkpoints or data sets say so
#   I  inferred from the published code
#   O  ours: not published, or not checked against the paper; tune these first
RECIPE=(
    --model lotlip_bert-ViT-B-16    # P  BERT-base, 2 corner tokens, 128 tokens, ViT-B/16
    --pretrained-image --lock-image # P  vit_base_patch16_224.augreg_in21k, not trained
    --num-long-captions 3           # P  the raw caption and three long ones: InstructBLIP, LLaVA, ShareGPT4V
    --short-loss-weight 1.0         # I
    --long-loss-weight 1.0          # I
    --beta1 0.9 --beta2 0.98        # I  open_clip's for ViT
    --eps 1e-6                      # I  open_clip's for ViT
    --lr-scheduler cosine           # I
    --wd 0.2                        # I  open_clip's default
    --lr 5e-4 --warmup 2000         # O
    --local-loss --gather-with-grad # O  the same gradients as without, less memory
    --precision amp_bf16            # O
    --workers 8                     # O
    --save-most-recent              # O  beside epoch_N.pt
    --resume latest                 # O  a job queued again goes on where it stopped
    --report-to tensorboard         # O
)
# Not set here: augmentation is open_clip's crop of 0.9-1.0 (P); --strong-augment takes the published code's other one.
# The paper also trains on parts of captions: --sub-caption-sentences N takes N consecutive sentences.
