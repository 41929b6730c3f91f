"""The loss at the largest published batch size, where whole logits matrices don't fit; only ours is measured."""

import torch
from torch.nn.functional import normalize

from benchmarks.measure import Figure, Setting, fastest, peak_bytes
from training.loss.caption_loss import LongCaptionLoss


def run(setting: Setting) -> list[Figure]:
    """Measures batch 65,536 with 10 text features of 768 on a GPU, less on a CPU; features in fp32."""
    batch, num_texts, dim = setting.pick((4096, 2, 64), (16384, 4, 256), (65536, 10, 768))
    torch.manual_seed(0)
    images = normalize(torch.randn(batch, dim, device=setting.device), dim=-1).requires_grad_()
    texts = normalize(torch.randn(batch, num_texts, dim, device=setting.device), dim=-1).requires_grad_()
    scale = torch.tensor(50.0, device=setting.device, requires_grad=True)
    loss = LongCaptionLoss()

    def work() -> None:
        torch.autograd.grad(loss(images, texts, scale), (images, texts, scale))

    memory = peak_bytes(work, setting)
    seconds = fastest({"ours": work}, setting)["ours"]
    whole = 2 * 4 * batch * batch * num_texts  # both logits matrices of every text feature, in fp32
    return [
        Figure(
            "loss_large",
            f"loss and gradients: batch {batch:,}, {num_texts} text features of {dim}; logits alone would take "
            f"{whole / 1e9:,.1f} GB",
            {"memory_ratio": whole / memory},
            {"peak_bytes": {"baseline": whole, "ours": memory}, "seconds_ours": seconds},
        )
    ]
