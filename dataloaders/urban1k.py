"""Urban1k: 1,000 busy street scenes with captions of about 100 words, in either published layout.

ROOT/image/N.jpg   ROOT/caption/N.txt                     caption = first line; images/ is read as well as image/
ROOT/images/N.jpg  ROOT/annotations/annotations.json      {"annotations": [{"image", "caption", ..}]}
"""

from pathlib import Path

from dataloaders.pairs import RetrievalSet, retrieval_set
from training.readers.captions import normalise_caption
from training.readers.files import natural_key, parallel_map, read_json, read_text, require_dir, text_field


def read_urban1k(root: str | Path) -> RetrievalSet:
    """Reads Urban1k, sorted by number (2 before 10), so that the order never depends on the file system.

    Raises:
        FileNotFoundError, ValueError: neither layout is there, or a caption file is broken.
    """
    root = require_dir(root)
    for base in (root, root / "Urban1k"):
        if (base / "caption").is_dir():
            pairs = _read_text_files(base)
        elif (base / "annotations" / "annotations.json").is_file():
            pairs = _read_annotations(base)
        else:
            continue
        return retrieval_set("urban1k-retrieval", "Urban1k", [(path, [caption]) for path, caption in pairs])
    raise FileNotFoundError(f"{root}: found neither caption/ nor annotations/annotations.json")


def _read_text_files(base: Path) -> list[tuple[Path, str]]:
    # macOS leaves ._1.txt beside 1.txt.
    paths = [path for path in (base / "caption").glob("*.txt") if not path.name.startswith(".")]
    paths.sort(key=lambda path: natural_key(path.stem))
    captions = [text.split("\n", 1)[0] for text in parallel_map(read_text, paths)]
    folder = base / ("image" if (base / "image").is_dir() else "images")
    return [(folder / f"{p.stem}.jpg", normalise_caption(c)) for p, c in zip(paths, captions)]


def _read_annotations(base: Path) -> list[tuple[Path, str]]:
    path = base / "annotations" / "annotations.json"
    content = read_json(path)
    rows = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list under 'annotations'")
    pairs = []
    for number, row in enumerate(rows):
        where = f"{path} item {number}"
        image, caption = text_field(row, "image", where), text_field(row, "caption", where)
        pairs.append((base / "images" / image, normalise_caption(caption.split("\n", 1)[0])))
    return sorted(pairs, key=lambda pair: natural_key(pair[0].stem))
