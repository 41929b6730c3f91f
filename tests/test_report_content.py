"""What a report holds: best candidates, chosen queries, thumbnails, and a limited number of bytes."""

import base64
import gzip
import json
import re

import numpy as np
import torch
from PIL import Image

from training.eval.metrics import top_matches
from training.eval.report import page as page_module
from training.eval.report.page import choose_queries, make_thumbnails
from training.main import main


def test_failures_are_chosen_first_and_the_rest_is_spread():
    ranks = torch.ones(1000)
    ranks[::10] = 3.5
    chosen, note = choose_queries(ranks, 400)
    assert len(chosen) == 400 and set(range(0, 1000, 10)) <= set(chosen.tolist())
    others = [n for n in chosen.tolist() if n % 10]
    assert max(np.diff(others)) <= 5 and "100 of 100 whose first answer is wrong, and 300 of the 900 others" in note
    chosen, note = choose_queries(ranks, 50)  # more failures than places
    assert chosen.tolist() == list(range(0, 1000, 20)) and "50 of 100 whose" in note and "0 of the 900 others" in note
    assert choose_queries(ranks, 1000)[1] == "" and len(choose_queries(ranks, 1000)[0]) == 1000


def test_a_page_with_too_much_text_shows_fewer_queries(tmp_path, monkeypatch):
    """Captions without repetition hardly compress. The limit is lowered here from 16 MB, so that the test is fast."""
    monkeypatch.setattr(page_module, "MAX_CONTENT_BYTES", 300_000)
    rng = np.random.default_rng(0)
    captions = [rng.bytes(2500).hex() for _ in range(400)]
    rows = rng.normal(size=(400, 8)).astype(np.float32)
    np.savez(tmp_path / "long.npz", image_features=rows, text_features=rows, captions=captions)
    argv = ["--features", str(tmp_path / "long.npz"), "--report", "--logs", str(tmp_path), "--name", "r"]
    assert main([*argv, "--device", "cpu"]) == 0
    page = (tmp_path / "r" / "report.html").read_text()
    content = json.loads(gzip.decompress(base64.b64decode(re.search(r'id="content".*?>(.*?)<', page)[1])))
    queries = content["sets"][0]["t2i"]["query"]
    assert (
        len(page) < 600_000
        and 0 < len(queries) < 100
        and f"shows {len(queries)} of 400 queries" in content["sets"][0]["t2i"]["note"]
    )


def test_top_matches_by_brute_force():
    rng = torch.Generator().manual_seed(0)
    queries, candidates = (torch.nn.functional.normalize(torch.randn(n, 5, generator=rng), dim=1) for n in (23, 31))
    top, score = top_matches(queries, candidates, 4, tile=(7, 5))
    expected = (queries.double() @ candidates.double().T).numpy()
    assert np.array_equal(top.numpy(), np.argsort(-expected, axis=1)[:, :4])
    assert np.allclose(score.numpy(), -np.sort(-expected, axis=1)[:, :4])
    assert top_matches(queries, candidates[:2], 4)[0].shape == (23, 2)


def test_thumbnails_keep_the_budget_and_survive_broken_files(tmp_path):
    paths = [tmp_path / f"{n}.png" for n in range(20)]
    for n, path in enumerate(paths):
        Image.effect_noise((300, 200), 80 + n).convert("RGB").save(path)
    paths[4].write_bytes(b"no image")
    large, small = make_thumbnails(paths, 10**6), make_thumbnails(paths, 12_000)
    assert large[4] == small[4] == b"" and sum(map(len, small)) <= 12_000 < sum(map(len, large)) <= 10**6
    assert json.dumps([len(p) for p in make_thumbnails(paths, 12_000)]) == json.dumps([len(p) for p in small])
