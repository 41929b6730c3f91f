"""Compares evaluations: differences in R@1 with paired bootstrap intervals, and the queries that flipped.

    python -m training.compare logs/first logs/second [logs/third ...] [--flips flips.csv] [--json compared.json]

Every run is compared with the first one, on the benchmarks that both evaluated with the same pairs.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.eval.record import DIRECTIONS, describe_pairs, format_rows, interval, percent, points
from training.eval.results import flags_that_differ
from training.flags.types import command_parser


def compare(runs: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Compares all runs with the first one.

    Args:
        runs: folders LOGS/NAME of evaluations.

    Returns:
        Records and notes. There is one record per benchmark, direction and run: ``benchmark``, ``protocol``,
        ``fingerprint``, ``direction``, ``run``, ``top1``, and for all runs except the first ``difference``, ``low``,
        ``high`` (95% interval), ``p``, the numbers of queries ``gained`` and ``lost``, and ``num_queries``. The notes
        say what could not be compared.

    Raises:
        FileNotFoundError, ValueError: a run has no ranks, or no benchmark is common to two runs.
    """
    from training.eval.metrics import paired_bootstrap
    from training.eval.npz import read_ranks

    (base, first_ranks), *others = zip(_names(runs), map(read_ranks, runs))
    records, notes = [], []
    for key, first in first_ranks.items():
        comparable = []
        for name, ranks in others:
            if key not in ranks:
                notes.append(f"{first.title}: not evaluated in {name}")
            elif ranks[key].digest != first.digest:
                found, expected = (f"{r.protocol} {r.digest[:16]}".strip() for r in (ranks[key], first))
                notes.append(
                    f"{first.title}: {name} ({found}) and {base} ({expected}) ranked different pairs; not comparable"
                )
            else:
                comparable.append((name, ranks[key]))
        for direction in DIRECTIONS if comparable else ():
            before = first.top1[direction]
            # Captions of one image are not independent, so images are resampled with all their captions.
            clusters = first.owner if direction == "t2i" else None
            for name, compared in ((base, first), *comparable):
                after = compared.top1[direction]
                record: dict[str, Any] = {"benchmark": first.title, "protocol": first.protocol}
                record |= {
                    "fingerprint": first.digest,
                    "direction": direction,
                    "run": name,
                    "top1": float(after.mean()),
                }
                if compared is not first:
                    flips = {"gained": int((after > before).sum()), "lost": int((after < before).sum())}
                    record |= paired_bootstrap(before, after, clusters)._asdict() | flips | {"num_queries": len(after)}
                records.append(record)
    if not records:
        raise ValueError("no benchmark was evaluated on the same pairs in two runs\n" + "\n".join(notes))
    return records, notes


def _names(runs: Sequence[str]) -> list[str]:
    """Returns the last part of each path if these are distinct, otherwise the full paths."""
    short = [Path(run).resolve().name for run in runs]
    return short if len(set(short)) == len(short) else [str(run) for run in runs]


def format_comparison(records: Sequence[dict[str, Any]]) -> str:
    """Returns the table for a terminal, in percent and points."""
    rows = []
    for r in records:
        row = {"benchmark": r["benchmark"], "": DIRECTIONS[r["direction"]], "run": r["run"], "R@1": percent(r["top1"])}
        row |= dict.fromkeys(("difference", "95% interval", "p", "gained", "lost"), "")
        if "p" in r:
            row |= {"difference": points(r["difference"]), "95% interval": interval((r["low"], r["high"]), signed=True)}
            row |= {"p": f"{r['p']:.4f}{' *' if r['p'] < 0.05 else ''}", "gained": r["gained"], "lost": r["lost"]}
        rows.append(row)
    pairs = dict.fromkeys(describe_pairs(r["benchmark"], r["protocol"], r["fingerprint"]) for r in records)
    return "\n".join([format_rows(rows, num_left=3), "", *pairs])


def write_flips(runs: Sequence[str], path: Path) -> int:
    """Writes a CSV of the queries whose right answer comes first in some runs but not in others.

    Returns:
        The number of queries.
    """
    from training.eval.npz import read_ranks

    loaded, rows = [read_ranks(run) for run in runs], []
    for key, first in loaded[0].items():
        if any(key not in other or other[key].digest != first.digest for other in loaded):
            continue
        for direction in DIRECTIONS:
            ranks = np.stack([other[key].rank[direction] for other in loaded], axis=1)  # [num_queries, num_runs]
            images = first.images[first.owner] if direction == "t2i" else first.images
            is_first = ranks == 1
            for query in np.flatnonzero(is_first.any(axis=1) & ~is_first.all(axis=1)):
                rows.append([first.title, direction, query + 1, images[query], *map("{:g}".format, ranks[query])])
    with open(path, "w", encoding="utf-8", newline="") as file:
        heading = ["benchmark", "direction", "query_number", "image", *(f"rank in {name}" for name in _names(runs))]
        csv.writer(file).writerows([heading, *rows])
    return len(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, or 2 for a usage error."""
    parser = command_parser("training.compare", __doc__, Path(__file__).with_suffix(".yaml"))
    args = parser.parse_args(argv)
    try:
        if len(args.runs) < 2:
            raise ValueError("expected two runs or more")
        records, notes = compare(args.runs)
        num_flips = write_flips(args.runs, args.flips) if args.flips else 0
        if args.json:
            args.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(format_comparison(records))
    differing = flags_that_differ(dict(zip(args.runs, _names(args.runs))))
    if len(differing):
        rows = differing.fillna("-").reset_index(names="flag").to_dict("records")
        print(f"\nFlags that differ:\n{format_rows(rows, num_left=len(rows[0]))}")
    print("\n* p < 0.05, two-sided paired bootstrap over images, not corrected for multiple comparisons.")
    print("\n".join(notes), end="\n" * bool(notes))
    if args.flips:
        print(f"Queries that flipped: {num_flips:,}, listed in {args.flips}")
    return 0
