"""The loss with its gradients: computed in blocks, against whole logits matrices."""

import torch
from torch.nn.functional import normalize

from benchmarks import published
from benchmarks.measure import Figure, Setting, check_close, fastest, peak_bytes
from training.loss.caption_loss import LongCaptionLoss


def run(setting: Setting) -> list[Figure]:
    """Measures the loss with gradients for both towers, with the global batch on one device and features in fp32."""
    batch, num_texts, dim = setting.pick((4096, 2, 16), (8192, 4, 256), (16384, 10, 768))
    torch.manual_seed(0)
    images = normalize(torch.randn(batch, dim, device=setting.device), dim=-1).requires_grad_()
    texts = normalize(torch.randn(batch, num_texts, dim, device=setting.device), dim=-1).requires_grad_()
    scale = torch.tensor(50.0, device=setting.device, requires_grad=True)
    ours_loss = LongCaptionLoss()

    def work(loss: object) -> tuple[torch.Tensor, ...]:
        total = loss(images, texts, scale)
        return total.detach(), *torch.autograd.grad(total, (images, texts, scale))

    sides = {"baseline": lambda: work(published.loss), "ours": lambda: work(ours_loss)}
    for name, got, expected in zip(("value", "d images", "d texts", "d scale"), sides["ours"](), sides["baseline"]()):
        check_close(f"loss, {name}", got, expected, 1e-3)
        del got, expected
    memory = {name: peak_bytes(side, setting) for name, side in sides.items()}
    seconds = fastest(sides, setting)
    return [
        Figure(
            "loss",
            f"loss and gradients: batch {batch:,}, {num_texts} text features of {dim}",
            {"memory_ratio": memory["baseline"] / memory["ours"], "time_ratio": seconds["baseline"] / seconds["ours"]},
            {"peak_bytes": memory, "seconds": seconds, "feature_bytes": 4 * batch * dim * (1 + num_texts)},
        )
    ]
