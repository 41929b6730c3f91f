"""Trains on real images without a hub: Debian's Open Clip Art library, with titles and keywords as captions.

    python scripts/openclipart.py OUT [flags of training.main]

Needs Debian or Ubuntu (apt-get, dpkg-deb). Downloads 160 MB, writes OUT/train.csv and 500 held-out images in
Urban1k's layout to OUT/test, and trains lotlip_tiny for a few hundred steps; R@1 at chance is 0.2%.
"""

import csv
import gzip
import html
import random
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from training.main import main as train

PACKAGES = ("openclipart-png", "openclipart-svg")
IMAGE_SIZE = 128
NUM_TEST = 500
# 12 epochs of 59 steps: about 10 minutes on 2 cores.
FLAGS = "--batch-size 128 --epochs 12 --lr 1e-3 --warmup 50 --num-long-captions 1 --log-every-n-steps 15 --workers 1"


def main() -> int:
    """Downloads and writes the data set unless it exists, and trains; returns the exit code of training."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    out = Path(sys.argv[1])
    if not (out / "train.csv").is_file():
        write_set(out, fetch(out / "packages"))
    places = ["--train-data", str(out / "train.csv"), "--urban1k-retrieval", str(out / "test")]
    run = ["--model", "lotlip_tiny", "--logs", str(out / "logs"), "--save-frequency", "0", *FLAGS.split()]
    return train([*places, *run, *sys.argv[2:]])


def fetch(folder: Path) -> Path:
    """Downloads and unpacks the packages; returns the folder that holds png/ and svg/."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True)
    return folder / "usr/share/openclipart"


def write_set(out: Path, clipart: Path) -> None:
    """Writes images on a white background and their captions; only images with a unique caption are held out."""
    samples = [s for path in sorted((clipart / "svg").rglob("*.svg")) if (s := describe(path, clipart))]
    by_caption: dict[str, list] = {}
    for sample in samples:
        by_caption.setdefault(sample[2], []).append(sample)
    unique = [group[0] for group in by_caption.values() if len(group) == 1]
    held_out = set(random.Random(0).sample(range(len(unique)), NUM_TEST))
    test = {unique[i][0] for i in held_out}
    for folder in ("images", "test/image", "test/caption"):
        shutil.rmtree(out / folder, ignore_errors=True)
        (out / folder).mkdir(parents=True)
    rows, num_broken = [], 0
    for number, (path, short, long) in enumerate(tqdm(samples, desc="images", unit="image")):
        small = on_white(path)
        if small is None:
            num_broken += 1
        elif path in test:
            small.save(out / "test" / "image" / f"{number}.jpg", quality=92)
            (out / "test" / "caption" / f"{number}.txt").write_text(long + "\n", encoding="utf-8")
        else:
            small.save(out / "images" / f"{number}.jpg", quality=92)
            rows.append([f"images/{number}.jpg", short, long])
    with open(out / "train.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["filepath", "raw_caption", "long_caption"], *rows])
    print(f"{out}: {len(rows):,} images for training, {len(test):,} held out, {num_broken:,} unreadable")


def describe(svg: Path, clipart: Path) -> tuple[Path, str, str] | None:
    """Returns (path of the PNG, short caption, long caption) from an SVG's metadata and path; None without a PNG."""
    place = svg.relative_to(clipart / "svg")
    path = clipart / "png" / place.with_suffix(".png")
    content = svg.read_bytes()
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    work = re.search(rb"<(?:\w+:)?Work\b.*?</(?:\w+:)?Work>", content, re.DOTALL)
    if not work or not path.is_file():
        return None
    text = work[0].decode("utf-8", "replace")
    title, description = (clean(re.search(rf"<dc:{n}[^>]*>([^<]*)</dc:{n}>", text)) for n in ("title", "description"))
    keywords = [k for match in re.finditer(r"<rdf:li[^>]*>([^<]*)</rdf:li>", text) if (k := clean(match))]
    named = " ".join(re.findall(r"[a-z0-9]+", place.stem.lower()))
    sentences = [
        f"{title or named}.",
        f"{description}." if description else "",
        f"A drawing of {named}.",
        f"It is about {', '.join(dict.fromkeys(keywords))}." if keywords else "",
        f"It belongs to {', '.join(part.replace('_', ' ') for part in place.parts[:-1])}." if place.parts[:-1] else "",
    ]
    return path, title or named, " ".join(s for s in sentences if s)


def clean(match: re.Match | None) -> str:
    """Returns the text of an XML element on one line; empty for placeholders that a converter left there."""
    text = " ".join(html.unescape(match[1]).split()) if match else ""
    return "" if text.lower().startswith("hash") else text.rstrip(".")


def on_white(path: Path) -> Image.Image | None:
    """Puts an image on a white square of 128 pixels, because most are transparent; None if it is unreadable."""
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # some have 168 megapixels, mostly white
    try:
        with Image.open(path) as opened:
            drawing = opened.convert("RGBA")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    drawing.thumbnail((IMAGE_SIZE, IMAGE_SIZE))
    square = Image.new("RGBA", (IMAGE_SIZE, IMAGE_SIZE), "white")
    corner = (IMAGE_SIZE - drawing.width) // 2, (IMAGE_SIZE - drawing.height) // 2
    square.alpha_composite(drawing, corner)
    return square.convert("RGB")


if __name__ == "__main__":
    sys.exit(main())
