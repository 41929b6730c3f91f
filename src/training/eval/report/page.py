"""The HTML report: one file that opens from disk, needs no network, and allows only its own script to run."""

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from markupsafe import Markup
from tabulate import tabulate

from training.eval.published import Comparison
from training.eval.record import DIRECTIONS, ClassificationResult, RetrievalResult
from training.eval.report.content import MAX_QUERIES, NUM_MATCHES, browser_content
from training.eval.report.curves import KS, draw_recall, recall_curves
from training.eval.report.thumbnails import make_thumbnails
from training.eval.retrieval import RankedSet
from training.runtime.pages import render_page

TEMPLATES = Path(__file__).parent / "templates"
MAX_BYTES = 19_500_000  # size of the page: mail and chat programs accept 20 MB
# Reached by benchmarks of a million pairs; with thumbnails of 400 bytes, the page then has 45 MB.
MAX_CONTENT_BYTES, MAX_THUMBNAILS = 16_000_000, 40_000


def write_report(
    path: Path,
    heading: str,
    facts: dict[str, str],
    ranked: Sequence[RankedSet],
    zero_shot: Sequence[ClassificationResult] = (),
    figures: Sequence[tuple[str, str, str]] = (),
    published: Sequence[Comparison] = (),
    device: torch.device | str = "cpu",
) -> Path:
    """Writes the report of one evaluation.

    Args:
        path: the file; its folder must exist.
        heading: the model, or the source of the features.
        facts: name -> value, shown below the heading.
        ranked: benchmarks; at least one.
        zero_shot: results of classification.
        figures: additional figures (title, description, SVG), shown below the recall curves.
        published: comparisons with published numbers.
        device: device that computes similarities.

    Returns:
        `path`.
    """
    compressed, paths = _compress_content(ranked, device)
    paths, num_images = paths[:MAX_THUMBNAILS], len(paths)
    thumbnails = make_thumbnails(paths, max(MAX_BYTES * 3 // 4 - len(compressed) - 200_000, 400 * len(paths)))
    thumbnails += [b""] * (num_images - len(paths))
    # Padded to a multiple of 3 bytes, each thumbnail is a slice of the base64 text.
    padded = [thumbnail + b"\0" * (-len(thumbnail) % 3) for thumbnail in thumbnails]
    curves = recall_curves(ranked)
    rows_of_numbers = [[c["title"], c["direction"], *(f"{100 * value:.1f}" for value in c["recall"])] for c in curves]
    recall_text = tabulate(rows_of_numbers, headers=["recall at", "", *KS], disable_numparse=True)
    shown = [("Recall at k", recall_text, draw_recall(curves)), *figures]
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    page = render_page(
        TEMPLATES / "report.html.j2",
        heading=heading,
        facts=facts,
        table=[_table_row(r.result) for r in ranked],
        zero_shot=[_zero_shot_row(r) for r in zero_shot],
        published=[_published_row(c) for c in published],
        figures=[(title, text, base64.b64encode(svg.encode()).decode()) for title, text, svg in shown],
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        ends=json.dumps(_ends(padded)),
        thumbnails=base64.b64encode(b"".join(padded)).decode(),
        content=base64.b64encode(compressed).decode(),
        num_matches=NUM_MATCHES,
    )
    path.write_text(page, encoding="utf-8", newline="\n")
    return path


def _compress_content(ranked: Sequence[RankedSet], device: torch.device | str) -> tuple[bytes, list[Path]]:
    """Returns the query browser's data, with fewer queries if they take too much room, and the files of its images."""
    number = MAX_QUERIES
    while True:
        content, paths = browser_content(ranked, device, number)
        compressed = gzip.compress(json.dumps(content, separators=(",", ":")).encode(), 6, mtime=0)
        if len(compressed) <= MAX_CONTENT_BYTES or number == 1:
            return compressed, paths
        number = min(number, max(max(map(len, (r.images, r.texts))) for r in ranked))
        number = max(1, int(0.8 * number * MAX_CONTENT_BYTES / len(compressed)))


def _ends(thumbnails: Sequence[bytes]) -> list[int]:
    """Returns the end of each thumbnail in the base64 text, in characters."""
    ends, total = [], 0
    for thumbnail in thumbnails:
        total += len(thumbnail) // 3 * 4
        ends.append(total)
    return ends


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _interval(bounds: Sequence[float]) -> str:
    return "{:.1f}-{:.1f}".format(*(100 * bound for bound in bounds))


def _table_row(result: RetrievalResult) -> dict[str, object]:
    share = result.truncated_share
    directions = []
    for direction in DIRECTIONS:
        recall = result.recall(direction)
        directions += [_percent(recall.top1), _interval(recall.top1_ci95)]
        directions += [_percent(recall.top5), _percent(recall.top10), f"{recall.median_rank:.6g}"]
    cut = "unknown" if share is None else f"{100 * share:.1f}%"
    return {
        "title": result.title,
        "pairs": result.pairs,
        "protocol": result.protocol,
        "fingerprint": result.fingerprint,
        "cells": [*directions, cut],
    }


def _zero_shot_row(r: ClassificationResult) -> list[str]:
    return [r.title, r.pairs, _percent(r.top1), _interval(r.top1_ci95), _percent(r.top5)]


def _published_row(c: Comparison) -> list[str]:
    ratio = "-" if c.half_intervals is None else f"{c.half_intervals:+.1f}"
    numbers = [_percent(c.measured), _percent(c.printed), f"{100 * c.difference:+.2f}", ratio]
    return [c.benchmark, DIRECTIONS[c.direction], *numbers, f"{c.source}; {c.note}" if c.note else c.source]
