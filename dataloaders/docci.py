"""DOCCI: 5,000 test photos with human descriptions of about 136 words, whole or sentence by sentence.

DOCCI/images/test_00000.jpg
DOCCI/docci_descriptions.jsonlines  {"example_id", "split", "image_file": "test_00000.jpg", "description": ..}
"""

from pathlib import Path
from typing import Any

from dataloaders.pairs import RetrievalSet, one_caption_per_image, several_captions_per_image
from dataloaders.registry import Benchmark, Tree
from training.readers.captions import normalise_caption, split_caption
from training.readers.files import read_json_lines, require_dir, text_field

NUM_IMAGES = 5000
PROTOCOLS = {"docci/test": {NUM_IMAGES: ()}, "docci/sentences": {}}
FLAG = "--docci-retrieval"
ANNOTATIONS = "docci_descriptions.jsonlines"
SOURCE = f"see DOCCI in EVAL_DATASETS.md: {ANNOTATIONS} and docci_images.tar.gz"


def read_docci(root: str | Path, protocol: str = "docci/test") -> RetrievalSet:
    """Reads DOCCI's test split, in file order.

    Args:
        root: folder with the descriptions and `images/`.
        protocol: ``docci/test``, or ``docci/sentences``, in which every sentence is a caption of its own.

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
    given: dict[str, Any] = {"source": SOURCE, "protocol": protocol}
    if protocol == "docci/test":
        whole, given["official"] = [(image, normalise_caption(text)) for image, text in rows], PROTOCOLS[protocol]
        return one_caption_per_image("docci-retrieval", "DOCCI", whole, fault=fault, **given)
    pieces = [(image, captions) for image, text in rows if (captions := split_caption(text))]
    number = sum(len(captions) for _, captions in pieces)  # follows from the descriptions
    if len(rows) != NUM_IMAGES:
        fault = f"sentences of {len(rows):,} images instead of {NUM_IMAGES:,}"
    given |= {"fault": fault, "official": {number: ()}, "num_published": None if fault else number}
    return several_captions_per_image("docci-sentences-retrieval", "DOCCI sentences", pieces, **given)


BENCHMARKS = (
    Benchmark(
        "docci",
        FLAG,
        "DOCCI's test split: folder with its .jsonlines",
        lambda args, protocol: [read_docci(args.docci_retrieval, protocol)],
        protocols=PROTOCOLS,
        order=50,
        tree=Tree("docci", (ANNOTATIONS,)),
        source=SOURCE,
    ),
)
