"""Draws a long-caption data set: test scenes as all four benchmarks, training scenes as webdataset shards.

    python -m dataloaders.scenes OUT --train 12000 --test 1000 --seed 0

    OUT/dci/densely_captioned_images/{splits.json,annotations/,photos/}     OUT/share4v/{anno.json,sa_000000/images/}
    OUT/iiw/{docci,docci_aar,dci}/, OUT/iiw/{DOCCI_Test,IIW-400,DCI_Test}/data.jsonl    OUT/urban1k/{image,caption}/
    OUT/train/00000.tar, ..     1,000 samples each: KEY.jpg, KEY.txt, KEY.json (raw and three long captions)
    OUT/test_labels.json        class of each test scene's large object, and the 48 prompts

All four benchmarks show the same scenes, each with its own wording. The same seed gives the same bytes.
"""

import argparse
import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from dataloaders.scene_drawing import draw_scene, large_object_prompts, make_scene

SAMPLES_PER_SHARD = 1000
MANIFEST = "scenes.json"
PARTS = ("dci", "iiw", "share4v", "urban1k", "train")
LONG_KEYS = ("longIB_captions", "longSV_captions", "longLLA_captions")
# (subset, image folder, key of the file name, format of the name), which differ between the published files.
IIW_PARTS = (
    ("DOCCI_Test", "docci", "image", "test_{:05d}"),
    ("IIW-400", "docci_aar", "image/key", "aar_test_{:05d}"),
    ("DCI_Test", "dci", "image", "sa_{}.jpg"),
)


def write_scenes(out: str | Path, num_train: int, num_test: int, seed: int) -> None:
    """Writes the whole set below `out`, replacing the set of an earlier call.

    Args:
        out: folder, created if it doesn't exist. A folder with other content is refused.
        num_train: number of training scenes, in shards of 1,000.
        num_test: number of test scenes, in the layouts of the four benchmarks.
        seed: the same seed gives the same bytes (with the same release of Pillow).

    Raises:
        ValueError: `out` is a file, or a folder with other content.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file, expected a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise ValueError(f"{out}: holds other files (no {MANIFEST}); name a new or empty folder")
    out.mkdir(parents=True, exist_ok=True)
    # Written first, so that an interrupted run is recognised and can be repeated.
    _write_json(out / MANIFEST, {"seed": seed, "train": num_train, "test": num_test})
    for part in PARTS:
        shutil.rmtree(out / part, ignore_errors=True)
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        _write_benchmarks(out, num_test, seed, pool)
        _write_shards(out / "train", num_train, seed, pool)


def _write_benchmarks(out: Path, num_test: int, seed: int, pool: ProcessPoolExecutor) -> None:
    scenes = [make_scene(seed, "test", i) for i in range(num_test)]
    images = list(pool.map(partial(_jpeg, seed, "test"), range(num_test), chunksize=64))
    captions = [[" ".join(scene.long_caption(v)) for scene in scenes] for v in range(4)]
    shorts = [scene.short_caption() for scene in scenes]
    photos = _write_dci(out / "dci" / "densely_captioned_images", shorts, captions[0], images)
    _write_iiw(out / "iiw", captions[1], photos)
    _write_share4v(out / "share4v", captions[2], photos)
    _write_urban1k(out / "urban1k", captions[3], photos)
    labels = {"prompts": large_object_prompts(), "labels": [scene.label for scene in scenes]}
    _write_json(out / "test_labels.json", labels | {"images": [str(p.relative_to(out)) for p in photos]})


def _write_dci(base: Path, shorts: list[str], captions: list[str], images: list[bytes]) -> list[Path]:
    """Returns the paths of the photos, to which the other benchmarks link."""
    (base / "photos").mkdir(parents=True)
    photos, names = [], []
    for i, (short, caption, image) in enumerate(zip(shorts, captions, images)):
        photos.append(base / "photos" / f"sa_{i}.jpg")
        photos[-1].write_bytes(image)
        names.append(f"{i}-data.json")
        row = {"image": photos[-1].name, "short_caption": short.capitalize() + ".", "extra_caption": caption}
        _write_json(base / "annotations" / names[-1], row)
    ends = len(names) * 8 // 10, len(names) * 9 // 10
    splits = {"train": names[: ends[0]], "valid": names[ends[0] : ends[1]], "test": names[ends[1] :]}
    _write_json(base / "splits.json", splits)
    return photos


def _write_iiw(base: Path, captions: list[str], photos: list[Path]) -> None:
    ends = 0, len(photos) // 6, len(photos) * 5 // 6, len(photos)  # 100 : 400 : 112, about
    for number, (subset, folder, key, naming) in enumerate(IIW_PARTS):
        lines = []
        for i in range(ends[number], ends[number + 1]):
            name = naming.format(i)
            _link(photos[i], base / folder / (name.removesuffix(".jpg") + ".jpg"))
            lines.append(json.dumps({key: name, "IIW": captions[i]}) + "\n")
        _write_text(base / subset / "data.jsonl", "".join(lines))


def _write_share4v(base: Path, captions: list[str], photos: list[Path]) -> None:
    items = []
    for i, (caption, photo) in enumerate(zip(captions, photos)):
        image = f"sa_000000/images/sa_{i}.jpg"
        _link(photo, base / image)
        turns = [{"from": "human", "value": "Describe the image.\n<image>"}, {"from": "gpt", "value": caption}]
        items.append({"id": f"sa_{i}", "image": image, "conversations": turns})
    _write_json(base / "anno.json", items)


def _write_urban1k(base: Path, captions: list[str], photos: list[Path]) -> None:
    for i, (caption, photo) in enumerate(zip(captions, photos), start=1):
        _link(photo, base / "image" / f"{i}.jpg")
        _write_text(base / "caption" / f"{i}.txt", caption + "\n")


def _write_shards(folder: Path, num_train: int, seed: int, pool: ProcessPoolExecutor) -> None:
    folder.mkdir()
    starts = range(0, num_train, SAMPLES_PER_SHARD)
    stops = [min(start + SAMPLES_PER_SHARD, num_train) for start in starts]
    paths = [folder / f"{number:05d}.tar" for number in range(len(starts))]
    list(pool.map(partial(_write_shard, seed), paths, starts, stops))


def _write_shard(seed: int, path: Path, start: int, stop: int) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in range(start, stop):
            scene = make_scene(seed, "train", index)
            short = scene.short_caption()
            row = {"key": f"{index:09d}", "raw_caption": short}
            row |= {key: " ".join(scene.long_caption(variant)) for variant, key in enumerate(LONG_KEYS)}
            files = {"jpg": _jpeg(seed, "train", index), "txt": short.encode(), "json": json.dumps(row).encode()}
            for suffix, content in files.items():
                member = tarfile.TarInfo(f"{index:09d}.{suffix}")  # time and owner are 0, so the bytes are reproducible
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _jpeg(seed: int, split: str, index: int) -> bytes:
    buffer = io.BytesIO()
    draw_scene(make_scene(seed, split, index)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def _link(source: Path, target: Path) -> None:
    """Makes a hard link if the disk supports it, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write_json(path: Path, content: object) -> None:
    _write_text(path, json.dumps(content, indent=1) + "\n")


def _write_text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8", newline="\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, or exits with 2 on a usage error."""
    parser = argparse.ArgumentParser(
        prog="python -m dataloaders.scenes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", metavar="OUT", help="folder to write to; an earlier set there is replaced")
    parser.add_argument("--train", type=int, default=12000, metavar="N", help="training scenes (default: %(default)s)")
    parser.add_argument("--test", type=int, default=1000, metavar="M", help="test scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.train < 0 or args.test < 1:
        parser.error(f"--train {args.train} --test {args.test}: expected at least 0 and at least 1")
    try:
        write_scenes(args.out, args.train, args.test, args.seed)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"{args.train:,} training and {args.test:,} test scenes in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
