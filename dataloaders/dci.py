"""DCI: densely captioned images (SA-1B photos with human captions of about 150 words).

DCI/densely_captioned_images/splits.json        {"train": ["112956-data.json", ..], "valid": [..], "test": [..]}
DCI/densely_captioned_images/annotations/*.json {"image": "sa_1.jpg", "short_caption": .., "extra_caption": ..}
DCI/densely_captioned_images/photos/*.jpg
"""

from pathlib import Path

from dataloaders.pairs import RetrievalSet, retrieval_set
from training.readers.captions import normalise_caption
from training.readers.files import parallel_map, read_json, require_dir, text_field

TITLES = {"dci/short+extra": "DCI", "dci/extra-lower": "DCI extra-lower", "long-dci": "Long-DCI"}
SPLIT_SIZES = [98, 108, 7599]
BELOW = "densely_captioned_images"


def read_dci(root: str | Path, protocol: str = "dci/short+extra") -> RetrievalSet:
    """Reads DCI: all splits, one after another; ``long-dci`` reads every annotation file instead, sorted by name.

    Protocols: ``dci/short+extra`` (LoTLIP, FLAIR) joins the short caption, a newline and the extra caption, and applies
    `normalise_caption`; ``dci/extra-lower`` (FG-CLIP) takes the extra caption alone, in lower case and not split;
    ``long-dci`` (TULIP, HiMo-CLIP) takes the extra caption unchanged, and leaves out annotations without one.

    Args:
        root: the folder that holds `densely_captioned_images`, or that folder itself.
        protocol: one of `TITLES`.

    Raises:
        FileNotFoundError, ValueError: `splits.json` is missing, or a file is broken or has an unexpected structure.
    """
    root = require_dir(root)
    base = next((b for b in (root / BELOW, root) if (b / "splits.json").is_file()), None)
    if base is None:
        raise FileNotFoundError(f"{root}: no splits.json, nor {BELOW}/splits.json")
    splits = read_json(base / "splits.json")
    if not isinstance(splits, dict) or not all(isinstance(names, list) for names in splits.values()):
        raise ValueError(f"{base / 'splits.json'}: expected lists of annotation files under train, valid and test")
    sizes = sorted(map(len, splits.values()))
    paths = [base / "annotations" / str(name) for names in splits.values() for name in names]
    if protocol == "long-dci":
        paths = sorted(p for p in (base / "annotations").glob("*.json") if not p.name.startswith("."))
    rows = parallel_map(lambda path: _read_annotation(path, protocol), paths)
    return retrieval_set(
        f"{TITLES[protocol].lower().replace(' ', '-')}-retrieval",
        TITLES[protocol],
        [(base / "photos" / row[0], [row[1]]) for row in rows if row and (row[1] or protocol != "long-dci")],
        fault=f"splits of {sizes} items" if protocol != "long-dci" and sizes != SPLIT_SIZES else "",
        missing=tuple(f"{path}: no such annotation" for path, row in zip(paths, rows) if not row),
    )


def _read_annotation(path: Path, protocol: str) -> tuple[str, str] | None:
    """Returns (the photo's file name, its caption), or None if there is no such annotation file."""
    if not path.is_file():
        return None
    row = read_json(path)
    short, extra = text_field(row, "short_caption", path), text_field(row, "extra_caption", path)
    whole = normalise_caption(f"{short}\n{extra}")
    captions = {"dci/short+extra": whole, "dci/extra-lower": extra.lower(), "long-dci": extra}
    return text_field(row, "image", path), captions[protocol]
