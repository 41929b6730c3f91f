"""ImageNet-1k's validation images and ImageNet-v2, for zero-shot classification.

VAL/n01440764/*.JPEG    one folder per class, named by its WordNet id
V2/0/*.jpeg             one folder per class, named by its number (0 to 999)
"""

import hashlib
import os
from importlib.util import find_spec
from pathlib import Path

from dataloaders.pairs import ClassificationSet, ClassTexts
from training.readers.files import natural_key, parallel_map, read_json, require_dir

NUM_CLASSES = 1000
NUM_VAL, NUM_V2 = 50_000, 10_000
V2_FOLDERS = ("imagenetv2-matched-frequency-format-val", "ImageNetV2-matched-frequency")
NAMES, V2_NAMES = "a WordNet id such as n01440764", "a number from 0 to 999"
SUFFIXES = (".jpeg", ".jpg", ".png")


def read_imagenet(root: str | Path, prompts: str | Path | None = None, *, v2: bool = False) -> ClassificationSet:
    """Reads ImageNet-1k's validation images, of which some classes may be missing, or ImageNet-v2, matched-frequency.

    Args:
        root: the folder with a folder per class; for ImageNet-v2 also its parent folder.
        prompts: a file of class descriptions, see `read_prompts`.
        v2: read ImageNet-v2, whose folders are sorted as numbers (10 comes after 9).

    Raises:
        FileNotFoundError, ValueError: there is no such folder, or none of its folders is named after a class.
    """
    root = require_dir(root)
    root = next((root / name for name in V2_FOLDERS if v2 and (root / name).is_dir()), root)
    if any(name.startswith("ILSVRC2012_val_") for name in os.listdir(root)):
        raise FileNotFoundError(f"{root}: all images are in one folder; sort them, one per class")
    names = map(str, range(NUM_CLASSES)) if v2 else _wordnet_ids()
    images = _read_classes(root, {name: number for number, name in enumerate(names)}, V2_NAMES if v2 else NAMES)
    texts = read_prompts(prompts) if prompts else None
    if v2:
        return ClassificationSet("imagenetv2-zeroshot-val", "ImageNet-v2", *images, NUM_V2, texts)
    return ClassificationSet("imagenet-zeroshot-val", "ImageNet-1k", *images, NUM_VAL, texts)


def read_prompts(path: str | Path) -> ClassTexts:
    """Reads descriptions of ImageNet's classes: a JSON object of class name or WordNet id -> list of texts.

    This is the format of CuPL (arXiv 2209.03320). In a file of several data sets, such as CLIP_benchmark's
    ``cupl_prompts.json``, the classes are under ``imagenet1k``. Class names are open_clip's. Two names stand for two
    classes each; both classes then get the same texts, unless the file gives their WordNet ids.

    Raises:
        FileNotFoundError, ValueError: there is no such file, it has another format, a class has no texts, or a class
            is unknown.
    """
    from open_clip import IMAGENET_CLASSNAMES  # imports PyTorch

    where = f"--imagenet-prompts {path}"
    if not Path(path).is_file():
        raise FileNotFoundError(f"{where}: no such file")
    found = read_json(Path(path))
    found = found.get("imagenet1k", found) if isinstance(found, dict) else found
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected an object of class name -> list of texts, found a {type(found).__name__}")
    for name, texts in found.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise ValueError(f"{where}: class {name!r}: expected a list of texts, at least one and none of them empty")
    classes = list(zip(_wordnet_ids(), IMAGENET_CLASSNAMES))
    unknown = found.keys() - {key for keys in classes for key in keys}
    absent = [name for number, name in classes if number not in found and name not in found]
    for what, names in (("no class is called", sorted(unknown)), ("no texts for", absent)):
        if names:
            shown = ", ".join(names[:5]) + " .." * (len(names) > 5)
            expected = "expected the names of open_clip.IMAGENET_CLASSNAMES or WordNet ids, all 1,000 classes"
            raise ValueError(f"{where}: {what} {shown} ({len(names):,} in all); {expected}")
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    texts = tuple(tuple(found.get(number) or found[name]) for number, name in classes)
    return ClassTexts(f"{Path(path).name} (sha256 {digest})", texts)


def _read_classes(root: Path, numbers: dict[str, int], named: str) -> tuple[tuple[Path, ...], tuple]:
    names = sorted((n for n in os.listdir(root) if n in numbers and (root / n).is_dir()), key=numbers.__getitem__)
    if not names:
        raise ValueError(f"{root}: expected a folder per class, named by {named}; found no such folder")
    files = parallel_map(lambda name: sorted(os.listdir(root / name), key=natural_key), names)
    found = [
        (root / name / file, numbers[name])
        for name, in_folder in zip(names, files)
        for file in in_folder
        if file.lower().endswith(SUFFIXES) and not file.startswith(".")  # macOS leaves ._1.JPEG beside 1.JPEG
    ]
    return tuple(path for path, _ in found), tuple(label for _, label in found)


def _wordnet_ids() -> list[str]:
    """Returns the ids of the 1,000 classes in ImageNet's order (open_clip's names follow it), from timm's list."""
    # timm is found, not imported: that would load PyTorch.
    timm = Path(str(find_spec("timm").origin)).parent  # type: ignore[union-attr]  # it is a dependency
    return (timm / "data" / "_info" / "imagenet_synsets.txt").read_text(encoding="ascii").split()
