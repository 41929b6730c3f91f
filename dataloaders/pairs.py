"""What every benchmark reader returns, and the check that its image files exist."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from training.readers.files import file_identity, parallel_map

# Number of pairs of an official list -> its fingerprints, of which a complete set must have one. An empty tuple stands
# for a list that was not at hand when this was written: then only the number of pairs and the structure are checked.
# Every evaluation prints the fingerprint of what it read; a copy of the official list gives the value to enter here.
OfficialLists = Mapping[int, tuple[str, ...]]
MODIFIED = " (modified)"


@dataclass(frozen=True)
class RetrievalSet:
    """A retrieval benchmark: images, captions, and which image each caption belongs to.

    Attributes:
        key: prefix of the published result keys, e.g. ``share4v-retrieval-1000``.
        title: heading in tables, e.g. ``SV-1k``.
        image_paths: one file per image, in the published order.
        captions: normalised captions, in the published order.
        image_of_caption: for each caption the index of its image; several captions may share an image.
        num_published: number of pairs of the full benchmark; None if there is no such number.
        missing: one readable line for each pair that had to be left out; empty if the set is complete.
        source: how to get the missing files, one line.
        protocol: name of the variant that was read, e.g. ``dci/short+extra``, followed by `MODIFIED` if the list is
            not the official one; empty for a user's own pairs.
        fault: a difference from the official list that the reader found.
    """

    key: str
    title: str
    image_paths: tuple[Path, ...]
    captions: tuple[str, ...]
    image_of_caption: tuple[int, ...]
    num_published: int | None = None
    missing: tuple[str, ...] = ()
    source: str = ""
    protocol: str = ""
    fault: str = ""

    def fingerprint(self) -> str:
        """Returns 16 hex digits that identify the exact list of image names and captions, and how images are turned."""
        content = [[path.name for path in self.image_paths], self.captions, self.image_of_caption]
        if any(getattr(path, "upright", False) for path in self.image_paths):
            content.append("EXIF rotation")
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def without_images(self, reasons: dict[int, str]) -> "RetrievalSet":
        """Returns the set without some images and their captions.

        Args:
            reasons: image index -> the line to add to `missing`.
        """
        if not reasons:
            return self
        kept = [i for i in range(len(self.image_paths)) if i not in reasons]
        new_index = {old: new for new, old in enumerate(kept)}
        captions = [(c, new_index[i]) for c, i in zip(self.captions, self.image_of_caption) if i in new_index]
        lost = sorted(i for i in self.image_of_caption if i in reasons)
        return replace(
            self,
            image_paths=tuple(self.image_paths[i] for i in kept),
            captions=tuple(c for c, _ in captions),
            image_of_caption=tuple(i for _, i in captions),
            missing=self.missing + tuple(reasons[i] for i in lost),
        )


def check_list(s: RetrievalSet, official: OfficialLists) -> RetrievalSet:
    """Appends `MODIFIED` to the protocol of a set whose list is not an official one, and warns.

    Args:
        s: a set as read, before images are looked up.
        official: the official lists of its protocol; if there are none, only the reader's `fault` counts.
    """
    number, fault = len(s.captions) + len(s.missing), s.fault
    if not fault and number not in official:
        fault = f"{number:,} pairs instead of {' or '.join(f'{n:,}' for n in official)}"
    if not fault and len(set(s.image_paths)) < len(s.image_paths):
        fault = "an image occurs twice"
    if not fault and official[number] and not s.missing and s.fingerprint() not in official[number]:
        fault = f"fingerprint {s.fingerprint()} instead of {' or '.join(official[number])}"
    if not fault:
        return s
    logging.warning(
        f"{s.title}: not the list of {s.protocol} ({fault}), so its numbers are not compared with published ones."
    )
    return replace(s, protocol=s.protocol + MODIFIED)


def retrieval_set(key: str, title: str, rows: Sequence[tuple[Path, Sequence[str]]], **fields) -> RetrievalSet:
    """Builds a `RetrievalSet` from (image path, its captions) rows; the captions of an image follow one another.

    Args:
        key, title, fields: attributes of the set.
        rows: the rows, in the published order.
    """
    captions = tuple(caption for _, texts in rows for caption in texts)
    empty = sum(not c for c in captions)
    if empty:
        logging.warning(f"{title}: {empty:,} of {len(captions):,} captions are empty; their pairs are kept.")
    image_of_caption = tuple(number for number, (_, texts) in enumerate(rows) for _ in texts)
    return RetrievalSet(key, title, tuple(path for path, _ in rows), captions, image_of_caption, **fields)


@dataclass(frozen=True)
class ClassTexts:
    """Descriptions of the classes of a classification set, used instead of templates with their names.

    Attributes:
        name: where the texts come from, for tables and results.
        texts: for each class its texts, at least one.
    """

    name: str
    texts: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class ClassificationSet:
    """A classification benchmark: images, and the class of each.

    Attributes:
        key: prefix of the result keys, e.g. ``imagenet-zeroshot-val`` (open_clip's).
        title: heading in tables.
        image_paths: one file per image.
        labels: for each image its class, 0 to 999 in ImageNet's usual order.
        num_published: number of images of the full set.
        class_texts: descriptions of the classes; None means open_clip's class names and templates.
        source: how to get the missing files.
    """

    key: str
    title: str
    image_paths: tuple[Path, ...]
    labels: tuple[int, ...]
    num_published: int
    class_texts: ClassTexts | None = None
    source: str = ""


def find_images(sets: list[RetrievalSet]) -> tuple[list[RetrievalSet], dict[Path, object]]:
    """Looks up every image file of all sets, in parallel.

    Returns:
        The sets without the images that have no file (these are named in `missing`), and the identity of each file:
        two paths to the same inode have the same one, so an image that is linked into several benchmarks is encoded
        once.
    """
    wanted = list(dict.fromkeys(path for s in sets for path in s.image_paths))
    identity = dict(zip(wanted, parallel_map(file_identity, wanted)))
    present = [
        s.without_images({i: f"{p}: no such image" for i, p in enumerate(s.image_paths) if identity[p] is None})
        for s in sets
    ]
    return present, {path: found for path, found in identity.items() if found is not None}


def describe_missing(retrieval_set: RetrievalSet) -> str:
    """Returns a paragraph with the count, the first ten missing items and how to get them."""
    different = list(dict.fromkeys(retrieval_set.missing))  # a missing image gives one line per caption
    shown = different[:10]
    total = len(retrieval_set.missing) + len(retrieval_set.captions)
    lines = [f"{retrieval_set.title}: {len(retrieval_set.missing):,} of {total:,} pairs are missing:"]
    lines += [f"  {line}" for line in shown]
    if len(shown) < len(different):
        lines.append(f"  .. and {len(different) - len(shown):,} more")
    if retrieval_set.source:
        lines.append(f"  To get them: {retrieval_set.source}")
    return "\n".join(lines)


def describe_completeness(s: RetrievalSet) -> tuple[str, bool]:
    """Returns whether a set whose images were looked up is complete, and a line or paragraph about it first."""
    expected = s.num_published or len(s.captions)
    if s.missing:
        return describe_missing(s), False
    if len(s.captions) < expected:
        return f"{s.title}: no image is missing, but only {len(s.captions):,} of {expected:,} pairs listed", False
    return f"{s.title}: complete, {len(s.captions):,} pairs", True
