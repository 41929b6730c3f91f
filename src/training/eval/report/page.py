"""HTML pages that open from disk and need no network: the report, whose own script alone may run, and a search."""

import base64
import gzip
import hashlib
import io
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from markupsafe import Markup
from tqdm.contrib.concurrent import thread_map

from training.eval.metrics import expected_rank, top_matches
from training.eval.published import published_rows
from training.eval.record import DIRECTIONS, format_rows, result_rows
from training.eval.report.figures import KS, Figure, draw_recall, format_diagnostics, recall_curves, to_svg
from training.eval.retrieval import Outcome, RankedSet
from training.readers.files import NUM_THREADS, StoredImage, upright
from training.readers.images import BrokenImageError, load_rgb
from training.runtime.files import atomic_write
from training.runtime.messages import render_page

TEMPLATES = Path(__file__).parent / "templates"
MAX_BYTES = 19_500_000  # size of the page: mail and chat programs accept 20 MB
# Reached by benchmarks of a million pairs; with thumbnails of 400 bytes, the page then has 45 MB.
MAX_CONTENT_BYTES, MAX_THUMBNAILS = 16_000_000, 40_000
# Longest side in pixels and WebP quality, from good on a phone down to barely recognisable scenes.
STEPS = ((160, 60), (128, 55), (112, 50), (96, 45), (80, 40), (64, 40), (56, 35), (48, 30), (40, 20))
SAMPLE = 48
NUM_MATCHES = 10
MAX_QUERIES = 10_000  # per benchmark and direction


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
    rows = [
        {"recall at": c["title"], "": c["direction"], **{str(k): f"{100 * v:.1f}" for k, v in zip(KS, c["recall"])}}
        for c in curves
    ]
    figures = [("Recall at k", format_rows(rows, num_left=2), draw_recall(curves))]
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


def browser_content(
    ranked: Sequence[RankedSet], device: torch.device | str = "cpu", max_queries: int = MAX_QUERIES
) -> tuple[dict[str, object], list[Path]]:
    """Collects the data that the page shows.

    Args:
        ranked: benchmarks.
        device: device that computes similarities.
        max_queries: number of queries to show per benchmark and direction; see `choose_queries`.

    Returns:
        The data, and the file of each of its images. The data are ``texts``; ``lost``, the number of truncated tokens
        of each text (-1: unknown); ``names`` of images; and ``sets``. Each set has ``images`` and ``texts``, which are
        the shown ones as indices into the lists above, ``imageNumber`` and ``textNumber``, their positions in the
        benchmark, and ``owner``, the image of each text. ``i2t`` and ``t2i`` hold the ``query`` and its ``rank``, and
        for the best `NUM_MATCHES` candidates of each query ``top`` and ``score`` (in thousandths) as flat lists;
        ``note`` says which queries are shown if not all are. Queries and candidates are indices into the set's lists.
    """
    shown = [_shown(r, device, max_queries) for r in ranked]
    # Images of queries come first, because a page has no room for the thumbnails of a hundred thousand images.
    first = (r.pairs.image_paths[i] for r, (_, images_of_queries) in zip(ranked, shown) for i in images_of_queries)
    image_number = {path: number for number, path in enumerate(dict.fromkeys(first))}
    text_number: dict[str, int] = {}
    lost: list[int] = []
    for r, (content, _) in zip(ranked, shown):
        for row in content["textNumber"]:
            if r.pairs.captions[row] not in text_number:
                text_number[r.pairs.captions[row]] = len(lost)
                lost.append(int(r.lost_tokens[row]))
        paths = [r.pairs.image_paths[i] for i in content["imageNumber"]]
        content["images"] = [image_number.setdefault(path, len(image_number)) for path in paths]
        content["texts"] = [text_number[r.pairs.captions[row]] for row in content["textNumber"]]
    data = {"texts": list(text_number), "lost": lost, "names": [path.name for path in image_number]}
    return data | {"sets": [content for content, _ in shown]}, list(image_number)


def _shown(r: RankedSet, device: torch.device | str, max_queries: int) -> tuple[dict, list[int]]:
    """Returns the content of a set, and the images that are queries or belong to one."""
    found = {}
    for direction, queries, candidates in (("i2t", r.images, r.texts), ("t2i", r.texts, r.images)):
        ranks = expected_rank(getattr(r, direction))
        chosen, note = choose_queries(ranks, max_queries)
        found[direction] = (chosen, ranks[chosen], note, *top_matches(queries[chosen], candidates, NUM_MATCHES, device))
    (images, _, _, top_texts, _), (texts, _, _, top_images, _) = (found[d] for d in DIRECTIONS)
    owner = r.owner
    captions = torch.isin(owner, images).nonzero()[:, 0]
    shown_texts = torch.cat([texts, captions, top_texts.flatten()]).unique()
    shown_images = torch.cat([images, top_images.flatten(), owner[shown_texts]]).unique()
    content = {
        "title": r.pairs.title,
        "imageNumber": shown_images.tolist(),
        "textNumber": shown_texts.tolist(),
        "owner": torch.searchsorted(shown_images, owner[shown_texts]).tolist(),
    }
    for direction, (query, ranks, note, top, score) in found.items():
        shown, others = (shown_images, shown_texts) if direction == "i2t" else (shown_texts, shown_images)
        content[direction] = {
            "query": torch.searchsorted(shown, query).tolist(),
            "rank": [int(rank) if rank == int(rank) else round(rank, 1) for rank in ranks.tolist()],
            "top": torch.searchsorted(others, top.flatten()).tolist(),
            "score": (1000 * score).round().int().flatten().tolist(),
            "note": note,
        }
    return content, torch.cat([images, owner[texts]]).unique().tolist()


def choose_queries(ranks: torch.Tensor, max_queries: int) -> tuple[torch.Tensor, str]:
    """Chooses the queries that a page shows: all failures first, then others, evenly spread over the benchmark.

    Args:
        ranks: rank of each query's right answer, [num_queries].
        max_queries: number of queries to choose; if there are more failures, they are evenly spread, too.

    Returns:
        The chosen queries, ascending, and a sentence about them, which is empty if all are chosen.
    """
    if len(ranks) <= max_queries:
        return torch.arange(len(ranks)), ""
    failures, others = (ranks > 1).nonzero()[:, 0], (ranks <= 1).nonzero()[:, 0]
    num_failures = min(len(failures), max_queries)
    num_others = max_queries - num_failures
    note = (
        f"This page shows {max_queries:,} of {len(ranks):,} queries: {num_failures:,} of {len(failures):,} whose first "
        f"answer is wrong, and {num_others:,} of the {len(others):,} others."
    )
    return torch.cat([_evenly(failures, num_failures), _evenly(others, num_others)]).sort().values, note


def _evenly(items: torch.Tensor, number: int) -> torch.Tensor:
    return items[torch.arange(number) * len(items) // max(number, 1)]


def make_thumbnails(paths: Sequence[Path | StoredImage], budget: int) -> list[bytes]:
    """Makes a WebP thumbnail of each image, with the largest of `STEPS` for which all thumbnails fit the budget.

    Args:
        paths: image files.
        budget: total number of bytes; exceeded only if even the smallest step does not fit.

    Returns:
        One WebP file per image; empty for unreadable images.
    """
    sample = paths[:: -(-len(paths) // SAMPLE) or 1]
    for step in STEPS[:-1]:
        if sum(map(len, _make_all(sample, step))) * len(paths) <= 0.95 * budget * len(sample):
            thumbnails = _make_all(paths, step)
            if sum(map(len, thumbnails)) <= budget:
                return thumbnails
    return _make_all(paths, STEPS[-1])


def _make_all(paths: Sequence[Path | StoredImage], step: tuple[int, int]) -> list[bytes]:
    # Threads, because Pillow releases the GIL while decoding. Few lines in a log file.
    how = {"max_workers": NUM_THREADS, "delay": 2, "mininterval": 0.5 if sys.stderr.isatty() else 30}
    return thread_map(lambda path: _thumbnail(path, *step), paths, desc="thumbnails", unit="image", **how)


def _thumbnail(path: Path | StoredImage, edge: int, quality: int) -> bytes:
    try:
        image = load_rgb(path, at_least=2 * edge)
    except BrokenImageError:
        return b""
    image.thumbnail((edge, edge))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()


def write_search_page(
    path: Path, query: str | Path, results: Sequence[tuple[Path, float]], folder: Path, facts: dict[str, str]
) -> None:
    """Writes the page.

    Args:
        path: the file.
        query: the text, or the image file.
        results: image files and their scores, best first.
        folder: folder of the images, to which the names shown are relative.
        facts: name -> value, shown below the heading.
    """
    files = [upright(path) for path, _ in results]
    if isinstance(query, Path):
        files.append(upright(query))
    thumbnails = make_thumbnails(files, MAX_BYTES // 2)
    encoded = [base64.b64encode(thumbnail).decode() for thumbnail in thumbnails]
    page = render_page(
        TEMPLATES / "search.html.j2",
        query=str(query),
        query_image=encoded[-1] if isinstance(query, Path) else None,
        facts=facts,
        results=[
            {"name": str(file.relative_to(folder)), "address": file.resolve().as_uri(), "score": f"{score:.4f}"}
            | {"thumbnail": thumbnail}
            for (file, score), thumbnail in zip(results, encoded)
        ],
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")
