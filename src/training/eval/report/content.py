"""Data for the query browser of the report: texts, ranks and best candidates of a sample of queries, as plain lists."""

from collections.abc import Sequence
from pathlib import Path

import torch

from training.eval.metrics import expected_rank
from training.eval.record import DIRECTIONS
from training.eval.report.matches import top_matches
from training.eval.retrieval import RankedSet

NUM_MATCHES = 10
MAX_QUERIES = 10_000  # per benchmark and direction


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
