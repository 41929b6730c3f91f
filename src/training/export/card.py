"""Writes the model card of an exported model from the flags and results of its run."""

from pathlib import Path

import yaml

from training.export.source import Source

_RECIPE = (
    ("model", "architecture"),
    ("pretrained", "started from"),
    ("pretrained_image", "image tower started from its pretrained weights"),
    ("pretrained_text", "text tower started from its pretrained weights"),
    ("train_data", "training data"),
    ("text_views", "texts per sample"),
    ("captions", "captions"),
    ("num_long_captions", "long captions per image"),
    ("epochs", "epochs"),
    ("batch_size", "batch size per process"),
    ("accum_freq", "batches per step"),
    ("lr", "learning rate"),
    ("wd", "weight decay"),
    ("warmup", "warm-up steps"),
    ("lock_image", "image tower locked"),
    ("siglip", "pairwise sigmoid loss"),
    ("precision", "precision"),
    ("seed", "seed"),
)
_USE = {
    "open_clip": """import training  # for models without corner tokens, open_clip itself can be used
model, _, preprocess = training.create_model_and_transforms("local-dir:FOLDER")
tokenizer = training.get_tokenizer("local-dir:FOLDER")
""",
    "transformers": """from transformers import AutoModel, AutoTokenizer, CLIPImageProcessor
model = AutoModel.from_pretrained("FOLDER"{code}).eval()
tokenizer = AutoTokenizer.from_pretrained("FOLDER"{code})
processor = CLIPImageProcessor.from_pretrained("FOLDER")
text = model.get_text_features(**tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt"))
image = model.get_image_features(**processor(images, return_tensors="pt"))
""",
    "onnx": """import onnxruntime, tokenizers
tokenizer = tokenizers.Tokenizer.from_file("FOLDER/tokenizer.json")
tokenizer.enable_truncation({length})
text = onnxruntime.InferenceSession("FOLDER/text.onnx").run(None, {{"input_ids": [tokenizer.encode(caption).ids]}})
image = onnxruntime.InferenceSession("FOLDER/image.onnx").run(None, {{"pixel_values": pixels}})
# pixels: [n, 3, {size}, {size}], RGB in 0..1, minus {mean}, divided by {std}
""",
}


def write_card(source: Source, folder: Path, to: str, licence: str, largest: dict[str, float]) -> None:
    """Writes ``README.md``: architecture, training, results and usage; states what is unknown.

    Args:
        source: the exported model.
        folder: folder of the export.
        to: format of the export, one of open_clip, transformers and onnx.
        licence: license of the weights.
        largest: largest difference of the features for ``image`` and ``text``.
    """
    model_cfg, preprocess = source.config["model_cfg"], source.config["preprocess_cfg"]
    head = {"license": licence, "library_name": to, "pipeline_tag": "zero-shot-image-classification"}
    text = model_cfg["text_cfg"]
    facts = {
        "length": source.tokenizer.context_length,
        "size": source.model.visual.image_size[0],
        "mean": tuple(round(value, 4) for value in preprocess["mean"]),
        "std": tuple(round(value, 4) for value in preprocess["std"]),
        "code": ", trust_remote_code=True" if (folder / "modeling_lotlip.py").is_file() else "",
    }
    lines = ["---", yaml.safe_dump(head, sort_keys=False).strip(), "---", f"# {source.name}", ""]
    lines += [
        f"A dual encoder for images of {facts['size']} pixels and captions of up to {facts['length']} tokens, with "
        f"features of {model_cfg['embed_dim']} numbers, {text.get('num_corner_token') or 0} corner tokens.",
        "",
        "## Training",
        "",
    ]
    known = [(title, source.flags.get(key)) for key, title in _RECIPE]
    rows = [(title, value) for title, value in known if value not in (None, [], "") and value is not False]
    lines += _table(("setting", "value"), rows) if rows else ["Unknown: the model was not exported from a run."]
    lines += ["", "## Results", ""]
    lines += _results(source.results) or ["Not evaluated."]
    lines += ["", "## Use", "", "```python", _USE[to].format(**facts).strip(), "```", ""]
    worst = ", ".join(f"{kind} {value:.1e}" for kind, value in largest.items())
    lines += [f"Largest difference between normalised features and the original's, over 32 samples: {worst}.", ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _results(results: dict) -> list[str]:
    """Formats a line of results.jsonl as a table of R@1 in percent with 95% intervals; empty without retrieval."""
    rows = []
    for key in (name.removesuffix("-i2t-top1") for name in results if name.endswith("-i2t-top1")):
        row = [key, results.get(f"{key}-protocol") or "own pairs", results.get(f"{key}-pairs", "unknown")]
        for direction in ("i2t", "t2i"):
            low, high = (100 * bound for bound in results[f"{key}-{direction}-top1-ci95"])
            row.append(f"{100 * results[f'{key}-{direction}-top1']:.2f} ({low:.1f} to {high:.1f})")
        rows.append(tuple(row))
    return _table(("benchmark", "protocol", "evaluated", "I2T R@1 (95%)", "T2I R@1 (95%)"), rows) if rows else []


def _table(head: tuple[str, ...], rows: list[tuple]) -> list[str]:
    table = [head, ("---",) * len(head), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in table]
