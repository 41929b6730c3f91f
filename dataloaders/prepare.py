"""Cuts a list of captions, and counts how long the captions of benchmarks are. See EVAL_DATASETS.md.

python -m dataloaders.prepare share4v share-captioner_coco_lcs_sam_1246k_1107.json data/share4v/anno.json
python -m dataloaders.prepare stats --data-root data --suite long --out stats.json
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from dataloaders.pairs import RetrievalSet
from dataloaders.registry import benchmark, benchmarks, destination, find_below_data_root, suites
from dataloaders.share4v import SAM_NAME, read_items
from training.readers.captions import split_sentences

CONTEXTS = (77, 128, 248)  # of CLIP, LoTLIP and Long-CLIP


def prepare_share4v(captions: Path, out: Path, num: int) -> str:
    """Cuts a ShareGPT4V caption list to its first `num` items with an SA-1B image, in order.

    Raises:
        FileNotFoundError, ValueError: the list is missing or broken, or has too few such items.
    """
    read_items(captions)  # checks the structure, with errors that name the item
    items = json.loads(captions.read_text(encoding="utf-8-sig"))
    chosen = [item for item in items if re.fullmatch(SAM_NAME, Path(item["image"]).name)][:num]
    if len(chosen) < num:
        found = f"only {len(chosen):,} of {len(items):,} items show an SA-1B image (sa_N.jpg), {num:,} are needed"
        raise ValueError(f"{captions}: {found}; lower --num, or use share-captioner_coco_lcs_sam_1246k_1107.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(chosen, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return f"{len(chosen):,} of {len(items):,} items -> {out}\nImages: {benchmark('share4v').source}"


def read_for_stats(args: argparse.Namespace) -> list[Any]:
    """Reads the sets that ``stats`` names, and those below ``--data-root``; prints which are missing there.

    Raises:
        ValueError, FileNotFoundError: a reader raised it, a name is unknown, or there is nothing to read.
    """
    known = [b for b in benchmarks() if b.folder and not b.classification]
    vars(args).update({destination(b.flag): None for b in benchmarks()})
    for word in args.sets:
        name, equals, root = word.partition("=")
        if not equals or name not in [b.name for b in known]:
            raise ValueError(f"stats {word}: expected BENCHMARK=ROOT with one of {', '.join(b.name for b in known)}")
        benchmark(name).set_flags(args, Path(root))
    if absent := find_below_data_root(args):
        print(absent, file=sys.stderr)
    sets = [s for b in known if getattr(args, destination(b.flag)) for s in b.sets(args)]
    if not sets:
        raise ValueError("stats: name BENCHMARK=ROOT or --data-root DIR")
    return sets


@dataclass(frozen=True)
class CaptionStats:
    """Counts of one benchmark.

    Attributes:
        title: its heading in tables.
        num_images: number of images in its list; the files are not opened.
        sentences, tokens: int64 [num_captions], counts per caption; tokens include the two special ones.
    """

    title: str
    num_images: int
    sentences: np.ndarray
    tokens: np.ndarray

    def share_over(self, context: int) -> float:
        """Returns the fraction of captions that are longer than a context of this many tokens."""
        return float((self.tokens > context).mean())


def caption_stats(s: RetrievalSet, count_tokens: Callable[[str], int]) -> CaptionStats:
    """Counts sentences by `split_sentences`, and tokens by `count_tokens`, which doesn't count special tokens."""
    sentences = np.array([len(split_sentences(text)) for text in s.captions])
    tokens = np.array([count_tokens(text) + 2 for text in s.captions])
    return CaptionStats(s.title, len(s.image_paths), sentences, tokens)


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

    def middle(values: np.ndarray) -> str:
        return "{:.1f} ({:.0f}-{:.0f})".format(values.mean(), *np.percentile(values, [5, 95]))

    rows = []
    for s in found:
        shares = [f"{100 * s.share_over(context):.1f}%" for context in CONTEXTS]
        numbers = f"{s.num_images:,}", f"{len(s.tokens):,}"
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


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the commands."""
    parser = argparse.ArgumentParser(
        prog="python -m dataloaders.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    share4v = commands.add_parser("share4v", help="cut the published caption list to the first SA-1B items")
    share4v.add_argument("captions", type=Path, metavar="LIST", help="share-captioner_coco_lcs_sam_1246k_1107.json")
    share4v.add_argument("out", type=Path, metavar="OUT", help="the file for --share4v-anno")
    share4v.add_argument("--num", type=int, default=10000, metavar="N", help="items to keep (default: %(default)s)")
    stats = commands.add_parser("stats", help="images, captions, and sentences and tokens per caption")
    stats.add_argument("sets", nargs="*", metavar="BENCHMARK=ROOT", help="what to read, e.g. dci=data/dci")
    stats.add_argument("--data-root", metavar="DIR", help="every benchmark below it, as in training.main")
    stats.add_argument("--suite", choices=suites(), default="all", help="which of them (default: %(default)s)")
    stats.add_argument("--tokenizer", default="clip", metavar="T", help="clip, or a folder (default: %(default)s)")
    stats.add_argument("--out", type=Path, default=Path("stats.json"), metavar="JSON", help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, or exits with 2 on usage errors."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if getattr(args, "num", 1) < 1:
            raise ValueError(f"--num {args.num}: expected at least 1")
        if args.command == "share4v":
            report = prepare_share4v(args.captions, args.out, args.num)
        else:
            count_tokens = token_counter(args.tokenizer)
            found = [caption_stats(s, count_tokens) for s in read_for_stats(args)]
            args.out.write_text(json.dumps(to_json(found)) + "\n", encoding="utf-8")
            report = f"{format_stats(found)}\nCounts: {args.out}"
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
