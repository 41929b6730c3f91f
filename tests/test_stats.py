"""prepare stats: counts against open_clip's own tokenizer, and usage errors."""

import json

import numpy as np
import open_clip
import pytest

from dataloaders import prepare
from dataloaders.dci import read_dci
from dataloaders.prepare import caption_stats, token_counter
from eval_files import write_coco
from support import LAYOUTS
from training.readers.captions import split_caption


def test_counts_are_those_of_the_captions(scenes):
    s = read_dci(scenes / "dci")
    found = caption_stats(s, token_counter("clip"))
    ids = open_clip.get_tokenizer("ViT-B-32")(list(s.captions), context_length=1000)
    assert found.tokens.tolist() == (ids != 0).sum(1).tolist()
    assert found.sentences.tolist() == [len(split_caption(text)) for text in s.captions]
    assert found.share_over(77) == pytest.approx(np.mean([(row != 0).sum() > 77 for row in ids.numpy()]))
    assert (found.num_images, len(found.tokens)) == (25, 25)


def test_table_and_counts_of_sets_named_or_found(tmp_path, capsys):
    out = tmp_path / "counts.json"
    coco = write_coco(tmp_path / "data" / "coco")
    words = [f"dci={LAYOUTS / 'dci'}", "--data-root", str(coco.parent), "--suite", "short", "--out", str(out)]
    assert prepare.main(["stats", *words]) == 0
    said, err = capsys.readouterr()
    rows = {line.split()[0]: line.split() for line in said.splitlines() if line}
    assert rows["COCO"][1:3] == ["6", "30"] and "DCI" in rows and "--flickr30k-retrieval" in err
    # The counts contain everything that the table shows, but no caption.
    counts = {one["title"]: one for one in json.loads(out.read_text())}
    for title, one in counts.items():
        assert [f"{one['images']:,}", str(sum(one["tokens"].values()))] == rows[title][1:3]
        tokens = np.repeat([int(value) for value in one["tokens"]], list(one["tokens"].values()))
        assert rows[title][-3:] == [f"{100 * (tokens > context).mean():.1f}%" for context in (77, 128, 248)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name BENCHMARK=ROOT"),
        (["dci"], "expected BENCHMARK=ROOT"),
        (["moon=x"], "expected BENCHMARK=ROOT with one of dci"),
        (["share4v=x"], "--share4v-retrieval x: no such folder"),
        (["retrieval-csv=x"], "expected BENCHMARK=ROOT with one of dci, iiw, share4v"),
        (["dci=x", "--tokenizer", "/nowhere"], "--tokenizer /nowhere: expected clip"),
    ],
)
def test_usage_errors_exit_2(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        prepare.main(["stats", *words])
    assert stop.value.code == 2 and said in capsys.readouterr().err
