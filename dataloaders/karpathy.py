"""COCO and Flickr30k: photos with five short captions each, in Karpathy's splits. Captions are left unchanged.

ANNO  {"images": [{"filepath": "val2014", "filename": "COCO_val2014_000000391895.jpg", "split": "test",
                   "sentences": [{"raw": ..}, ..]}, ..]}                      dataset_coco.json, dataset_flickr30k.json
or    [{"image": "val2014/COCO_val2014_000000391895.jpg", "caption": [five texts]}, ..]
or    {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}      COCO's captions_val2017.json
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dataloaders.pairs import OfficialLists, RetrievalSet, several_captions_per_image
from dataloaders.registry import Benchmark, Option, Tree
from training.readers.files import file_identity, parallel_map, read_json, require_dir, text_field

NUM_CAPTIONS = 5  # some COCO images have six or seven; papers use the first five
VAL2017 = "annotations/captions_val2017.json"


@dataclass(frozen=True)
class _Benchmark:
    """What differs between COCO and Flickr30k: names, usual file locations and protocols.

    Attributes:
        num_listed: number of images of all splits in Karpathy's file.
        protocols: split -> (name of its protocol, number of its images).
    """

    key: str
    title: str
    annotations: tuple[str, ...]
    folders: tuple[str, ...]
    num_listed: int
    protocols: dict[str, tuple[str, int]]
    source: str

    @property
    def official(self) -> dict[str, OfficialLists]:
        """The official lists of each protocol."""
        return {name: {NUM_CAPTIONS * number: ()} for name, number in self.protocols.values()}


COCO = _Benchmark(
    "coco",
    "COCO",
    ("dataset_coco.json", "annotations/dataset_coco.json", VAL2017),
    ("", "images"),
    123_287,
    {"test": ("coco/karpathy", 5000), "val": ("coco/karpathy-val", 5000), "val2017": ("coco/val2017", 5000)},
    "see COCO in EVAL_DATASETS.md: Karpathy's dataset_coco.json and val2014.zip",
)
FLICKR30K = _Benchmark(
    "flickr30k",
    "Flickr30k",
    ("dataset_flickr30k.json", "annotations/dataset_flickr30k.json", "flickr30k_test.json"),
    ("flickr30k-images", "flickr30k_images", "images", "Images", ""),
    31_014,
    {"test": ("flickr30k/test", 1000), "val": ("flickr30k/val", 1014), "all": ("flickr30k/all", 31_014)},
    "see Flickr30k in EVAL_DATASETS.md: Karpathy's dataset_flickr30k.json and the images of the Illinois group",
)


def read_karpathy(
    which: _Benchmark, root: str | Path, annotations: str | Path | None = None, split: str = "test"
) -> RetrievalSet:
    """Reads COCO or Flickr30k.

    Args:
        which: `COCO` or `FLICKR30K`.
        root: folder with the images, in one of the usual layouts.
        annotations: the list of captions; if None, it is searched for below the root.
        split: ``test`` or ``val`` (Karpathy's splits), ``all`` images, or ``val2017`` of COCO; a list without splits is
            read completely.

    Raises:
        FileNotFoundError, ValueError: the list is missing or broken, or has no image of this split.
    """
    flag = f"--{which.key}-retrieval"
    root = require_dir(root, flag)
    if annotations is None:
        names = (VAL2017,) if split == "val2017" else which.annotations
        annotations = next((root / name for name in names if (root / name).is_file()), None)
        if annotations is None:
            raise FileNotFoundError(
                f"{flag} {root}: found none of {', '.join(names)}; name the list of captions with --{which.key}-anno, "
                f"{which.source}"
            )
    path = Path(annotations)
    if not path.is_file():
        raise FileNotFoundError(f"--{which.key}-anno {path}: no such file; {which.source}")
    content = read_json(path)
    name, protocol, fault = "" if split == "test" else split, which.protocols[split][0], ""
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        # These are not the images of Karpathy's test split, so they need another name.
        name = path.stem.removeprefix("captions_")
        rows, protocol = _official_rows(content, path, name), f"{which.key}/{name}"
    elif isinstance(content, dict) and isinstance(content.get("images"), list):
        rows = _karpathy_rows(content["images"], path, split)
        if len(content["images"]) != which.num_listed:
            fault = f"{len(content['images']):,} images in Karpathy's list instead of {which.num_listed:,}"
    elif isinstance(content, list):
        rows, fault = _listed_rows(content, path), "a list without Karpathy's splits"
    else:
        expected = "expected Karpathy's {'images': [..]}, COCO's annotations or a list"
        raise ValueError(f"{path}: {expected}; {which.source}")
    if not rows:
        raise ValueError(f"{path}: no image of split {split!r}; {which.source}")
    images = parallel_map(partial(_find_image, which, root), [image for image, _ in rows])
    return several_captions_per_image(
        f"{which.key}-{name}-retrieval" if name else f"{which.key}-retrieval",
        f"{which.title} {name}".rstrip(),
        [(image, captions[:NUM_CAPTIONS]) for image, (_, captions) in zip(images, rows)],
        source=which.source,
        protocol=protocol,
        official=which.official.get(protocol),
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


def _find_image(which: _Benchmark, root: Path, name: str) -> Path:
    """Returns the first of the paths at which an image may be where there is a file; if there is none, the first."""
    names = dict.fromkeys([name, name.rsplit("/", 1)[-1]])
    number = re.fullmatch(r"COCO_(?:train|val)2014_(\d{12}\.jpg)", name.rsplit("/", 1)[-1])
    if number:  # the release of 2017 has the same images under shorter names
        names |= dict.fromkeys(f"{folder}/{number[1]}" for folder in ("val2017", "train2017"))
    paths = [root / folder / n for n in names for folder in which.folders]
    return next((path for path in paths if file_identity(path) is not None), paths[0])


def _declare(which: _Benchmark, order: int, paths: Callable[[argparse.Namespace], tuple[str, str | None]]) -> Benchmark:
    """Returns the benchmark; `paths` gives the values of its two flags, folder and annotations."""
    split_of = {protocol: split for split, (protocol, _) in which.protocols.items()}

    def read(args: argparse.Namespace, protocol: str) -> list[RetrievalSet]:
        folder, annotations = paths(args)
        return [read_karpathy(which, folder, annotations, split_of[protocol])]

    help = f"dataset_{which.key}.json (default: searched for in DIR)"
    return Benchmark(
        which.key,
        f"--{which.key}-retrieval",
        f"{which.title}: folder with images and captions",
        read,
        group="short",
        order=order,
        options=(Option(f"--{which.key}-anno", help, metavar="FILE"),),
        protocols=which.official,
        tree=Tree(which.key, which.annotations),
        suites=("short",),
        source=which.source,
    )


BENCHMARKS = (
    _declare(COCO, 10, lambda args: (args.coco_retrieval, args.coco_anno)),
    _declare(FLICKR30K, 20, lambda args: (args.flickr30k_retrieval, args.flickr30k_anno)),
)
