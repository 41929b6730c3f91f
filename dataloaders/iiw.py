"""IIW: ImageInWords, three subsets with human captions of about 200 words.

IIW/docci/*.jpg      IIW/DOCCI_Test/data.jsonl   {"IIW": caption, "image": "test_00731"}
IIW/docci_aar/*.jpg  IIW/IIW-400/data.jsonl      {"IIW": caption, "image/key": "aar_test_04600"}
IIW/dci/*.jpg        IIW/DCI_Test/data.jsonl     {"IIW": caption, "image": "sa_1545038.jpg"}
"""

from pathlib import Path

from dataloaders.pairs import RetrievalSet, retrieval_set
from training.readers.captions import normalise_caption, split_caption
from training.readers.files import read_json_lines, require_dir, text_field

TITLES = {"iiw/612": "IIW", "iiw/sentences": "IIW sentences"}
# Subset of google/imageinwords -> image folder, in the published order.
SUBSETS = {"DOCCI_Test": "docci", "IIW-400": "docci_aar", "DCI_Test": "dci"}


def read_iiw(root: str | Path, annotations: str | Path | None = None, protocol: str = "iiw/612") -> RetrievalSet:
    """Reads IIW: the captions under `IIW` of DOCCI_Test, IIW-400 and DCI_Test, in this order.

    Protocols: ``iiw/612`` takes whole captions; in ``iiw/sentences`` (FLAIR's fine-grained set) every sentence is a
    caption of its own.

    Args:
        root: folder with the image folders `docci`, `docci_aar` and `dci`.
        annotations: folder with `DOCCI_Test/data.jsonl` and so on; the root itself if None.
        protocol: one of `TITLES`.

    Raises:
        FileNotFoundError, ValueError: an annotation file is missing, broken or has an unexpected structure.
    """
    root = require_dir(root)
    captions_of = split_caption if protocol == "iiw/sentences" else lambda text: [normalise_caption(text)]
    rows = [
        (root / folder / image, captions)
        for subset, folder in SUBSETS.items()
        for image, text in read_iiw_subset(annotations or root, subset)
        if (captions := captions_of(text))
    ]
    return retrieval_set(f"{TITLES[protocol].lower().replace(' ', '-')}-retrieval", TITLES[protocol], rows)


def read_iiw_subset(annotations: str | Path, subset: str) -> list[tuple[str, str]]:
    """Returns (image file name, raw caption) of one subset, in file order."""
    path = Path(annotations) / subset / "data.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; name its folder with --iiw-anno")
    rows = []
    for where, row in read_json_lines(path):
        caption = text_field(row, "IIW", where)
        name = text_field(row, "image" if "image" in row else "image/key", where)
        rows.append((name if name.lower().endswith((".jpg", ".jpeg", ".png")) else f"{name}.jpg", caption))
    return rows
