"""Runs one evaluation from start to end: check, build, encode, rank, report."""

import argparse
import csv
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dataloaders.pairs import describe_completeness, describe_missing
from training.eval.changes import Change, list_changes
from training.eval.npz import FILE, read_features, write_features, write_ranks
from training.eval.published import PublishedNumber, compare_with_published, explain, find_published, published_rows
from training.eval.record import describe_pairs, format_rows, of_expected
from training.eval.report.figures import CARD, Figure, draw, format_diagnostics
from training.eval.report.page import write_report
from training.eval.results import format_table, label_of, run_name, write_results
from training.eval.retrieval import EncodedSet, Outcome, RetrievalWork, encode_sets, plan_benchmarks, rank_set
from training.flags.effects import asks_about_texts
from training.model.names.files import file_sha256
from training.readers.images import BrokenImageError
from training.runtime.distributed import DistEnv, failing_with, on_main_rank
from training.runtime.lease import Lease
from training.runtime.messages import or_warn
from training.runtime.watchdog import BUILDING, EVALUATING, joined_ranks

# What needs a model is imported in functions: an evaluation of features would wait seconds for open_clip's import.


@dataclass(frozen=True)
class Plan:
    """Result of rank 0's checks before a model is built; the same on every rank.

    Attributes:
        work: benchmarks; without retrieval sets if these are given as features.
        weights_sha256: hash of the weights file; None without weights.
        folder: folder of this run, LOGS/NAME.
        published: published numbers of this model.
    """

    work: RetrievalWork
    weights_sha256: str | None
    folder: Path
    published: list[PublishedNumber]


def evaluate(args: argparse.Namespace) -> int:
    """Evaluates every benchmark that the flags name; rank 0 prints the tables and writes results.jsonl.

    Returns:
        Exit code: 0 for success; 1 if an image can't be read or the model returns NaN or infinity; 2 for wrong flags,
        files or weights.
    """
    start = time.monotonic()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("huggingface_hub").propagate = False  # it has its own handler
    with joined_ranks(args.device, args.timeout_minutes) as (env, watchdog), Lease() as lease:
        lease.is_worthless = lambda: True
        with failing_with(2, ValueError, OSError):
            plan = on_main_rank(lambda: _check(args, lease, env), env)
            watchdog.at(0, BUILDING)
            encoded = read_features(args.features) if args.features else None
            if args.dry_run:
                on_main_rank(lambda: _describe(args, plan, encoded), env)
                return 0
            built = None if encoded and not asks_about_texts(args) else _build(args, env)
        watchdog.at(0, EVALUATING)
        with failing_with(2, ValueError, OSError), failing_with(1, BrokenImageError, FloatingPointError):
            outcome = _measure(args, plan.work, env, encoded, built)
        lease.is_worthless = lambda: False
        if env.is_main:
            _report(args, plan, outcome, env, time.monotonic() - start)
    return 0


def _check(args: argparse.Namespace, lease: Lease, env: DistEnv) -> Plan:
    """Checks flags and files before a model is built, and takes the lease of the run's folder. Rank 0 only.

    Raises:
        ValueError, FileNotFoundError: the message says what is wrong and what to do.
    """
    weights = None
    work = (None if args.features else plan_benchmarks(args)) or RetrievalWork([], {})
    if not args.features or asks_about_texts(args):
        from training.model.assembly.from_flags import check_pooling, find_weights

        weights = find_weights(args, env.device, "its numbers are at chance level")
        if args.rerank:
            check_pooling(args.model, args.cache_dir)
    sha256 = file_sha256(weights) if weights else None
    published = find_published(args.published, args.model, args.pretrained, sha256)
    name = args.name or (run_name("features") if args.features else run_name(args.model, args.precision))
    folder = Path(args.logs) / name
    number = 1
    while True:
        try:
            if not args.dry_run:  # a full or read-only disk is noticed now, not after an hour of encoding
                lease.take(folder / "checkpoints", f"--name {name}")
            return Plan(work, sha256, folder, published)
        except ValueError:  # jobs that started in the same second have the same name unless they were given one
            if args.name:
                raise
            number += 1
            folder = Path(args.logs) / f"{name}-{number}"


def _describe(args: argparse.Namespace, plan: Plan, encoded: list[EncodedSet] | None) -> None:
    """Prints what would be evaluated, and under which protocol."""
    sets = [s.pairs for s in encoded] if encoded else plan.work.sets
    for s in sets:
        print(f"{describe_completeness(s)[0]}\n  {describe_pairs(s.title, s.protocol, s.fingerprint())}")
    for c in plan.work.classification:
        print(f"{c.title}: {len(c.labels):,} of {max(c.num_published, len(c.labels)):,} images")
    images = set(plan.work.identity.values())
    captions = {caption for s in plan.work.sets for caption in s.captions}
    print(f"Model: {label_of(args)}, {args.precision}, weights {(plan.weights_sha256 or 'none')[:16]}")
    print(f"To encode: {len(images):,} distinct images and {len(captions):,} distinct captions")
    print(f"Dry run: nothing was encoded or written; results would go to {plan.folder}")


def _build(args: argparse.Namespace, env: DistEnv) -> tuple[object, list[Change]]:
    """Returns the `Encoder`, and the changes of captions to measure; wrong ones are refused now, before encoding."""
    from training.eval.encode import ComputeOptions, Encoder
    from training.model.assembly.from_flags import build_from_flags

    parts = build_from_flags(args, env.device)
    asked = (args.retrieval_lengths, args.retrieval_sentences, args.retrieval_sensitivity, args.diagnostics)
    changes = list_changes(parts.tokenizer, *asked)
    options = ComputeOptions.from_flags(args, feature_cache=args.feature_cache, allow_broken=args.allow_missing)
    return Encoder(parts, env, options), changes


def _measure(
    args: argparse.Namespace, work: RetrievalWork, env: DistEnv, encoded: list[EncodedSet] | None, built: tuple | None
) -> Outcome:
    """Encodes and ranks the benchmarks, and runs all analyses; with features in `encoded`, only changed captions are
    encoded.

    Raises:
        BrokenImageError: an image can't be read.
        FloatingPointError: the model returned NaN or infinity.
        ValueError: a cache is broken, or the features are those of another model.
    """
    encoder, changes = built or (None, [])
    if encoder:
        from training.eval.diagnostics import check_text_model, diagnose
        from training.eval.rerank import rerank_sets
        from training.eval.zero_shot import evaluate_zero_shot

        for one in encoded or ():
            check_text_model(encoder, one)
    if encoded is None and work.sets:
        ranked = [rank_set(one, env) for one in encode_sets(encoder, work)]
    else:
        ranked = [rank_set(one, env) for one in encoded or ()]
    reranked = rerank_sets(encoder, ranked, args.rerank) if args.rerank else []
    diagnostics = diagnose(encoder, ranked, changes, args.seed) if changes and ranked else {}
    zero_shot = evaluate_zero_shot(encoder, work.classification) if encoder else []
    return Outcome(ranked, zero_shot, reranked, diagnostics)


def _report(args: argparse.Namespace, plan: Plan, outcome: Outcome, env: DistEnv, seconds: float) -> None:
    """Prints the tables and writes the run's files. Rank 0 only."""
    results = [r.result for r in outcome.ranked]
    comparisons = compare_with_published(results, plan.published)
    print("\n" + "\n\n".join(_paragraphs(args, plan, outcome, comparisons)) + "\n", flush=True)
    # Every number is on the screen now; a file that can't be written costs a warning.
    extra = {"device": str(env.device), "world_size": env.world_size, "seconds": round(seconds, 1)}
    extra |= outcome.diagnostics | ({"published": comparisons} if comparisons else {})
    found, checkpoints = [*results, *outcome.reranked, *outcome.zero_shot], plan.folder / "checkpoints"
    if path := or_warn(lambda: write_results(found, checkpoints, args, plan.weights_sha256, extra), "results.jsonl"):
        print(f"Results: {path}")
    if outcome.ranked:
        or_warn(lambda: write_ranks(outcome.ranked, plan.folder / FILE), FILE)
    figure = None
    if outcome.diagnostics:
        figure = or_warn(lambda: draw(label_of(args), outcome.diagnostics), "the figures of the diagnostics")
        or_warn(lambda: _write_diagnostics(plan, outcome, figure), "the files of the diagnostics")
    if args.save_features:
        folder = plan.folder / "features"
        if or_warn(lambda: [write_features(r, folder) for r in outcome.ranked], "--save-features"):
            print(f"Features: {folder}")
    if args.report:
        facts = {} if args.features else {"precision": args.precision, "weights": (plan.weights_sha256 or "none")[:16]}
        content = (label_of(args), facts, outcome, figure, comparisons, env.device)
        if path := or_warn(lambda: write_report(plan.folder / "report.html", *content), "--report"):
            print(f"Report: {path}")


def _paragraphs(args: argparse.Namespace, plan: Plan, outcome: Outcome, comparisons: list[dict]) -> Iterator[str]:
    """Yields what is printed on the terminal."""
    results, label = [r.result for r in outcome.ranked], label_of(args)
    if results:
        table = format_table([*results, *outcome.reranked])
        yield f"{label}, {args.precision}: recall in percent with 95% bootstrap intervals for R@1\n\n{table}"
        lists = "\n".join(describe_pairs(r.title, r.protocol, r.fingerprint) for r in results)
        yield f"Protocols, and hashes of the exact lists of images and captions:\n{lists}"
    if comparisons:
        model = comparisons[0]["model"]
        table = format_rows(published_rows(comparisons), num_left=2, maxcolwidths=[None] * 6 + [60])
        yield f"Published numbers of {model} (R@1, percent):\n\n{table}"
        if reasons := explain(comparisons, results, plan.published):
            yield "\n  ".join(["Possible explanations of differences larger than the interval:", *reasons])
    elif args.published and results:
        logging.warning(f"--published {args.published}: there are no published numbers for the protocols of this run.")
    if outcome.zero_shot:
        heading = f"{label}, {args.precision}: accuracy in percent, {outcome.zero_shot[0].prompts}"
        yield f"{heading}\n\n{format_table(outcome.zero_shot)}"
    missing = {r.result.key: describe_missing(r.pairs) for r in outcome.ranked if r.pairs.missing}
    for r in [*results, *outcome.zero_shot]:
        if not r.is_complete:
            some = r.num_missing or r.num_broken
            left_out = f" ({r.num_missing:,} missing, {r.num_broken:,} unreadable)" if some else ""
            number = of_expected(r.num_pairs, r.num_expected)
            lines = [f"{r.title}: {number} {r.unit}{left_out}; not comparable with the full benchmark."]
            yield "\n".join(lines + ([missing[r.key]] if r.key in missing else []))
    if outcome.diagnostics:
        yield f"Recall with changed captions (percent and points):\n\n{format_diagnostics(outcome.diagnostics)}"


def _write_diagnostics(plan: Plan, outcome: Outcome, figure: Figure | None) -> None:
    if figure:
        figure.drawing.savefig(plan.folder / figure.file, dpi=120)
        print(f"{figure.title}: {plan.folder / figure.file}")
    if "diagnostics" in outcome.diagnostics and (not figure or figure.title != CARD):
        print("No long-text card: with fewer than 10 right answers on every benchmark, the model is at chance level.")
    path, rows = plan.folder / "cut_captions.csv", []
    for r in outcome.ranked:
        for row in (r.lost_tokens > 0).nonzero()[:, 0].tolist():
            name = r.pairs.image_paths[r.pairs.image_of_caption[row]].name
            rows.append([r.pairs.title, row + 1, name, int(r.lost_tokens[row]), r.pairs.captions[row]])
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        csv.writer(file).writerows([["benchmark", "caption_number", "image", "lost_tokens", "caption"], *rows])
    print(f"Captions that the tokenizer truncates: {len(rows):,}, listed in {path}")
