"""Protocols: each variant on a small tree in its exact layout; results, report and compare name the protocol."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dataloaders import iiw
from dataloaders.pairs import check_list, retrieval_set
from dataloaders.registry import benchmark
from dataloaders.share4v import read_share4v
from dataloaders.urban1k import read_urban1k
from eval_files import write_coco, write_docci, write_flickr30k, write_image
from support import LAYOUTS, evaluate
from training.eval.npz import read_features
from training.eval.retrieval import read_benchmarks
from training.flags.parser import parse_args
from training.readers.captions import normalise_caption, split_caption


def read(name, protocol, **flags):
    """Reads one benchmark as the command line does."""
    return benchmark(name).sets(SimpleNamespace(protocol=(protocol,), **flags))


def read_flickr30k(root, annotations=None):
    (found,) = benchmark("flickr30k").load(root, annotations=annotations)
    return found


def test_dci_extra_lower():
    (found,) = read("dci", "dci/extra-lower", dci_retrieval=LAYOUTS / "dci")
    base = LAYOUTS / "dci" / "densely_captioned_images"
    names = [name for split in json.loads((base / "splits.json").read_text()).values() for name in split]
    rows = [json.loads((base / "annotations" / name).read_text()) for name in names]
    assert found.captions == tuple(row["extra_caption"].lower() for row in rows)
    assert (found.key, found.protocol) == ("dci-extra-lower-retrieval", "dci/extra-lower (modified)")
    (whole,) = benchmark("dci").load(LAYOUTS / "dci")
    assert (whole.key, whole.protocol) == ("dci-retrieval", "dci/short+extra (modified)")
    assert found.image_paths == whole.image_paths and found.fingerprint() != whole.fingerprint()


def test_long_dci_takes_every_annotation_with_an_extra_caption(tmp_path):
    base = tmp_path / "densely_captioned_images"
    (base / "annotations").mkdir(parents=True)
    texts = {"2-data.json": "Two. Extra\nlines.", "10-data.json": "Ten.", "3-data.json": ""}
    for name, extra in texts.items():
        row = {"image": f"sa_{name[0]}.jpg", "short_caption": "Short.", "extra_caption": extra}
        (base / "annotations" / name).write_text(json.dumps(row))
    (base / "splits.json").write_text(json.dumps({"test": ["2-data.json"]}))
    (found,) = read("dci", "long-dci", dci_retrieval=tmp_path)
    assert found.captions == ("Ten.", "Two. Extra\nlines.")  # names are sorted as text
    assert [path.name for path in found.image_paths] == ["sa_1.jpg", "sa_2.jpg"]
    assert (found.key, found.protocol, found.num_published) == ("long-dci-retrieval", "long-dci (modified)", 7602)


def test_iiw_sentences():
    flags = {"iiw_retrieval": LAYOUTS / "iiw", "iiw_anno": LAYOUTS / "iiw_annotations"}
    (found,) = read("iiw", "iiw/sentences", **flags)
    (whole,) = read("iiw", "iiw/612", **flags)
    raw = [c for s in iiw.SUBSETS for _, c in iiw.read_iiw_subset(LAYOUTS / "iiw_annotations", s)]
    assert found.captions == tuple(sentence for text in raw for sentence in split_caption(text))
    assert found.image_paths == whole.image_paths
    assert whole.captions == tuple(map(normalise_caption, raw))


def test_share4v_first_keeps_captions_as_they_are(tmp_path):
    items = [("coco/a.jpg", "One.\nTwo 3.5 m."), ("sam/images/sa_1.jpg", "Three."), ("sam/images/sa_2.jpg", "Four\nx")]
    turns = [{"image": i, "conversations": [{"value": "?"}, {"value": text}]} for i, text in items]
    (tmp_path / "list.json").write_text(json.dumps(turns))
    flags = {"share4v_retrieval": tmp_path, "share4v_anno": tmp_path / "list.json", "share4v_val_num": (2,)}
    (found,) = read("share4v", "sv/first", **flags)
    assert found.captions == ("One. Two 3.5 m.", "Three.") and found.key == "share4v-first-retrieval-2"
    (other,) = read("share4v", "sv/sam", **flags)
    assert other.captions == ("One. Two 3. 5 m", "Three") and other.key == "share4v-retrieval-2"


def test_docci_sentences_alone(tmp_path):
    (found,) = read("docci", "docci/sentences", docci_retrieval=write_docci(tmp_path))
    assert found.protocol == "docci/sentences (modified)" and "A 3" in found.captions
    assert benchmark("docci").load(tmp_path)[0].protocol == "docci/test (modified)"


def test_flickr30k_all_and_coco_val2017(tmp_path):
    root = write_flickr30k(tmp_path / "flickr", num=5)
    (found,) = read("flickr30k", "flickr30k/all", flickr30k_retrieval=root, flickr30k_anno=None)
    assert len(found.image_paths) == 8 and found.key == "flickr30k-all-retrieval"
    assert read_flickr30k(root).protocol == "flickr30k/test (modified)"
    root = write_coco(tmp_path / "coco")
    assert benchmark("coco").load(root)[0].protocol == "coco/karpathy (modified)"
    official = {"images": [{"id": 7, "file_name": "000000000007.jpg"}]}
    official["annotations"] = [{"image_id": 7, "caption": f"c{n}"} for n in range(5)]
    (root / "annotations" / "captions_val2017.json").write_text(json.dumps(official))
    (found,) = read("coco", "coco/val2017", coco_retrieval=root, coco_anno=None)
    assert found.protocol == "coco/val2017 (modified)" and found.captions == ("c0", "c1", "c2", "c3", "c4")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--dci-retrieval", "D", "--protocol", "dci/long"], "expected one of dci/short+extra"),
        (["--dci-retrieval", "D", "--protocol", "iiw/sentences"], "no effect without --iiw-retrieval"),
    ],
)
def test_wrong_protocols_are_usage_errors(argv, said, capsys):
    with pytest.raises(SystemExit):
        parse_args(argv)
    assert said in capsys.readouterr().err


def test_results_report_and_compare_name_what_was_read(tmp_path, tiny_clip, capsys):
    from training import compare

    root = tmp_path / "Urban1k"
    for number in range(4):
        write_image(root / "image" / f"{number}.jpg", number)
        (root / "caption").mkdir(exist_ok=True)
        (root / "caption" / f"{number}.txt").write_text(f"Street {number}.\nsecond line")
    first = evaluate(tmp_path, tiny_clip, "--urban1k-retrieval", root, "--report", name="first")
    own = read_urban1k(root).fingerprint()
    assert first["urban1k-retrieval-protocol"] == "urban1k/first-line (modified)"
    assert first["urban1k-retrieval-fingerprint"] == own
    assert f"Urban1k: urban1k/first-line (modified), pairs {own}" in capsys.readouterr().out
    page = (tmp_path / "logs" / "first" / "report.html").read_text()
    assert "urban1k/first-line" in page and own in page
    (root / "caption" / "0.txt").write_text("Another street.")
    evaluate(tmp_path, tiny_clip, "--urban1k-retrieval", root, name="second")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "logs" / name) for name in ("first", "second")])
    assert (
        f"and first (urban1k/first-line (modified) {own}) ranked different pairs; not comparable"
        in capsys.readouterr().err
    )
    evaluate(tmp_path, tiny_clip, "--urban1k-retrieval", root, name="third")
    capsys.readouterr()
    written = tmp_path / "compared.json"
    assert compare.main([*(str(tmp_path / "logs" / name) for name in ("second", "third")), "--json", str(written)]) == 0
    own = read_urban1k(root).fingerprint()
    assert f"Urban1k: urban1k/first-line (modified), pairs {own}" in capsys.readouterr().out
    assert {(r["protocol"], r["fingerprint"]) for r in json.loads(written.read_text())} == {
        ("urban1k/first-line (modified)", own)
    }


def test_a_shorter_list_has_another_fingerprint():
    eight, again, twelve = (
        read_share4v(LAYOUTS / "share4v", LAYOUTS / "share4v_sam.json", [number])[0] for number in (8, 8, 12)
    )
    assert eight.fingerprint() == again.fingerprint() != twelve.fingerprint()
    assert eight.fingerprint() != eight.without_images({0: "gone"}).fingerprint()


def karpathy_file(path, num_listed, num_test, **change):
    """Writes a list in Karpathy's format; the first `num_test` images are in the test split."""
    images = [
        {
            "filename": f"{n}.jpg",
            "split": "test" if n < num_test else "train",
            "sentences": [{"raw": f"{n} {k}"} for k in range(5)],
        }
        | (change if n == 0 else {})
        for n in range(num_listed)
    ]
    path.write_text(json.dumps({"images": images}))
    return read_flickr30k(path.parent, path)


def test_a_list_has_the_name_of_a_protocol_only_if_it_is_that_list(tmp_path, caplog):
    """Any list passed as flickr30k/test, and a shortened one as sv/first."""
    file = tmp_path / "list.json"
    whole = karpathy_file(file, 31_014, 1000)
    assert whole.protocol == "flickr30k/test" and not caplog.records
    changes = [(31_014, 999, {}), (31_014, 1000, {"sentences": [{"raw": "one"}]}), (2000, 1000, {})]
    changes += [(31_014, 1000, {"filename": "1.jpg"})]
    for listed, test, change in changes:
        assert karpathy_file(file, listed, test, **change).protocol == "flickr30k/test (modified)"
    file.write_text(json.dumps([{"image": f"{n}.jpg", "caption": [f"{n} {k}" for k in range(5)]} for n in range(1000)]))
    assert read_flickr30k(tmp_path, file).protocol == "flickr30k/test (modified)"
    turns = [{"value": "?"}, {"value": "A dog."}]
    file.write_text(json.dumps([{"image": f"sa_{n}.jpg", "conversations": turns} for n in range(1001)]))
    named = {
        (protocol, size): benchmark("share4v").load(tmp_path, [protocol], annotations=file, sizes=[size])[0].protocol
        for protocol, size in (("sv/sam", 1000), ("sv/sam", 1001), ("sv/first", 1000))
    }
    assert list(named.values()) == ["sv/sam", "sv/sam (modified)", "sv/first (modified)"]
    assert "31,014" in caplog.text and "1,001 items in the list" in caplog.text


def test_a_list_with_a_known_fingerprint_must_have_it(caplog):
    rows = [(Path(f"{n}.jpg"), [f"caption {n}"]) for n in range(3)]
    plain = retrieval_set("k", "T", rows, protocol="p")
    for known, name in (
        ((), "p"),
        ((plain.fingerprint(),), "p"),
        (("0" * 16, plain.fingerprint()), "p"),
        (("0" * 16,), "p (modified)"),
    ):
        assert check_list(plain, {3: known}).protocol == name
    swapped = retrieval_set("k", "T", [rows[1], rows[0], rows[2]], protocol="p")
    assert check_list(swapped, {3: (plain.fingerprint(),)}).protocol == "p (modified)"
    assert "fingerprint" in caplog.text


def test_labels_in_files_of_features_are_checked_too(tmp_path):
    features = np.eye(4, dtype=np.float32)
    for protocol, name in (("dci/short+extra", "dci/short+extra (modified)"), ("my/set", "my/set")):
        np.savez(tmp_path / "f.npz", image_features=features, text_features=features, protocol=np.array(protocol))
        (found,) = read_features([str(tmp_path / "f.npz")])
        assert found.pairs.protocol == name


def test_protocols_of_coco_and_flickr30k_do_not_collide(tmp_path):
    write_coco(tmp_path / "coco"), write_flickr30k(tmp_path / "flickr30k")
    official = {"images": [{"id": 7, "file_name": "7.jpg"}], "annotations": [{"image_id": 7, "caption": "c"}]}
    (tmp_path / "coco" / "annotations" / "captions_val2017.json").write_text(json.dumps(official))
    for protocol, keys in (
        ("coco/val2017", ["coco-val2017-retrieval", "flickr30k-retrieval"]),
        ("coco/karpathy-val", ["coco-val-retrieval", "flickr30k-retrieval"]),
        ("flickr30k/all,coco/val2017", ["coco-val2017-retrieval", "flickr30k-all-retrieval"]),
    ):
        args = parse_args(["--data-root", str(tmp_path), "--suite", "short", "--protocol", protocol, "--model", "x"])
        assert [s.key for s in read_benchmarks(args)[0]] == keys
