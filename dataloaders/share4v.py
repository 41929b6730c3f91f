"""ShareGPT4V 1k and 10k: SA-1B images with captions by GPT-4V's student, about 170 words.

ANNO.json  [{"image": "sam/images/sa_1.jpg", "conversations": [{"from": "human", ..}, {"from": "gpt", "value": ..}]}]
ROOT/..    SA-1B images, in any tree
"""

import re
from collections.abc import Sequence
from pathlib import Path

from dataloaders.pairs import RetrievalSet, retrieval_set
from training.readers.captions import normalise_caption
from training.readers.files import file_identity, find_by_name, parallel_map, read_json, require_dir, text_field

NUM_UNCUT = 1_246_000  # items of the list of sv/first, share-captioner_coco_lcs_sam_1246k_1107.json, at least
SAM_NAME = r"sa_\d+\.jpe?g"


def read_share4v(
    root: str | Path, annotations: str | Path, sizes: Sequence[int] = (1000, 10000), protocol: str = "sv/sam"
) -> list[RetrievalSet]:
    """Reads the first N items of the list, for each N of `sizes`.

    Protocols: ``sv/sam`` (LoTLIP, FLAIR) reads a list of SA-1B images alone and applies `normalise_caption`;
    ``sv/first`` (Long-CLIP, FG-CLIP) reads the uncut list, replaces newlines by spaces and splits nothing.

    Args:
        root: folder with SA-1B images. An image is searched for at its path in the list, else by its file name
            anywhere below the root, because the layouts of published copies differ.
        annotations: the JSON list; for ``sv/sam`` as `python -m dataloaders.prepare share4v` cuts it.
        sizes: numbers of pairs; 1000 and 10000 are the published ones.
        protocol: ``sv/sam`` or ``sv/first``.

    Raises:
        FileNotFoundError, ValueError: the list is missing, broken or shorter than a size; or a file name was found
            twice.
    """
    root = require_dir(root)
    items = read_items(annotations)
    fault = ""
    if protocol == "sv/first" and len(items) < NUM_UNCUT:
        fault = f"{len(items):,} items in the list; the uncut one has at least {NUM_UNCUT:,}"
    items = items[: max(sizes)]
    if protocol == "sv/sam" and not all(re.fullmatch(SAM_NAME, image.rsplit("/", 1)[-1]) for image, _ in items):
        fault = "images that are not from SA-1B"
    if len(items) < max(sizes):
        raise ValueError(f"--share4v-val-num {max(sizes)}: only {len(items):,} annotations in {annotations}; lower it")
    paths = resolve_images(root, [image for image, _ in items])
    first = protocol == "sv/first"
    captions = [text.replace("\n", " ") if first else normalise_caption(text) for _, text in items]
    rows = [(path, [caption]) for path, caption in zip(paths, captions)]
    return [
        retrieval_set(
            f"share4v-first-retrieval-{n}" if first else f"share4v-retrieval-{n}",
            (f"SV-{n // 1000}k" if n % 1000 == 0 else f"SV-{n}") + (" first" if first else ""),
            rows[:n],
            num_published=n,
            fault=fault,
        )
        for n in sizes
    ]


def read_items(annotations: str | Path) -> list[tuple[str, str]]:
    """Returns (image path as written, raw caption) of every item of a ShareGPT4V list."""
    path = Path(annotations)
    if not path.is_file():
        raise FileNotFoundError(f"--share4v-anno {path}: no such file; python -m dataloaders.prepare share4v makes it")
    items = read_json(path)
    if not isinstance(items, list):
        raise ValueError(f"--share4v-anno {path}: expected a JSON list, found {type(items).__name__}")
    found = []
    for number, item in enumerate(items):
        where = f"{path} item {number}"
        image, turns = text_field(item, "image", where), item.get("conversations")
        if not isinstance(turns, list) or len(turns) < 2:
            raise ValueError(f"{where}: expected two entries under 'conversations' (question, caption)")
        found.append((image, text_field(turns[1], "value", f"{where}, conversations[1]")))
    return found


def resolve_images(root: Path, names: list[str]) -> list[Path]:
    """Finds each image below the root: by its path, else by its file name anywhere.

    Returns:
        One path per name; ROOT/name if there is no such file, for the caller to report.

    Raises:
        ValueError: a file name is in several folders, so it is ambiguous.
    """
    by_path = [root / name for name in names]
    unresolved = {p.name for p, found in zip(by_path, parallel_map(file_identity, by_path)) if found is None}
    found = find_by_name(root, unresolved) if unresolved else {}
    for name, paths in found.items():
        if len(paths) > 1:
            folders = ", ".join(sorted(map(str, paths))[:2])
            raise ValueError(f"{root}: {name} is in {len(paths)} folders ({folders}); keep one of them")
    return [found[p.name][0] if p.name in found else p for p in by_path]
