"""Evaluations from the command line, on the small reference data sets and a tiny model."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from support import layout_flags, read_results, run_ranks
from training.main import main
from training.readers.images import load_rgb


def run(argv, capsys):
    """Runs the command line in this process; returns (exit code, stdout, stderr)."""
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def common(tmp_path, model, name="run"):
    return ["--model", model, "--logs", str(tmp_path / "logs"), "--name", name, "--workers", "0", "--device", "cpu"]


def test_all_benchmarks_equal_a_plain_computation(layouts, tiny_clip, tmp_path, capsys):
    import open_clip

    code, out, _ = run(layout_flags(layouts) + common(tmp_path, tiny_clip), capsys)
    assert code == 0
    record = read_results(tmp_path / "logs", "run")
    model, _, preprocess = open_clip.create_model_and_transforms(tiny_clip, load_weights=False)
    model.load_state_dict(torch.load(tiny_clip.removeprefix("local-dir:") + "/open_clip_model.pt", weights_only=True))
    model.eval()
    tokenizer = open_clip.get_tokenizer(tiny_clip)
    expected = json.loads((layouts / "expected.json").read_text())
    keys = {"dci": "dci-retrieval", "iiw": "iiw-retrieval", "urban1k": "urban1k-retrieval"}
    keys |= {"share4v_8": "share4v-retrieval-8", "share4v_12": "share4v-retrieval-12"}
    for name, key in keys.items():
        pixels = torch.stack([preprocess(load_rgb(layouts / row["image"])) for row in expected[name]])
        with torch.no_grad():
            image = model.encode_image(pixels, normalize=True)
            text = model.encode_text(tokenizer([row["caption"] for row in expected[name]]), normalize=True)
        score = (image.double() @ text.double().T).numpy()
        for direction, matrix in (("i2t", score), ("t2i", score.T)):
            better = (matrix > np.diag(matrix)[:, None] + 1e-9).sum(1)
            equal = (abs(matrix - np.diag(matrix)[:, None]) <= 1e-9).sum(
                1
            )  # with itself, because two captions are equal
            for k in (1, 5, 10):
                hits = np.clip((k - better) / equal, 0, 1)
                assert record[f"{key}-{direction}-top{k}"] == pytest.approx(hits.mean())
            assert record[f"{key}-{direction}-mean-rank"] == pytest.approx((better + (equal + 1) / 2).mean())
        assert record[f"{key}-num-pairs"] == len(expected[name])
    assert record["dci-retrieval-pairs"] == "12 of 7,805 pairs"
    assert len(record["weights_sha256"]) == 64 and record["flags"]["workers"] == 0
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "12 of 7,805" in out


def test_a_dry_run_reads_and_checks_all_but_encodes_and_writes_nothing(layouts, tiny_clip, tmp_path, capsys):
    argv = layout_flags(layouts) + common(tmp_path, tiny_clip)
    code, out, _ = run([*argv, "--dry-run"], capsys)
    assert code == 0 and not (tmp_path / "logs").exists() and "recall" not in out
    assert "DCI: no image is missing, but only 12 of 7,805 pairs listed" in out
    assert "To encode: 48 distinct images" in out and f"results would go to {tmp_path / 'logs' / 'run'}" in out
    assert run(argv, capsys)[0] == 0
    record = read_results(tmp_path / "logs", "run")
    for key in ("dci-retrieval", "iiw-retrieval", "share4v-retrieval-8", "urban1k-retrieval"):
        described = f"{record[f'{key}-title']}: {record[f'{key}-protocol']}, pairs {record[f'{key}-fingerprint']}"
        assert described in out
    next((layouts / "urban1k" / "image").iterdir()).unlink()
    code, _, err = run([*argv, "--dry-run"], capsys)
    assert code == 2 and "1 of 12 pairs are missing" in err
    code, _, err = run([*argv, "--dry-run", "--allow-missing", "--model", "no-such-model"], capsys)
    assert code == 2 and "no-such-model" in err


def test_two_and_three_processes_equal_one(layouts, tiny_clip, tmp_path):
    records = {}
    for n in (1, 2, 3):
        argv = layout_flags(layouts) + common(tmp_path, tiny_clip, f"n{n}") + ["--batch-size", "5"]
        done = run_ranks(argv, n)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("recall in percent") == 1
        record = read_results(tmp_path / "logs", f"n{n}")
        records[n] = {k: v for k, v in record.items() if "retrieval" in k}
        assert record["world_size"] == n
    assert records[2] == records[1] and records[3] == records[1]


def test_errors_under_torchrun_stop_all_ranks_with_one_message(layouts, tiny_clip, tmp_path):
    next((layouts / "urban1k" / "image").iterdir()).unlink()
    argv = [f"--urban1k-retrieval={layouts / 'urban1k'}"] + common(tmp_path, tiny_clip)
    done = run_ranks(argv, 2)
    assert done.returncode == 2
    assert done.stderr.count("pairs are missing") == 1 and "training/evaluate.py" not in done.stderr


def test_missing_images_are_listed_before_a_model_is_built(layouts, tmp_path, capsys):
    gone = sorted((layouts / "urban1k" / "image").iterdir())
    for path in gone:
        path.unlink()
    argv = layout_flags(layouts) + common(tmp_path, "local-dir:" + str(tmp_path / "no-model"))
    code, _, err = run(argv, capsys)
    assert code == 2
    assert "12 of 12 pairs are missing" in err and ".. and 2 more" in err and "--allow-missing" in err
    assert "no-model" not in err and err.count("no such image") == 10


def test_allow_missing_says_how_many_pairs(layouts, tiny_clip, tmp_path, capsys):
    (layouts / "share4v" / "sa_000001" / "images" / "sa_2.jpg").unlink()
    argv = layout_flags(layouts, sizes="12")[3:6] + common(tmp_path, tiny_clip) + ["--allow-missing"]
    code, out, _ = run(argv, capsys)
    assert code == 0
    record = read_results(tmp_path / "logs", "run")
    assert record["share4v-retrieval-12-pairs"] == "11 of 12 pairs" and record["share4v-retrieval-12-num-missing"] == 1
    assert "11 of 12 pairs (1 missing, 0 unreadable)" in out
    code, _, err = run([*argv[:-1]], capsys)
    assert code == 2 and "sa_2.jpg" in err


def test_a_broken_image_is_named_or_counted(layouts, tiny_clip, tmp_path, capsys):
    victim = layouts / "urban1k" / "image" / "3.jpg"
    victim.write_bytes(victim.read_bytes()[:300])
    argv = [f"--urban1k-retrieval={layouts / 'urban1k'}"] + common(tmp_path, tiny_clip)
    code, _, err = run(argv, capsys)
    assert code == 1 and "3.jpg" in err and "--allow-missing" in err
    code, out, _ = run([*argv, "--allow-missing"], capsys)
    assert code == 0 and "1 unreadable" in out
    assert read_results(tmp_path / "logs", "run")["urban1k-retrieval-num-pairs"] == 11


def test_shared_images_and_captions_are_encoded_once(scenes, tiny_clip, monkeypatch, tmp_path, capsys):
    from open_clip.transformer import VisionTransformer

    from training.model.towers.encoders import TextEncoder

    counted = {"image": 0, "text": 0}
    towers = (("image", VisionTransformer, "forward_intermediates"), ("text", TextEncoder, "__call__"))
    for kind, owner, method in towers:

        def counting(self, batch, *args, _kind=kind, _original=getattr(owner, method), **kwargs):
            counted[_kind] += len(batch)
            return _original(self, batch, *args, **kwargs)

        monkeypatch.setattr(owner, method, counting)
    flags = [f"--dci-retrieval={scenes / 'dci'}", f"--iiw-retrieval={scenes / 'iiw'}"]
    flags += [f"--share4v-retrieval={scenes / 'share4v'}", f"--share4v-anno={scenes / 'share4v' / 'anno.json'}"]
    flags += ["--share4v-val-num=10,25", f"--urban1k-retrieval={scenes / 'urban1k'}"]
    code, _, _ = run(flags + common(tmp_path, tiny_clip), capsys)
    assert code == 0
    assert counted == {"image": 25, "text": 100}  # 110 pairs: the same 25 images, and 10 captions twice


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda root: (root / "urban1k").rename(root / "moved"), "no such folder"),
        (lambda root: [p.unlink() for p in (root / "urban1k" / "caption").iterdir()], "Urban1k is empty"),
        (lambda root: (root / "share4v_sam.json").write_text("[{"), "broken JSON"),
        (lambda root: (root / "share4v_sam.json").write_text('{"a": 1}'), "expected a JSON list"),
        (lambda root: (root / "share4v_sam.json").write_text('[{"image": "x"}]'), "conversations"),
        (lambda root: (root / "share4v_sam.json").unlink(), "--share4v-anno"),
        (lambda root: (root / "dci/densely_captioned_images/splits.json").write_text("[]"), "splits.json"),
        (lambda root: (root / "dci/densely_captioned_images/splits.json").unlink(), "splits.json"),
        (lambda root: (root / "iiw_annotations/IIW-400/data.jsonl").write_text("{}\n"), "line 1"),
        (lambda root: (root / "iiw_annotations/IIW-400/data.jsonl").write_text('{"a": 1}\n{'), "line 1"),
        (lambda root: (root / "iiw_annotations/DCI_Test/data.jsonl").unlink(), "see IIW in EVAL_DATASETS.md"),
        (lambda root: (root / "urban1k/caption/1.txt").write_bytes(b"\xff\xfe\xfa"), "1.txt"),
    ],
)
def test_bad_data_exits_2_with_one_message(damage, said, layouts, tmp_path, capsys):
    damage(layouts)
    code, out, err = run(layout_flags(layouts) + common(tmp_path, "ViT-B-16"), capsys)
    assert code == 2 and said in err
    assert err.count("error:") == 1 and "Traceback" not in err and out == ""


def test_val_num_beyond_the_list_exits_2(layouts, tmp_path, capsys):
    code, _, err = run(layout_flags(layouts, sizes="8,20") + common(tmp_path, "ViT-B-16"), capsys)
    assert code == 2 and "--share4v-val-num 20: only 12 annotations" in err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "ViT-B-61"], "ViT-B-16"),
        (["--model", "ViT-B-16", "--pretrained", "opnai"], "openai"),
        (["--model", "local-dir:/nowhere"], "no open_clip_config.json"),
        (["--device", "cuda:77"], "--device cuda:77"),
        (["--device", "toaster"], "--device toaster"),
        (["--precision", "fp16"], "needs a GPU"),
    ],
)
def test_bad_model_or_machine_exits_2(flags, said, layouts, tmp_path, capsys):
    argv = [f"--urban1k-retrieval={layouts / 'urban1k'}", *common(tmp_path, "ViT-B-32"), *flags]
    code, _, err = run(argv, capsys)
    assert code == 2 and said in err and err.count("error:") == 1


def test_weights_from_files(layouts, tmp_path, capsys):
    import open_clip

    model = open_clip.create_model("ViT-S-32-alt").half()
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"state_dict": {k: v for k, v in state.items() if "visual" not in k}}, tmp_path / "half.pt")
    torch.save({"model": model}, tmp_path / "pickle.pt")
    argv = [f"--urban1k-retrieval={layouts / 'urban1k'}", *common(tmp_path, "ViT-S-32-alt")]
    records = []
    for name in ("w.pt", "w.safetensors"):
        code, _, err = run([*argv, "--pretrained", str(tmp_path / name)], capsys)
        assert code == 0 and "UNTRAINED" not in err
        records.append({k: v for k, v in read_results(tmp_path / "logs", "run").items() if "retrieval-" in k})
    assert records[0] == records[1]
    for name, said in (("half.pt", "does not fit"), ("pickle.pt", "not a file of plain tensors")):
        code, _, err = run([*argv, "--pretrained", str(tmp_path / name)], capsys)
        assert code == 2 and said in err


def test_an_untrained_model_is_reported(layouts, tmp_path, capsys, caplog):
    argv = [f"--urban1k-retrieval={layouts / 'urban1k'}", *common(tmp_path, "ViT-S-32-alt")]
    code, _, _ = run(argv, capsys)
    assert code == 0 and "UNTRAINED" in caplog.text
    assert read_results(tmp_path / "logs", "run")["weights_sha256"] is None


def test_mean_ranks_in_bf16_are_within_two_percent_of_those_in_fp32(scenes, tiny_clip, tmp_path, capsys):
    mean_ranks = {}
    for precision in ("fp32", "bf16", "amp_bf16"):
        argv = [f"--urban1k-retrieval={scenes / 'urban1k'}", *common(tmp_path, tiny_clip, precision)]
        assert run([*argv, "--precision", precision], capsys)[0] == 0
        record = read_results(tmp_path / "logs", precision)
        mean_ranks[precision] = [record[f"urban1k-retrieval-{d}-mean-rank"] for d in ("i2t", "t2i")]
    for precision in ("bf16", "amp_bf16"):
        assert mean_ranks[precision] == pytest.approx(mean_ranks["fp32"], rel=0.02)


def test_truncation_is_reported(tmp_path, tiny_clip, capsys):
    (tmp_path / "data" / "caption").mkdir(parents=True)
    (tmp_path / "data" / "image").mkdir()
    for i, words in enumerate((10, 75, 76, 175)):  # 77 tokens hold 75 words, a start and an end token
        (tmp_path / "data" / "caption" / f"{i}.txt").write_text(" ".join(["dog"] * words))
        Image.new("RGB", (40, 40), (i * 60, 0, 0)).save(tmp_path / "data" / "image" / f"{i}.jpg")
    code, _, _ = run([f"--urban1k-retrieval={tmp_path / 'data'}", *common(tmp_path, tiny_clip)], capsys)
    record = read_results(tmp_path / "logs", "run")
    assert code == 0 and record["urban1k-retrieval-truncated-share"] == 0.5
    assert record["urban1k-retrieval-truncated-mean-tokens-lost"] == (1 + 100) / 2
