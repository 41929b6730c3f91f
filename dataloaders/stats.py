"""Caption lengths of benchmarks: images, captions, sentences and tokens, as a table and a figure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataloaders.pairs import RetrievalSet
from training.readers.captions import split_sentences

CONTEXTS = (77, 128, 248)  # of CLIP, LoTLIP and Long-CLIP


@dataclass(frozen=True)
class CaptionStats:
    """Counts of one benchmark.

    Attributes:
        title: its heading in tables.
        num_images, num_captions: numbers of images and captions in its list; image files are not opened.
        sentences, tokens: int64 [num_captions], counts per caption; tokens include the two special ones.
    """

    title: str
    num_images: int
    num_captions: int
    sentences: np.ndarray
    tokens: np.ndarray

    def share_over(self, context: int) -> float:
        """Returns the fraction of captions that are longer than a context of this many tokens."""
        return float((self.tokens > context).mean())


def caption_stats(s: RetrievalSet, count_tokens: Callable[[str], int]) -> CaptionStats:
    """Counts sentences by `split_sentences`, and tokens by `count_tokens`, which doesn't count special tokens."""
    sentences = np.array([len(split_sentences(text)) for text in s.captions])
    tokens = np.array([count_tokens(text) + 2 for text in s.captions])
    return CaptionStats(s.title, len(s.image_paths), len(s.captions), sentences, tokens)


def token_counter(name: str) -> Callable[[str], int]:
    """Returns a function that counts the tokens of a text, without special ones.

    Args:
        name: ``clip`` for CLIP's tokenizer, else a tokenizer of transformers: a folder, or a name on the hub.

    Raises:
        ValueError: there is no such tokenizer.
    """
    if name == "clip":
        from open_clip.tokenizer import SimpleTokenizer

        tokenizer = SimpleTokenizer()
        return lambda text: len(tokenizer.encode(text))
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"--tokenizer {name}: expected clip, or a tokenizer's folder ({error})") from error
    return lambda text: len(loaded(text, add_special_tokens=False, verbose=False)["input_ids"])


def format_stats(found: Sequence[CaptionStats]) -> str:
    """Returns a table for the terminal: means, with the range of the middle 90% of captions; fractions in percent."""
    from tabulate import tabulate

    def middle(values: np.ndarray) -> str:
        return "{:.1f} ({:.0f}-{:.0f})".format(values.mean(), *np.percentile(values, [5, 95]))

    rows = []
    for s in found:
        shares = [f"{100 * s.share_over(context):.1f}%" for context in CONTEXTS]
        numbers = f"{s.num_images:,}", f"{s.num_captions:,}"
        rows.append([s.title, *numbers, middle(s.sentences), middle(s.tokens), *shares])
    headers = ["benchmark", "images", "captions", "sentences\nper caption", "tokens\nper caption"]
    headers += [f"over\n{context}" for context in CONTEXTS]
    return tabulate(rows, headers=headers, colalign=["left"] + ["right"] * 7, disable_numparse=True)


def to_json(found: Sequence[CaptionStats]) -> list[dict]:
    """Returns, for each benchmark, how many captions have each number of sentences and tokens; no caption texts."""

    def counts(values: np.ndarray) -> dict[str, int]:
        return {str(value): int(number) for value, number in zip(*np.unique(values, return_counts=True))}

    return [
        {"title": s.title, "images": s.num_images, "sentences": counts(s.sentences), "tokens": counts(s.tokens)}
        for s in found
    ]


def draw_stats(found: Sequence[CaptionStats]) -> Any:
    """Draws images, sentences and tokens per caption (box: quartiles, whiskers: 5 to 95%), and captions cut.

    Returns:
        The matplotlib figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [s.title.replace("$", r"\$") for s in found]
    figure, panels = pyplot.subplots(1, 4, figsize=(14, 1.8 + 0.45 * len(found)), layout="constrained", sharey=True)
    places = range(len(found))
    bars = panels[0].barh(places, [s.num_images for s in found], color="C0")
    panels[0].bar_label(bars, [f"{s.num_images:,}" for s in found], padding=3, fontsize=8)
    limits = (1, 10 * max(s.num_images for s in found))
    panels[0].set(xscale="log", xlim=limits, xlabel="images", yticks=places, yticklabels=names)
    for axes, kind in zip(panels[1:3], ("sentences", "tokens")):
        values = [getattr(s, kind) for s in found]
        axes.boxplot(values, positions=places, orientation="horizontal", whis=(5, 95), showfliers=False, widths=0.6)
        axes.scatter([v.mean() for v in values], places, marker="D", s=18, color="C1", zorder=3, label="mean")
        axes.set(xlabel=f"{kind} per caption", xlim=(0, None), yticks=places, yticklabels=names)
        axes.legend(fontsize=8)
    for context in CONTEXTS:
        panels[2].axvline(context, color="0.6", linestyle=":", linewidth=1)
    for n, context in enumerate(CONTEXTS):
        heights = [place + 0.27 * (n - 1) for place in places]
        shares = [100 * s.share_over(context) for s in found]
        panels[3].barh(heights, shares, 0.25, color=f"C{n}", label=f"over {context} tokens")
    panels[3].set(xlabel="captions cut, percent", xlim=(0, 100))
    panels[3].legend(fontsize=8)
    panels[0].invert_yaxis()
    return figure
