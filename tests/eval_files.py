"""Writes small benchmarks in the published layouts."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

WNIDS = ("n01440764", "n01443537", "n15075141")  # tench (0), goldfish (1), toilet tissue (999)


def write_image(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((48, 40)).save(path, quality=95)
    return path


def five_captions(number: int) -> list[str]:
    return [f"Picture {number}, told {k}.5 times." for k in range(5)]


def write_docci(root: Path, num_test: int = 6) -> Path:
    rows = []
    for number in range(num_test + 2):
        split = "train" if number % 4 == 3 and number // 4 < 2 else "test"
        name = f"{split}_{number:05d}.jpg"
        rows.append({"example_id": name[:-4], "split": split, "image_file": name})
        rows[-1]["description"] = f"View {number}. It has {number} trees.\nA 3.5 m pole stands left"
        if split == "test":
            write_image(root / "images" / name, number)
    (root / "docci_descriptions.jsonlines").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def karpathy_items(num: int, folder: str | None, naming: str, more: int = 0) -> list[dict]:
    """Returns `num` test images and one of each other split, as in dataset_coco.json and dataset_flickr30k.json."""
    items = []
    for number in range(num + 3):
        split = ("restval", "val", "train")[number - num] if number >= num else "test"
        captions = five_captions(number) + [f"One too many {k}" for k in range(more)]
        item = {"filename": naming.format(number), "split": split, "imgid": number}
        item |= {"filepath": folder} if folder else {}
        items.append(item | {"sentences": [{"raw": text, "tokens": text.split()} for text in captions]})
    return items


def write_coco(root: Path, num: int = 6) -> Path:
    items = karpathy_items(num, "val2014", "COCO_val2014_{:012d}.jpg", more=1)
    (root / "annotations").mkdir(parents=True)
    (root / "annotations" / "dataset_coco.json").write_text(json.dumps({"images": items, "dataset": "coco"}))
    for number, item in enumerate(items):
        write_image(root / "images" / "val2014" / item["filename"], number)
    return root


def write_flickr30k(root: Path, num: int = 5) -> Path:
    items = karpathy_items(num, None, "{}.jpg")
    for number, item in enumerate(items):
        write_image(root / "flickr30k-images" / item["filename"], number)
    (root / "dataset_flickr30k.json").write_text(json.dumps({"images": items, "dataset": "flickr30k"}))
    return root


def write_imagenet(root: Path, per_class: int = 3) -> Path:
    for label, wnid in zip((0, 1, 999), WNIDS):
        for k in range(per_class):
            write_image(root / wnid / f"ILSVRC2012_val_{label * 10 + k:08d}.JPEG", label * 10 + k)
    return root


def write_imagenet_v2(root: Path) -> Path:
    for label in (2, 10, 999):
        write_image(root / "imagenetv2-matched-frequency-format-val" / str(label) / "a.jpeg", label)
    return root


def write_table(path: Path, num: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filepath", "caption", "note"])
        for number in range(num):
            write_image(path.parent / "pics" / f"{number}.jpg", number)
            for k in range(2):
                writer.writerow([f"pics/{number}.jpg", f'Line {k},\nwith "quotes" and 2.5 of {number}', "x"])
    return path


def write_shard(path: Path, num: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(num):
            image = write_image(path.parent / "tmp.jpg", number).read_bytes()
            record = {"caption": [f"First of {number}.", "Second."], "url": "u"} if number % 2 else {"url": "u"}
            files = {"jpg": image, "json": json.dumps(record).encode(), "txt": f"Text of {number}.\n".encode()}
            for suffix, content in files.items():
                member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (path.parent / "tmp.jpg").unlink()
    return path
