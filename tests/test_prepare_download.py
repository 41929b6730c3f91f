"""From a table of URLs to a trained model: images from a local server, some of which can't be fetched."""

import csv
import io
import json
import os
import random
import resource
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_train_data import jpeg, write_shard

from support import run_command
from training.prepare.__main__ import main
from training.prepare.download import failure_kind
from training.readers.samples import read_samples

# img2dataset needs another version of webdataset, so it may be installed in another environment: name it there.
HERE = Path(sys.prefix)
ENGINE = os.environ.get("IMG2DATASET") or shutil.which(
    "img2dataset", path=f"{HERE / 'img2dataset' / 'bin'}:{HERE / 'bin'}:{os.environ['PATH']}"
)
needs_engine = pytest.mark.skipif(not ENGINE, reason="no img2dataset here; make test installs it")
NUM_GOOD = 24
LONG = ("longIB_captions", "longSV_captions", "longLLA_captions")
SHORT = ("shortIB_captions", "shortSV_captions", "shortLLA_captions")


def image_bytes(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (90 + number, 70), (9 * number, 255 - 9 * number, 40)).save(buffer, "PNG")
    return buffer.getvalue()


class ImageHandler(BaseHTTPRequestHandler):
    """``/N.png`` is an image, ``/missing`` doesn't exist, ``/slow`` is late, ``/broken`` and ``/cut`` are damaged."""

    stopping = threading.Event()

    def do_GET(self):
        name = self.path.rsplit("/", 1)[-1].split(".")[0]
        if name.startswith("missing"):
            return self.send_error(404)
        if name.startswith("slow"):
            self.stopping.wait(20)
            return None
        content = (
            b"<html>no image</html>" if name.startswith("broken") else image_bytes(3 if name == "cut" else int(name))
        )
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:-20] if name == "cut" else content)
        return None

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    """Starts a server that answers as a proxy, because tables refuses URLs of private addresses."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), ImageHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
        yield "http://images.example.org"
    ImageHandler.stopping.set()
    server.shutdown()
    server.server_close()
    thread.join()


def write_tables(folder: Path, server: str) -> list[Path]:
    """Writes two tables in the published format, with rows of every kind; the second repeats rows of the first."""
    names = [str(n) for n in range(NUM_GOOD)] + ["missing1", "missing2", "slow", "broken", "cut"]
    header = ["Image Path", "raw_caption", *(name for pair in zip(SHORT, LONG) for name in pair)]
    rows = []
    for name in names:
        longs = [f"A picture called {name}, by {key}.\nIt has one colour. It is wide and" for key in LONG]
        shorts = [f"{key} of {name}." for key in SHORT]
        rows.append([f"{server}/{name}.png", f"raw {name}", *(text for pair in zip(shorts, longs) for text in pair)])
    random.Random(1).shuffle(rows)
    refused = [f"{server}/none.png", "raw", *["I'm sorry, I can't see it."] * 6]
    paths = []
    for number, part in enumerate((rows, [*rows[:5], refused])):
        paths.append(folder / f"cc{number}m_3long_3short_1raw_captions_url.csv")
        with open(paths[-1], "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *part])
    return paths


@pytest.fixture(scope="module")
def downloaded(server, tmp_path_factory) -> tuple[Path, dict]:
    """Makes a folder with tables/ and shards/ by the commands that a user runs; also returns download's summary."""
    if not ENGINE:
        pytest.skip("no img2dataset here")
    base = tmp_path_factory.mktemp("chain")
    words = ["tables", *map(str, write_tables(base, server)), "--out", str(base / "tables"), "--rows-per-part", "10"]
    done = run_command("training.prepare", [*words, "--workers", "2"])
    assert done.returncode == 0 and f"{NUM_GOOD + 5} of {NUM_GOOD + 11} rows kept" in done.stdout, done.stderr
    words = download_words(base) + ["--summary", str(base / "s.json")]
    done = run_command("training.prepare", words)
    assert done.returncode == 0, done.stdout + done.stderr
    return base, json.loads((base / "s.json").read_text())


def download_words(base: Path) -> list[str]:
    sizes = ["--image-size", "48", "--samples-per-shard", "8", "--timeout", "2", "--retries", "0"]
    places = ["download", str(base / "tables"), "--out", str(base / "shards"), "--img2dataset", ENGINE]
    return [*places, *sizes, "--processes", "1", "--threads", "8"]


@needs_engine
def test_every_row_is_an_image_or_a_counted_failure(downloaded):
    base, report = downloaded
    assert (report["rows"], report["images"], report["failed"]) == (NUM_GOOD + 5, NUM_GOOD, 5)
    assert report["failures"] == {
        "HTTP Error 404: Not Found": 2,
        "timed out": 1,
        "Image decoding error": 1,
        "IncompleteRead": 1,
    }
    sizes = json.loads((base / "shards" / "sizes.json").read_text())
    assert report["shards"] == len(sizes) == 6 and sum(sizes.values()) == NUM_GOOD
    seen = {}
    for name, size in sizes.items():
        samples = list(read_samples(str(base / "shards" / name)))
        assert len(samples) == size
        seen |= {json.loads(s.files["json"])["url"].split("/")[-1]: s for s in samples}
    assert sorted(seen) == sorted(f"{n}.png" for n in range(NUM_GOOD))
    for name, sample in seen.items():
        number, record = int(name.split(".")[0]), json.loads(sample.files["json"])
        assert record["caption"] == sample.files["txt"].decode() == f"raw {number}"
        for key in LONG:  # after cleaning, the line break is kept and the incomplete sentence removed
            assert record[key] == f"A picture called {number}, by {key}.\nIt has one colour."
        image = Image.open(io.BytesIO(sample.files["jpg"]))
        assert min(image.size) == 48
        assert max(abs(a - b) for a, b in zip(image.getpixel((9, 9)), (9 * number, 255 - 9 * number, 40))) < 12


@needs_engine
def test_continuing_after_a_stop_fetches_missing_images(downloaded, tmp_path, capfd):
    base = tmp_path
    shutil.copytree(downloaded[0] / "tables", base / "tables")
    shutil.copytree(downloaded[0] / "shards", base / "shards")
    for name in ("00002.tar", "00002_stats.json"):
        (base / "shards" / name).unlink()
    whole = (base / "shards" / "00003.tar").read_bytes()
    (base / "shards" / "00003.tar").write_bytes(whole[:1500])
    assert main([*download_words(base), "--check-only"]) == 1
    out = capfd.readouterr().out
    assert "missing shards: 1 (00002)" in out and "bad shard:" in out and "00003.tar: truncated" in out
    for name in ("00003.tar", "00003_stats.json"):
        (base / "shards" / name).unlink()
    assert main(download_words(base)) == 0
    sizes = [json.loads((b / "shards" / "sizes.json").read_text()) for b in (base, downloaded[0])]
    assert sizes[0] == sizes[1]
    with pytest.raises(SystemExit):
        main([*download_words(base), "--samples-per-shard", "9"])
    assert "with other flags" in capfd.readouterr().err


@needs_engine
def test_the_same_images_give_the_same_shards_byte_for_byte(downloaded, tmp_path):
    shutil.copytree(downloaded[0] / "tables", tmp_path / "tables")
    assert main(download_words(tmp_path)) == 0
    for shard in sorted((tmp_path / "shards").glob("*.tar")):
        assert shard.read_bytes() == (downloaded[0] / "shards" / shard.name).read_bytes()
        keys = [sample.key for sample in read_samples(str(shard))]
        assert keys == sorted(keys)


@needs_engine
def test_shards_can_be_inspected_joined_and_trained_on(downloaded, tmp_path):
    base, _ = downloaded
    shards = str(base / "shards")
    words = ["inspect", shards, "--out", str(tmp_path / "report"), "--model", "lotlip_tiny", "--workers", "1"]
    assert main(words) == 0
    report = json.loads((tmp_path / "report" / "inspect.json").read_text())
    assert (
        report["usable"] == report["with_long_caption"] == report["captions"]["longSV_captions"]["samples"] == NUM_GOOD
    )

    # The same images without captions, and the captions from the tables.
    (tmp_path / "bare").mkdir()
    for path in sorted((base / "shards").glob("*.tar")):
        samples = {}
        for sample in read_samples(str(path)):
            url = json.loads(sample.files["json"])["url"]
            samples[sample.key] = {"jpg": sample.files["jpg"], "json": json.dumps({"url": url}).encode()}
        write_shard(tmp_path / "bare" / path.name, samples)
    words = ["join", str(base / "tables"), "--shards", str(tmp_path / "bare"), "--out", str(tmp_path / "joined")]
    done = run_command("training.prepare", [*words, "--workers", "2"])
    assert done.returncode == 0 and f"{NUM_GOOD} samples by url: {NUM_GOOD} matched" in done.stdout, done.stderr

    from training.main import main as train

    for name, folder in (("downloaded", shards), ("joined", str(tmp_path / "joined"))):
        flags = ["--model", "lotlip_tiny", "--train-data", folder, "--batch-size", "12", "--epochs", "1"]
        flags += ["--workers", "0", "--warmup", "1", "--log-every-n-steps", "1", "--logs", str(tmp_path / "logs")]
        assert train([*flags, "--name", name]) == 0
        metrics = (tmp_path / "logs" / name / "metrics.jsonl").read_text().splitlines()
        steps = [line for line in map(json.loads, metrics) if "train/loss" in line]
        assert len(steps) == 2 and all(line["train/skipped"] == 0 for line in steps)
        assert all(line["train/long_caption_loss"] > 0 for line in steps)


def test_a_set_in_img2datasets_format_is_checked_without_img2dataset(tmp_path, capsys):
    rows = {"url": [f"http://a/{n}" for n in range(6)], "key": list("abcdef"), "raw_caption": list("ghijkl")}
    (tmp_path / "t").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "t" / "part.parquet")
    (tmp_path / "out").mkdir()
    write_shard(tmp_path / "out" / "00000.tar", {"0": {"jpg": jpeg(0), "txt": b""}, "2": {"jpg": jpeg(2), "txt": b""}})
    stats = {"count": 4, "successes": 2, "failed_to_download": 2, "failed_to_resize": 0}
    stats["status_dict"] = {"success": 2, "HTTP Error 403: Forbidden": 1, "[Errno -2] Name or service not known": 1}
    (tmp_path / "out" / "00000_stats.json").write_text(json.dumps(stats))
    words = ["download", str(tmp_path / "t"), "--out", str(tmp_path / "out"), "--samples-per-shard", "4"]
    assert main([*words, "--check-only"]) == 1
    out = capsys.readouterr().out
    assert "2 images of 6 rows in 2 shards" in out and "missing shards: 1 (00001)" in out
    assert "1 HTTP Error 403: Forbidden" in out and "1 Name or service not known" in out
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == {"00000.tar": 2}
    assert main([*words, "--print-command"]) == 0
    line = capsys.readouterr().out
    assert f"--url_list={tmp_path / 't'} " in line and "--caption_col=raw_caption" in line
    with pytest.raises(SystemExit) as stop:
        main([*words, "--img2dataset", "no-such-command"])
    assert stop.value.code == 2 and "pip install img2dataset" in capsys.readouterr().err


def test_there_may_be_more_tables_than_a_process_may_open(tmp_path, capsys):
    rows = pa.table({"url": ["http://a/0"], "key": ["0"], "raw_caption": ["a"]})
    (tmp_path / "t").mkdir()
    for number in range(100):
        pq.write_table(rows, tmp_path / "t" / f"part-{number:03d}.parquet")
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 40, before[1]))
    try:
        assert main(["download", str(tmp_path / "t"), "--out", str(tmp_path / "out"), "--print-command"]) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert f"--url_list={tmp_path / 't'} " in capsys.readouterr().out


def test_spark_workers_get_the_engines_own_python(tmp_path, capfd):
    """Otherwise Spark uses the first python3 on PATH, which may not have img2dataset."""
    tables, home = write_tables(tmp_path, "http://images.example"), tmp_path / "home"
    assert main(["tables", *map(str, tables), "--out", str(tmp_path / "tables")]) == 0
    home.mkdir()
    (home / "python").touch()
    command = home / "img2dataset"
    command.write_text("#!/bin/sh\necho workers run $PYSPARK_PYTHON\nexit 3\n")
    command.chmod(0o755)
    words = ["download", str(tmp_path / "tables"), "--out", str(tmp_path / "shards"), "--distributor", "pyspark"]
    assert main([*words, "--img2dataset", str(command)]) == 1
    assert f"workers run {home / 'python'}" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("HTTP Error 404: Not Found", "HTTP Error 404: Not Found"),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", "Temporary failure in name resolution"),
        ("The read operation timed out", "The read operation timed out"),
        ("<urlopen error [Errno 111] Connection refused>", "Connection refused"),
        ("Image decoding error", "Image decoding error"),
        ("IncompleteRead(20 bytes read, 30 more expected)", "IncompleteRead"),
    ],
)
def test_failures_have_few_kinds(message, kind):
    assert failure_kind(message) == kind
