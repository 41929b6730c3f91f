"""DOCCI: 5,000 test photos with human descriptions of about 136 words, whole or sentence by sentence.

DOCCI/images/test_00000.jpg
DOCCI/docci_descriptions.jsonlines  {"example_id", "split", "image_file": "test_00000.jpg", "description": ..}
"""

import argparse
from pathlib import Path

from dataloaders.pairs import RetrievalSet, one_caption_per_image, several_captions_per_image
from dataloaders.registry import Benchmark, Option, Tree, chosen_protocols
from training.readers.files import read_json_lines, require_dir, text_field
from training.readers.sentences import normalise_caption, split_caption

NUM_PAIRS = 5000
FLAG = "--docci-retrieval"
PROTOCOLS = ("docci/test", "docci/sentences")
ANNOTATIONS = "docci_descriptions.jsonlines"
SOURCE = f"see DOCCI in EVAL_DATASETS.md: {ANNOTATIONS} and docci_images.tar.gz"


def read_docci(root: str | Path, sentences: bool = False) -> list[RetrievalSet]:
    """Reads DOCCI's test split, in file order.

    Args:
        root: folder with the descriptions and `images/`.
        sentences: return a second set, in which every sentence is a caption of its own.

    Raises:
        FileNotFoundError, ValueError: the descriptions are missing, broken or without a test split.
    """
    root = require_dir(root, FLAG)
    path = root / ANNOTATIONS
    if not path.is_file():
        raise FileNotFoundError(f"{FLAG} {root}: {ANNOTATIONS} is missing; {SOURCE}")
    folder = root / "images" if (root / "images").is_dir() else root
    rows = []
    for where, row in read_json_lines(path):
        if text_field(row, "split", where) == "test":
            rows.append((folder / text_field(row, "image_file", where), text_field(row, "description", where)))
    if not rows:
        raise ValueError(f"{path}: no row of split 'test'; {SOURCE}")
    whole = [(image, normalise_caption(text)) for image, text in rows]
    sets = [
        one_caption_per_image(
            "docci-retrieval", "DOCCI", whole, num_published=NUM_PAIRS, source=SOURCE, protocol=PROTOCOLS[0]
        )
    ]
    if sentences:
        parts = [(image, own) for image, text in rows if (own := split_caption(text))]
        title, complete = "DOCCI sentences", len(rows) == NUM_PAIRS
        number = sum(len(own) for _, own in parts) if complete else None
        sets.append(
            several_captions_per_image(
                "docci-sentences-retrieval", title, parts, num_published=number, source=SOURCE, protocol=PROTOCOLS[1]
            )
        )
    return sets


def _read_chosen(args: argparse.Namespace) -> list[RetrievalSet]:
    chosen = chosen_protocols(args, PROTOCOLS)
    whole_and_parts = read_docci(args.docci_retrieval, args.docci_sentences or PROTOCOLS[1] in chosen)
    return [s for s in whole_and_parts if s.protocol in chosen or args.docci_sentences]


BENCHMARKS = (
    Benchmark(
        "docci",
        FLAG,
        "DOCCI's test split: folder with its .jsonlines",
        _read_chosen,
        protocols=PROTOCOLS,
        order=50,
        tree=Tree("docci", (ANNOTATIONS,)),
        source=SOURCE,
        options=(Option("--docci-sentences", "DOCCI also with each sentence as a caption", default=False),),
    ),
)
