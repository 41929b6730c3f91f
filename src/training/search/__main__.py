"""Searches a folder of images with a text, as long as the model's context, or with an image.

    python -m training.search IMAGES --model hf-hub:ORG/REPO --index INDEX --query "A red bicycle leans on a wall. ..."

The first call encodes the folder and stores the vectors in INDEX. Later calls encode only new and changed files, and
remove deleted ones. An interrupted call continues from its last save.
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from training.flags.model import PRECISIONS
from training.flags.types import command_parser
from training.runtime.messages import print_any_name, printable
from training.runtime.processes import add_timeout_arg, ends_if_stuck, first_imports

if TYPE_CHECKING:
    import torch

    from training.search.index import ImageIndex


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser."""
    parser = command_parser("training.search", __doc__, Path(__file__).with_name("flags.yaml"), PRECISIONS=PRECISIONS)
    add_timeout_arg(parser, 30.0)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, or 2 for a usage error."""
    print_any_name()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        with ends_if_stuck(parser.prog, args.timeout_minutes):
            _search(args)
    except (ValueError, OSError, FloatingPointError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return 0


def _search(args: argparse.Namespace) -> None:
    _check(args)
    with first_imports():
        from training.search.index import ImageIndex, encode_query, index_path, list_images, make_encoder

    folder = None if args.no_update else list_images(args.images)
    encoder = make_encoder(args)
    index = ImageIndex(index_path(args.index, args.images, encoder))
    if folder:
        added, removed, broken = index.update(folder.images, encoder, args.save_every)
        if not len(index):
            raise ValueError(f"no readable image: {next(iter(broken.values()))}")
        print(f"Index: {len(index):,} images ({added:,} new, {removed:,} removed) in {index.path}")
        if broken:
            print(f"Unreadable files, skipped: {len(broken):,}")
            print("\n".join(f"  {reason}" for reason in list(broken.values())[:10]))
        if folder.others:
            kinds = ", ".join(f"{number:,} {kind}" for kind, number in folder.others.most_common(5))
            print(f"Files other than images, skipped: {folder.others.total():,} ({kinds})")
    elif not len(index):
        raise ValueError(f"--no-update: there is no index of {args.images} for this model; run once without the flag")
    if args.export:
        _export(index, args.export)
        print(f"Vectors: {args.export}")
    query = args.image or args.query
    if query is not None:
        features, note = encode_query(encoder, query)
        print(note, end="\n" * bool(note))
        _answer(args, index, query, features)


def _check(args: argparse.Namespace) -> None:
    """Checks the flags before anything is read.

    Raises:
        ValueError, FileNotFoundError: the message names the flag.
    """
    if args.query is not None and not args.query.strip():
        raise ValueError("--query: the text is empty")
    if args.image and not args.image.is_file():
        raise FileNotFoundError(f"--image {args.image}: no such file")
    if args.export and args.export.suffix != ".parquet":
        raise ValueError(f"--export {args.export}: expected a name that ends with .parquet")
    if args.html and args.query is None and args.image is None:
        raise ValueError("--html needs --query or --image")


def _answer(args: argparse.Namespace, index: "ImageIndex", query: str | Path, features: "torch.Tensor") -> None:
    from training.eval.record import format_rows

    start = time.perf_counter()
    results = index.search(features, args.top)
    print(f"Search: {1000 * (time.perf_counter() - start):.1f} ms\n")
    rows = [{"": n, "score": f"{score:.4f}", "image": str(path)} for n, (path, score) in enumerate(results, start=1)]
    print(format_rows(rows, num_left=3))
    if args.html:
        from training.eval.report.page import write_search_page

        facts = {"model": args.model, "images": f"{len(index):,}", "folder": str(args.images)}
        write_search_page(args.html, query, results, args.images, facts)
        print(f"\nPage: {args.html}")


def _export(index: "ImageIndex", path: Path) -> None:
    """Writes a Parquet file with a row per image: ``path`` and ``vector`` (float32, L2-normalised)."""
    import pyarrow
    import torch
    from pyarrow import parquet

    from training.runtime.files import atomic_write

    paths, vectors = index.paths(range(len(index))), torch.cat(list(index.vectors())).numpy()
    order = sorted(range(len(paths)), key=paths.__getitem__)
    column = pyarrow.FixedSizeListArray.from_arrays(vectors[order].ravel(), vectors.shape[1])
    table = pyarrow.table({"path": [printable(paths[row]) for row in order], "vector": column})
    with atomic_write(path) as temporary:
        parquet.write_table(table, temporary)


if __name__ == "__main__":
    sys.exit(main())
