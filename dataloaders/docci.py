"""DOCCI: 5,000 test photos with human descriptions of about 136 words, whole or sentence by sentence.

DOCCI/images/test_00000.jpg
DOCCI/docci_descriptions.jsonlines  {"example_id", "split", "image_file": "test_00000.jpg", "description": ..}
"""

from pathlib import Path

from dataloaders.pairs import RetrievalSet, retrieval_set
from training.readers.captions import normalise_caption, split_caption
from training.readers.files import read_json_lines, require_dir, text_field

NUM_IMAGES = 5000
ANNOTATIONS = "docci_descriptions.jsonlines"


def read_docci(root: str | Path, protocol: str = "docci/test") -> RetrievalSet:
    """Reads DOCCI's test split, in file order.

    Args:
        root: folder with the descriptions and `images/`.
        protocol: ``docci/test``, or ``docci/sentences``, in which every sentence is a caption of its own.

    Raises:
        FileNotFoundError, ValueError: the descriptions are missing, broken or without a test split.
    """
    root = require_dir(root)
    path = root / ANNOTATIONS
    if not path.is_file():
        raise FileNotFoundError(f"{root}: {ANNOTATIONS} is missing")
    folder = root / "images" if (root / "images").is_dir() else root
    rows = []
    for where, row in read_json_lines(path):
        if text_field(row, "split", where) == "test":
            rows.append((folder / text_field(row, "image_file", where), text_field(row, "description", where)))
    if not rows:
        raise FileNotFoundError(f"{path}: no row of split 'test'")
    fault = "" if all(image.name.startswith("test_") for image, _ in rows) else "images of another split"
    if protocol == "docci/test":
        whole = [(image, [normalise_caption(text)]) for image, text in rows]
        return retrieval_set("docci-retrieval", "DOCCI", whole, fault=fault)
    pieces = [(image, captions) for image, text in rows if (captions := split_caption(text))]
    if len(rows) != NUM_IMAGES:
        fault = f"sentences of {len(rows):,} images instead of {NUM_IMAGES:,}"
    number = None if fault else sum(len(captions) for _, captions in pieces)  # follows from the descriptions
    return retrieval_set("docci-sentences-retrieval", "DOCCI sentences", pieces, fault=fault, num_published=number)
