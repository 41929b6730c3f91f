"""COCO and Flickr30k: photos with five short captions each, in Karpathy's splits. Captions are left unchanged.

ANNO  {"images": [{"filepath": "val2014", "filename": "COCO_val2014_000000391895.jpg", "split": "test",
                   "sentences": [{"raw": ..}, ..]}, ..]}                      dataset_coco.json, dataset_flickr30k.json
or    [{"image": "val2014/COCO_val2014_000000391895.jpg", "caption": [five texts]}, ..]
or    {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}      COCO's captions_val2017.json
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from dataloaders.pairs import RetrievalSet, retrieval_set
from training.readers.files import file_identity, parallel_map, read_json, require_dir, text_field

NUM_CAPTIONS = 5  # some COCO images have six or seven; papers use the first five
VAL2017 = "annotations/captions_val2017.json"


def read_karpathy(
    root: str | Path,
    annotations: str | Path | None = None,
    *,
    title: str,
    lists: Sequence[str],
    folders: Sequence[str],
    num_listed: int,
    splits: Mapping[str, str],
    protocol: str,
) -> RetrievalSet:
    """Reads COCO or Flickr30k, between which the arguments from `title` to `splits` differ; see benchmarks.yaml.

    Args:
        root: folder with the images, in one of the usual layouts.
        annotations: the list of captions; if None, it is searched for below the root.
        title: name in tables; in lower case, name in flags.
        lists, folders: usual places of the list of captions, and of the images.
        num_listed: number of images of all splits in Karpathy's file.
        splits: protocol -> split.
        protocol: one of `splits`; a list without splits is read completely.

    Raises:
        FileNotFoundError, ValueError: the list is missing or broken, or has no image of this split.
    """
    root, split, key = require_dir(root), splits[protocol], title.lower()
    if annotations is None:
        names = (VAL2017,) if split == "val2017" else lists
        annotations = next((root / name for name in names if (root / name).is_file()), None)
        if annotations is None:
            raise FileNotFoundError(
                f"{root}: found none of {', '.join(names)}; name the list of captions with --{key}-anno"
            )
    path = Path(annotations)
    if not path.is_file():
        raise FileNotFoundError(f"--{key}-anno {path}: no such file")
    content = read_json(path)
    name, fault = "" if split == "test" else split, ""
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        # These are not the images of Karpathy's test split, so they need another name.
        name = path.stem.removeprefix("captions_")
        rows, protocol = _official_rows(content, path, name), f"{key}/{name}"
    elif isinstance(content, dict) and isinstance(content.get("images"), list):
        rows = _karpathy_rows(content["images"], path, split)
        if len(content["images"]) != num_listed:
            fault = f"{len(content['images']):,} images in Karpathy's list instead of {num_listed:,}"
    elif isinstance(content, list):
        rows, fault = _listed_rows(content, path), "a list without Karpathy's splits"
    else:
        raise ValueError(f"{path}: expected Karpathy's {{'images': [..]}}, COCO's annotations or a list")
    if not rows:
        raise FileNotFoundError(f"{path}: no image of split {split!r}")
    images = parallel_map(partial(_find_image, root, folders), [image for image, _ in rows])
    return retrieval_set(
        f"{key}-{name}-retrieval" if name else f"{key}-retrieval",
        f"{title} {name}".rstrip(),
        [(image, captions[:NUM_CAPTIONS]) for image, (_, captions) in zip(images, rows)],
        protocol=protocol,
        fault=fault,
    )


def _karpathy_rows(items: list, path: Path, split: str) -> list[tuple[str, list[str]]]:
    """Returns (path of the image, its captions) for each image of a split, in file order."""
    rows = []
    for number, item in enumerate(items):
        where = f"{path} image {number}"
        if split not in (text_field(item, "split", where), "all"):
            continue
        sentences = item.get("sentences")
        if not isinstance(sentences, list) or not sentences:
            raise ValueError(f"{where}: expected a list under 'sentences'")
        name = "/".join(filter(None, (item.get("filepath"), text_field(item, "filename", where))))
        rows.append((name, [text_field(sentence, "raw", where) for sentence in sentences]))
    return rows


def _listed_rows(items: list, path: Path) -> list[tuple[str, list[str]]]:
    rows = []
    for number, item in enumerate(items):
        name, captions = text_field(item, "image", f"{path} item {number}"), item.get("caption")
        if not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
            raise ValueError(f"{path} item {number}: expected a list of texts under 'caption'")
        rows.append((name, captions))
    return rows


def _official_rows(content: dict, path: Path, folder: str) -> list[tuple[str, list[str]]]:
    names = {}
    captions: dict[object, list[str]] = defaultdict(list)
    for number, image in enumerate(content.get("images") or []):
        name = text_field(image, "file_name", f"{path} image {number}")
        names[image.get("id")] = name if "/" in name else f"{folder}/{name}"
    for number, row in enumerate(content["annotations"]):
        where = f"{path} annotation {number}"
        caption, image_id = text_field(row, "caption", where), row.get("image_id")
        if image_id not in names:
            raise ValueError(f"{where}: its image_id {image_id} is not among the file's images")
        captions[image_id].append(caption)
    return [(name, captions[i]) for i, name in names.items() if i in captions]


def _find_image(root: Path, folders: Sequence[str], name: str) -> Path:
    """Returns the first of the paths at which an image may be where there is a file; if there is none, the first."""
    names = dict.fromkeys([name, name.rsplit("/", 1)[-1]])
    number = re.fullmatch(r"COCO_(?:train|val)2014_(\d{12}\.jpg)", name.rsplit("/", 1)[-1])
    if number:  # the release of 2017 has the same images under shorter names
        names |= dict.fromkeys(f"{folder}/{number[1]}" for folder in ("val2017", "train2017"))
    paths = [root / folder / n for n in names for folder in folders]
    return next((path for path in paths if file_identity(path) is not None), paths[0])
