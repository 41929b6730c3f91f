"""A benchmark is one file in dataloaders/: dropped in, the help, the check, an evaluation and its report know it."""

import subprocess
import sys

from dataloaders.registry import benchmarks
from eval_files import write_image
from support import read_results

PLUGIN = """
from pathlib import Path

from dataloaders.pairs import one_caption_per_image
from dataloaders.registry import Benchmark, Option


def _read(args):
    root, number = Path(args.moon_retrieval), int(args.moon_number)
    pairs = [(root / f"{n}.jpg", f"Crater {n} of the moon") for n in range(number)]
    return [one_caption_per_image("moon-retrieval", "Moon", pairs, num_published=number, source="look up")]


BENCHMARKS = (
    Benchmark(
        "moon",
        "--moon-retrieval",
        "folder of craters",
        _read,
        options=(Option("--moon-number", "craters to read", metavar="N", default=3),),
    ),
)
"""
RUN = """
import sys
import dataloaders
dataloaders.__path__.append(sys.argv[1])
from dataloaders import prepare
from training.flags.parser import build_parser
from training.main import main
root, logs, model = sys.argv[2:]
assert "--moon-retrieval DIR" in build_parser().format_help()
assert prepare.main(["check", "moon", root]) == 0
assert prepare.main(["check", "moon", root, "--moon-number", "5"]) == 1
common = ["--model", model, "--logs", logs, "--name", "run", "--workers", "0", "--device", "cpu"]
sys.exit(main(["--moon-retrieval", root, *common, "--report"]))
"""


def test_a_benchmark_in_a_file_of_its_own(tmp_path, tiny_clip):
    folder, root = tmp_path / "plugin", tmp_path / "moon"
    folder.mkdir()
    (folder / "moon.py").write_text(PLUGIN)
    for number in range(3):
        write_image(root / f"{number}.jpg", number)
    argv = [sys.executable, "-c", RUN, str(folder), str(root), str(tmp_path / "logs"), tiny_clip]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Moon: complete, 3 pairs" in done.stdout and "2 of 5 pairs are missing" in done.stdout
    result = read_results(tmp_path / "logs", "run")
    assert result["moon-retrieval-num-pairs"] == 3 and result["flags"]["moon_number"] == 3
    assert "Moon" in (tmp_path / "logs" / "run" / "report.html").read_text()


def test_shipped_benchmarks_keep_their_flags_and_order():
    published = "dci iiw share4v urban1k docci coco flickr30k imagenet-val imagenet-v2 retrieval-csv retrieval-wds"
    assert [b.name for b in benchmarks()] == published.split()
