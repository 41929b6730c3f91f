"""Shows a model's corner tokens for a caption: their attention over the words, and the similarity of their features.

    python -m training.corner_view "A red car. Two dogs run on the left." --model lotlip_bert-ViT-B-16 \\
      --pretrained model.pt --out corners.png

Writes a figure (.png, .svg or .pdf, by the suffix) and a .json file of the same name with its numbers.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.flags.types import command_parser

SUFFIXES = (".png", ".svg", ".pdf")


def view(args: argparse.Namespace) -> dict[str, Any]:
    """Encodes a caption and collects attention and features.

    Returns:
        ``words``; ``tokens``: names of [CLS] (or [EOT]) and the corners; ``attention``: for each of these tokens, its
        attention to each word, summed over word pieces; ``elsewhere``: its attention to special tokens;
        ``similarity``: cosines between the tokens' features, [m + 1, m + 1]; ``model``, ``pretrained`` and ``layer``.

    Raises:
        ValueError, FileNotFoundError: see `factory.create_model`; or the model's attention can't be shown.
    """
    import torch

    from training.flags.model import tokenizer_arguments
    from training.model.assembly.factory import create_model, get_tokenizer
    from training.model.names.config import resolve_weights
    from training.model.towers.text_tower import special_attention

    resolve_weights(args.model, args.pretrained, args.cache_dir)  # reports a wrong name before anything is built
    overrides: Any = tokenizer_arguments(vars(args))
    tokenizer: Any = get_tokenizer(args.model, **overrides)
    torch.manual_seed(0)
    model: Any = create_model(args.model, args.pretrained, **overrides).eval()
    ids = tokenizer([args.caption])
    attention = special_attention(getattr(model, "text", model), ids, args.layer)[0]  # [m + 1, seq_len]
    words = tokenizer.words(ids[0].tolist())
    if not words:
        raise ValueError(f"caption {args.caption!r} contains no word")
    with torch.no_grad():
        features = torch.nn.functional.normalize(model.text.all_features(ids)[0], dim=-1)
    by_word = [[float(row[positions].sum()) for _, positions in words] for row in attention]
    tokens = [tokenizer.pooled_token, *(f"corner {n}" for n in range(len(attention) - 1))]
    found = {"model": args.model, "pretrained": args.pretrained, "layer": args.layer, "tokens": tokens}
    found |= {
        "words": [word for word, _ in words],
        "attention": by_word,
        "elsewhere": [1 - sum(row) for row in by_word],
    }
    return found | {"similarity": (features @ features.T).tolist()}


def draw(found: dict[str, Any]) -> Any:
    """Draws the attention of each token to each word, and the similarity matrix; returns the figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tokens, words = found["tokens"], [word.replace("$", r"\$") for word in found["words"]]
    headings = [f"{token}, {100 * rest:.0f}% elsewhere" for token, rest in zip(tokens, found["elsewhere"])]
    size = (max(0.25 * len(words), 10), 2 + 0.9 * len(tokens))
    figure, (words_axes, cosine_axes) = pyplot.subplots(1, 2, figsize=size, layout="constrained", width_ratios=(4, 1))
    words_axes.imshow(found["attention"], cmap="Oranges", aspect="auto")
    words_axes.set_xticks(range(len(words)), words, rotation=90, fontsize=8)
    words_axes.set_yticks(range(len(tokens)), headings)
    words_axes.set_title("attention to words", fontsize=10)
    cosine_axes.imshow(found["similarity"], vmin=-1, vmax=1, cmap="RdBu_r")
    for i, row in enumerate(found["similarity"]):
        for j, value in enumerate(row):
            colour = "white" if abs(value) > 0.7 else "black"
            cosine_axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour)
    cosine_axes.set_xticks(range(len(tokens)), tokens, rotation=45, ha="right")
    cosine_axes.set_yticks(range(len(tokens)), tokens)
    cosine_axes.set_title("cosine between features", fontsize=10)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, or 2 for a usage error."""
    parser = command_parser("training.corner_view", __doc__, Path(__file__).with_suffix(".yaml"))
    args = parser.parse_args(argv)
    try:
        if args.out.suffix not in SUFFIXES:
            raise ValueError(f"--out {args.out}: expected {', '.join(SUFFIXES)}")
        found = view(args)
        draw(found).savefig(args.out, dpi=120)
        args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if not args.pretrained and not args.model.startswith(("local-dir:", "hf-hub:")):
        print(f"{args.model} is UNTRAINED: without --pretrained, the figure shows random weights.")
    print(f"Figure: {args.out}   Numbers: {args.out.with_suffix('.json')}")
    return 0
