"""COCO and Flickr30k: photos with five short captions each, in Karpathy's splits. Captions are left unchanged.

ANNO  {"images": [{"filepath": "val2014", "filename": "COCO_val2014_000000391895.jpg", "split": "test",
                   "sentences": [{"raw": ..}, ..]}, ..]}                      dataset_coco.json, dataset_flickr30k.json
or    [{"image": "val2014/COCO_val2014_000000391895.jpg", "caption": [five texts]}, ..]
or    {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}      COCO's captions_val2017.json
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dataloaders.pairs import OfficialLists, RetrievalSet, several_captions_per_image
from dataloaders.registry import Benchmark, Option, Tree, chosen_protocols
from training.readers.files import first_present, read_json, require_dir, text_field

NUM_CAPTIONS = 5  # some COCO images have six or seven; papers use the first five
SPLITS = ("test", "val")
VAL2017 = "coco/val2017"
UNVERIFIED = "a list without Karpathy's splits"


@dataclass(frozen=True)
class _Benchmark:
    """What differs between COCO and Flickr30k: names, usual file locations, image counts and protocols by split.

    Attributes:
        num_images: number of images by split.
        num_listed: number of images of all splits in Karpathy's file.
    """

    key: str
    title: str
    flag: str
    annotations: tuple[str, ...]
    folders: tuple[str, ...]
    num_images: dict[str, int]
    num_listed: int
    protocols: dict[str, str]
    source: str

    @property
    def official(self) -> dict[str, OfficialLists]:
        """The official lists of each protocol."""
        lists = {name: {NUM_CAPTIONS * self.num_images[split]: ()} for split, name in self.protocols.items()}
        return lists | ({VAL2017: {NUM_CAPTIONS * 5000: ()}} if self.key == "coco" else {})


COCO = _Benchmark(
    "coco",
    "COCO",
    "--coco-retrieval",
    ("dataset_coco.json", "annotations/dataset_coco.json", "annotations/captions_val2017.json"),
    ("", "images"),
    {"test": 5000, "val": 5000},
    123_287,
    {"test": "coco/karpathy", "val": "coco/karpathy-val"},
    "see COCO in EVAL_DATASETS.md: Karpathy's dataset_coco.json and val2014.zip",
)
FLICKR30K = _Benchmark(
    "flickr30k",
    "Flickr30k",
    "--flickr30k-retrieval",
    ("dataset_flickr30k.json", "annotations/dataset_flickr30k.json", "flickr30k_test.json"),
    ("flickr30k-images", "flickr30k_images", "images", "Images", ""),
    {"test": 1000, "val": 1014, "all": 31_014},
    31_014,
    {"test": "flickr30k/test", "val": "flickr30k/val", "all": "flickr30k/all"},
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
        split: ``test`` or ``val`` (Karpathy's splits), or ``all`` images; a list without splits is read completely.

    Raises:
        FileNotFoundError, ValueError: the list is missing or broken, or has no image of this split.
    """
    root = require_dir(root, which.flag)
    path = _find_annotations(which, root, annotations)
    content = read_json(path)
    key, title, expected = which.key, which.title, which.num_images[split]
    protocol, fault = which.protocols[split], ""
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        rows = _official_rows(content, path)
        protocol = f"{key}/{_official_name(path)}"
        # These are not the images of Karpathy's test split, so they need another name.
        key, title, expected = f"{key}-{_official_name(path)}", f"{title} {_official_name(path)}", None
        if _official_name(path) == "val2017":
            expected = 5000
    elif isinstance(content, dict) and isinstance(content.get("images"), list):
        rows = _karpathy_rows(content["images"], path, split)
        if len(content["images"]) != which.num_listed:
            fault = f"{len(content['images']):,} images in Karpathy's list instead of {which.num_listed:,}"
    elif isinstance(content, list):
        rows, fault = _listed_rows(content, path), UNVERIFIED
    else:
        raise ValueError(
            f"{path}: expected Karpathy's {{'images': [..]}}, COCO's annotations or a list; {which.source}"
        )
    if split != "test" and key == which.key:
        key, title = f"{key}-{split}", f"{title} {split}"
    if not rows:
        raise ValueError(f"{path}: no image of split {split!r}; {which.source}")
    images = first_present([_candidates(which, root, name) for name, _ in rows])
    captions = [own[:NUM_CAPTIONS] for _, own in rows]
    return several_captions_per_image(
        f"{key}-retrieval",
        title,
        list(zip(images, captions)),
        num_published=expected and expected * NUM_CAPTIONS,
        source=which.source,
        protocol=protocol,
        official=which.official.get(protocol),
        fault=fault,
    )


def _find_annotations(which: _Benchmark, root: Path, annotations: str | Path | None) -> Path:
    if annotations is not None:
        if not Path(annotations).is_file():
            raise FileNotFoundError(f"--{which.key}-anno {annotations}: no such file; {which.source}")
        return Path(annotations)
    for name in which.annotations:
        if (root / name).is_file():
            return root / name
    raise FileNotFoundError(
        f"{which.flag} {root}: found none of {', '.join(which.annotations)}; name the list of captions with "
        f"--{which.key}-anno, {which.source}"
    )


def _karpathy_rows(items: list, path: Path, split: str) -> list[tuple[str, list[str]]]:
    """Returns (path of the image, its captions) for each image of a split, in file order."""
    rows = []
    for number, item in enumerate(items):
        where = f"{path} image {number}"
        if text_field(item, "split", where) != split and split != "all":
            continue
        name = text_field(item, "filename", where)
        sentences = item.get("sentences")
        if not isinstance(sentences, list) or not sentences:
            raise ValueError(f"{where}: expected a list under 'sentences'")
        folder = item.get("filepath")
        rows.append((f"{folder}/{name}" if folder else name, [text_field(s, "raw", where) for s in sentences]))
    return rows


def _listed_rows(items: list, path: Path) -> list[tuple[str, list[str]]]:
    rows = []
    for number, item in enumerate(items):
        where = f"{path} item {number}"
        name, captions = text_field(item, "image", where), item.get("caption")
        if not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
            raise ValueError(f"{where}: expected a list of texts under 'caption'")
        rows.append((name, captions))
    return rows


def _official_rows(content: dict, path: Path) -> list[tuple[str, list[str]]]:
    names, captions = {}, {}
    for number, image in enumerate(content.get("images") or []):
        name = text_field(image, "file_name", f"{path} image {number}")
        names[image.get("id")] = name if "/" in name else f"{_official_name(path)}/{name}"
    for number, row in enumerate(content["annotations"]):
        where = f"{path} annotation {number}"
        caption = text_field(row, "caption", where)
        if row.get("image_id") not in names:
            raise ValueError(f"{where}: its image_id {row.get('image_id')} is not among the file's images")
        captions.setdefault(row["image_id"], []).append(caption)
    return [(name, captions[i]) for i, name in names.items() if i in captions]


def _official_name(path: Path) -> str:
    """``captions_val2017.json`` -> ``val2017``."""
    return path.stem.removeprefix("captions_")


def _candidates(which: _Benchmark, root: Path, name: str) -> list[Path]:
    """Returns the paths at which an image may be; a message about a missing image names the first one."""
    names = dict.fromkeys([name, name.rsplit("/", 1)[-1]])
    number = re.fullmatch(r"COCO_(?:train|val)2014_(\d{12}\.jpg)", name.rsplit("/", 1)[-1])
    if number:  # the release of 2017 has the same images under shorter names
        names |= dict.fromkeys(f"{folder}/{number[1]}" for folder in ("val2017", "train2017"))
    return [root / folder / n for n in names for folder in which.folders]


SPLIT = Option("--karpathy-split", "split of COCO and Flickr30k (default: %(default)s)", default="test", choices=SPLITS)


def _read_chosen(which: _Benchmark, args: argparse.Namespace, root: str, annotations: str | None) -> list[RetrievalSet]:
    """Reads the protocols that ``--protocol`` names; without one, the split of ``--karpathy-split``."""
    by_split = which.protocols[args.karpathy_split]
    sets = []
    for protocol in chosen_protocols(args, list(dict.fromkeys([by_split, *which.official]))):
        if protocol == VAL2017:
            sets.append(
                read_karpathy(which, root, annotations or Path(root) / "annotations" / "captions_val2017.json", "test")
            )
        else:
            split = next(split for split, name in which.protocols.items() if name == protocol)
            sets.append(read_karpathy(which, root, annotations, split))
    return sets


def _declare(which: _Benchmark, order: int, read: Callable[[argparse.Namespace], list[RetrievalSet]]) -> Benchmark:
    annotations = Option(
        f"--{which.key}-anno",
        f"dataset_{which.key}.json (default: searched for in DIR)",
        metavar="FILE",
        aliases=("--anno",),
    )
    return Benchmark(
        which.key,
        which.flag,
        f"{which.title}: folder with images and captions",
        read,
        group="short",
        order=order,
        options=(annotations, SPLIT),
        protocols=which.official,
        tree=Tree(which.key, which.annotations),
        suites=("short",),
        source=which.source,
    )


BENCHMARKS = (
    _declare(COCO, 10, lambda args: _read_chosen(COCO, args, args.coco_retrieval, args.coco_anno)),
    _declare(FLICKR30K, 20, lambda args: _read_chosen(FLICKR30K, args, args.flickr30k_retrieval, args.flickr30k_anno)),
)
