"""The HTML report: one file that opens from disk, needs no network, and allows only its own script to run."""

import base64
import gzip
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from markupsafe import Markup

from training.eval.published import published_rows
from training.eval.report.card import Figure, format_diagnostics
from training.eval.report.content import MAX_QUERIES, NUM_MATCHES, browser_content
from training.eval.report.curves import KS, draw_recall, recall_curves, to_svg
from training.eval.report.thumbnails import make_thumbnails
from training.eval.retrieval import Outcome, RankedSet
from training.eval.tables import format_rows, result_rows
from training.runtime.messages import render_page

TEMPLATES = Path(__file__).parent / "templates"
MAX_BYTES = 19_500_000  # size of the page: mail and chat programs accept 20 MB
# Reached by benchmarks of a million pairs; with thumbnails of 400 bytes, the page then has 45 MB.
MAX_CONTENT_BYTES, MAX_THUMBNAILS = 16_000_000, 40_000


def write_report(
    path: Path,
    heading: str,
    facts: dict[str, str],
    outcome: Outcome,
    figure: Figure | None,
    published: Sequence[dict],
    device: torch.device | str = "cpu",
) -> Path:
    """Writes the report of one evaluation.

    Args:
        path: the file; its folder must exist.
        heading: the model, or the source of the features.
        facts: name -> value, shown below the heading.
        outcome: benchmarks, at least one, and what was measured.
        figure: a figure of the diagnostics, shown below the recall curves.
        published: result of `published.compare_with_published`.
        device: device that computes similarities.

    Returns:
        `path`.
    """
    compressed, paths = _compress_content(outcome.ranked, device)
    paths, num_images = paths[:MAX_THUMBNAILS], len(paths)
    thumbnails = make_thumbnails(paths, max(MAX_BYTES * 3 // 4 - len(compressed) - 200_000, 400 * len(paths)))
    thumbnails += [b""] * (num_images - len(paths))
    # Padded to a multiple of 3 bytes, each thumbnail is a slice of the base64 text; the page needs their ends in it.
    padded = [thumbnail + b"\0" * (-len(thumbnail) % 3) for thumbnail in thumbnails]
    curves = recall_curves(outcome.ranked)
    figures = [("Recall at k", _format_curves(curves), draw_recall(curves))]
    if figure:
        figures.append((figure.title, format_diagnostics(outcome.diagnostics), to_svg(figure.drawing)))
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    page = render_page(
        TEMPLATES / "report.html.j2",
        heading=heading,
        facts=facts,
        tables=[(caption, rows) for caption, rows in _tables(outcome, published).items() if rows],
        figures=[(title, text, base64.b64encode(svg.encode()).decode()) for title, text, svg in figures],
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        ends=json.dumps(list(itertools.accumulate(len(thumbnail) // 3 * 4 for thumbnail in padded))),
        thumbnails=base64.b64encode(b"".join(padded)).decode(),
        content=base64.b64encode(compressed).decode(),
        num_matches=NUM_MATCHES,
    )
    path.write_text(page, encoding="utf-8", newline="\n")
    return path


def _format_curves(curves: Sequence[dict]) -> str:
    rows = [
        {"recall at": c["title"], "": c["direction"], **{str(k): f"{100 * v:.1f}" for k, v in zip(KS, c["recall"])}}
        for c in curves
    ]
    return format_rows(rows, num_left=2)


def _tables(outcome: Outcome, published: Sequence[dict]) -> dict[str, list[dict[str, str]]]:
    """Returns caption -> rows of each table; without rows, there is nothing to show."""
    results = [r.result for r in outcome.ranked]
    protocols = [{"protocol": f"{r.protocol} {r.fingerprint}"} for r in results]
    differences = "differences in points, and in halves of the 95% interval"
    return {
        "Recall in percent, with 95% bootstrap intervals of R@1; rank of the right answer": [
            row | protocol for row, protocol in zip(result_rows(r.columns() for r in results), protocols)
        ],
        f"R@1 in percent compared with published numbers; {differences}": published_rows(published),
        "Zero-shot classification, accuracy in percent": result_rows(r.columns() for r in outcome.zero_shot),
    }


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
