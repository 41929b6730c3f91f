"""Compares evaluations: differences in R@1 with paired bootstrap intervals, and the queries that flipped.

    python -m training.compare logs/first logs/second [logs/third ...] [--flips flips.csv] [--json compared.json]

Every run is compared with the first one, on the benchmarks that both evaluated with the same pairs.
"""

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path

from training.eval.results_table import flags_that_differ


def compare(runs: Sequence[str]) -> tuple[list[dict[str, object]], list[str]]:
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
    from training.eval.record import DIRECTIONS
    from training.eval.report.ranks import read_ranks

    loaded = [read_ranks(run) for run in runs]
    names = _names(runs)
    records, notes = [], []
    for key, first in loaded[0].items():
        for name, other in zip(names[1:], loaded[1:]):
            if key not in other:
                notes.append(f"{first.title}: not evaluated in {name}")
            elif other[key].digest != first.digest:
                read = [f"{ranks.protocol} {ranks.digest[:16]}".strip() for ranks in (other[key], first)]
                pair = f"{name} ({read[0]}) and {names[0]} ({read[1]})"
                notes.append(f"{first.title}: {pair} ranked different pairs; not comparable")
        same = [(n, o[key]) for n, o in zip(names, loaded) if key in o and o[key].digest == first.digest]
        if len(same) < 2:
            continue
        for direction in DIRECTIONS:
            before = first.top1[direction]
            # Captions of one image are not independent, so images are resampled with all their captions.
            clusters = first.owner if direction == "t2i" else None
            for name, ranks in same:
                after = ranks.top1[direction]
                record = {"benchmark": first.title, "protocol": first.protocol, "fingerprint": first.digest}
                record |= {"direction": direction, "run": name, "top1": float(after.mean())}
                if ranks is not first:
                    found = paired_bootstrap(before, after, clusters)
                    flips = {"gained": int((after > before).sum()), "lost": int((after < before).sum())}
                    record |= {**found._asdict(), **flips, "num_queries": len(after)}
                records.append(record)
    if not records:
        raise ValueError("no benchmark was evaluated on the same pairs in two runs\n" + "\n".join(notes))
    return records, notes


def _names(runs: Sequence[str]) -> list[str]:
    """Returns the last part of each path if these are distinct, otherwise the full paths."""
    short = [Path(run).resolve().name for run in runs]
    return short if len(set(short)) == len(short) else [str(run) for run in runs]


def format_comparison(records: Sequence[dict[str, object]]) -> str:
    """Returns the table for a terminal, in percent and points."""
    from training.eval.record import DIRECTIONS, describe_pairs
    from training.eval.tables import format_rows, interval, percent, points

    rows, last = [], None
    for r in records:
        side = (r["benchmark"], DIRECTIONS[r["direction"]])
        heading = side if side != last else ("", "")
        last = side
        row = {"benchmark": heading[0], "": heading[1], "run": r["run"], "R@1": percent(r["top1"])}
        row |= dict.fromkeys(("difference", "95% interval", "p", "gained", "lost"), "")
        if "p" in r:
            row |= {"difference": points(r["difference"]), "95% interval": interval((r["low"], r["high"]), signed=True)}
            row |= {"p": f"{r['p']:.4f}{' *' if r['p'] < 0.05 else ''}", "gained": r["gained"], "lost": r["lost"]}
        rows.append(row)
    table = format_rows(rows, num_left=3)
    read = dict.fromkeys(describe_pairs(r["benchmark"], r["protocol"], r["fingerprint"]) for r in records)
    return "\n".join([table, "", *read])


def write_flips(runs: Sequence[str], path: Path) -> int:
    """Writes a CSV of the queries whose right answer comes first in some runs but not in others.

    Returns:
        The number of queries.
    """
    from training.eval.record import DIRECTIONS
    from training.eval.report.ranks import read_ranks

    loaded, rows = [read_ranks(run) for run in runs], []
    for key, first in loaded[0].items():
        if any(key not in other or other[key].digest != first.digest for other in loaded):
            continue
        for direction in DIRECTIONS:
            ranks = [other[key].rank[direction] for other in loaded]
            for query, own in enumerate(zip(*ranks)):
                if len({rank == 1 for rank in own}) > 1:
                    image = first.owner[query] if direction == "t2i" else query
                    rows.append([first.title, direction, query + 1, first.images[image], *(f"{r:g}" for r in own)])
    with open(path, "w", encoding="utf-8", newline="") as file:
        heading = ["benchmark", "direction", "query_number", "image", *(f"rank in {name}" for name in _names(runs))]
        csv.writer(file).writerows([heading, *rows])
    return len(rows)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser."""
    parser = argparse.ArgumentParser(
        prog="python -m training.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of an evaluation, LOGS/NAME; two or more")
    parser.add_argument("--flips", type=Path, metavar="FILE", help="write the queries that flipped as CSV, with ranks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers of the table, as fractions")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, or 2 for a usage error."""
    parser = build_parser()
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
        print(f"\nFlags that differ:\n{differing.to_string(na_rep='-')}")
    print("\n* p < 0.05, two-sided paired bootstrap over images, not corrected for multiple comparisons.")
    for note in notes:
        print(note)
    if args.flips:
        print(f"Queries that flipped: {num_flips:,}, listed in {args.flips}")
    return 0
