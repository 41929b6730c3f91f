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

NUM_IMAGES = 5000
PROTOCOLS = {"docci/test": {NUM_IMAGES: ()}, "docci/sentences": {}}
FLAG = "--docci-retrieval"
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
    fault = "" if all(image.name.startswith("test_") for image, _ in rows) else "images of another split"
    whole = [(image, normalise_caption(text)) for image, text in rows]
    given = {"source": SOURCE, "fault": fault, "official": PROTOCOLS["docci/test"], "protocol": "docci/test"}
    sets = [one_caption_per_image("docci-retrieval", "DOCCI", whole, **given)]
    if sentences:
        pieces = [(image, captions) for image, text in rows if (captions := split_caption(text))]
        number = sum(len(captions) for _, captions in pieces)  # follows from the descriptions
        if len(rows) != NUM_IMAGES:
            fault = f"sentences of {len(rows):,} images instead of {NUM_IMAGES:,}"
        given |= {"fault": fault, "official": {number: ()}, "protocol": "docci/sentences"}
        given["num_published"] = None if fault else number
        sets.append(several_captions_per_image("docci-sentences-retrieval", "DOCCI sentences", pieces, **given))
    return sets


def _read_chosen(args: argparse.Namespace) -> list[RetrievalSet]:
    chosen = chosen_protocols(args, PROTOCOLS)
    sets = read_docci(args.docci_retrieval, args.docci_sentences or "docci/sentences" in chosen)
    return [s for name, s in zip(PROTOCOLS, sets) if name in chosen or args.docci_sentences]


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
