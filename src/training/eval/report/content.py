"""Data for the query browser of the report: texts, ranks and best candidates of every benchmark, as plain lists."""

from collections.abc import Sequence

import torch

from training.eval.encode import Encoding
from training.eval.metrics import expected_rank
from training.eval.report.matches import top_matches
from training.eval.retrieval import RankedSet

NUM_MATCHES = 10


def browser_content(
    ranked: Sequence[RankedSet], images: Encoding, texts: Encoding, device: torch.device | str = "cpu"
) -> dict[str, object]:
    """Collects the data that the page shows for every query.

    Args:
        ranked: benchmarks.
        images, texts: the features used for ranking.
        device: device that computes similarities.

    Returns:
        ``texts``; ``lost``, the number of truncated tokens of each text (-1: unknown); ``names`` of images; and
        ``sets``. Each set has ``images`` and ``texts`` (indices into the lists above), ``owner`` (image of each
        caption), and for each direction ``rank`` of all queries and, for the best `NUM_MATCHES` candidates of each
        query, ``top`` (indices within the set) and ``score`` (in thousandths) as flat lists.
    """
    image_number = _number_all(row for r in ranked for row in r.image_rows)
    text_number = _number_all(row for r in ranked for row in r.text_rows)
    names = {row: path.name for r in ranked for row, path in zip(r.image_rows, r.pairs.image_paths)}
    captions = {row: text for r in ranked for row, text in zip(r.text_rows, r.pairs.captions)}
    sets = []
    for r in ranked:
        own_images, own_texts = images.features[r.image_rows], texts.features[r.text_rows]
        sets.append(
            {
                "title": r.pairs.title,
                "images": [image_number[row] for row in r.image_rows],
                "texts": [text_number[row] for row in r.text_rows],
                "owner": list(r.pairs.image_of_caption),
                "i2t": _direction(own_images, own_texts, expected_rank(r.i2t), device),
                "t2i": _direction(own_texts, own_images, expected_rank(r.t2i), device),
            }
        )
    return {
        "texts": [captions[row] for row in text_number],
        "lost": [int(texts.lost_tokens[row]) for row in text_number],
        "names": [names[row] for row in image_number],
        "sets": sets,
    }


def _number_all(rows: object) -> dict[int, int]:
    return {row: number for number, row in enumerate(dict.fromkeys(rows))}


def _direction(
    queries: torch.Tensor, candidates: torch.Tensor, ranks: torch.Tensor, device: torch.device | str
) -> dict[str, list]:
    top, score = top_matches(queries, candidates, NUM_MATCHES, device)
    return {
        "rank": [int(rank) if rank == int(rank) else round(rank, 1) for rank in ranks.tolist()],
        "top": top.flatten().tolist(),
        "score": (1000 * score).round().int().flatten().tolist(),
    }
