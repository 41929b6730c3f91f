"""Writes the model card of an exported model from the flags and results of its run."""

from pathlib import Path
from typing import Any

import yaml

from training.export.source import Source
from training.runtime.messages import render_page


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
    card = render_page(
        Path(__file__).parent / "card.md.j2",
        head=yaml.safe_dump(head, sort_keys=False).strip(),
        name=source.name,
        to=to,
        size=source.image_size,
        length=source.tokenizer.context_length,
        dim=model_cfg["embed_dim"],
        corners=model_cfg["text_cfg"].get("num_corner_token") or 0,
        mean=tuple(round(value, 4) for value in preprocess["mean"]),
        std=tuple(round(value, 4) for value in preprocess["std"]),
        code=", trust_remote_code=True" if (folder / "modeling_lotlip.py").is_file() else "",
        flags={key: value for key, value in source.flags.items() if value is not False and value not in (None, [], "")},
        benchmarks=_benchmarks(source.results),
        worst=", ".join(f"{kind} {value:.1e}" for kind, value in largest.items()),
    )
    (folder / "README.md").write_text(f"{card}\n", encoding="utf-8")


def _benchmarks(results: dict[str, Any]) -> list[list[str]]:
    """Returns R@1 in percent with 95% intervals, a row for each retrieval benchmark of a line of results.jsonl."""
    rows = []
    for key in (name.removesuffix("-i2t-top1") for name in results if name.endswith("-i2t-top1")):
        row = [key, results.get(f"{key}-protocol") or "own pairs", results.get(f"{key}-pairs", "unknown")]
        for direction in ("i2t", "t2i"):
            low, high = (100 * bound for bound in results[f"{key}-{direction}-top1-ci95"])
            row.append(f"{100 * results[f'{key}-{direction}-top1']:.2f} ({low:.1f} to {high:.1f})")
        rows.append(row)
    return rows
