"""Runs one evaluation from start to end: check, build, encode, rank, report."""

import argparse
import itertools
import logging
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from dataloaders.pairs import describe_completeness, describe_missing
from training.data.images import IN_EVALUATION
from training.eval.changes import Questions
from training.eval.diagnostics import diagnose
from training.eval.encode import ComputeOptions
from training.eval.npz import check_text_model, read_features, write_features
from training.eval.published import (
    Comparison,
    PublishedNumber,
    compare_with_published,
    explain,
    find_published,
    format_published,
    to_json,
)
from training.eval.record import ClassificationResult, RetrievalResult, describe_pairs
from training.eval.report.ranks import FILE, write_cut_captions, write_ranks
from training.eval.rerank import rerank_sets
from training.eval.results import (
    format_markdown,
    format_protocols,
    format_table,
    format_zero_shot,
    label_of,
    run_name,
    write_results,
)
from training.eval.retrieval import EncodedSet, RankedSet, RetrievalWork, encode_sets, plan_benchmarks, rank_set
from training.eval.zero_shot import evaluate_zero_shot
from training.flags.effects import asks_about_texts
from training.model.assembly.factory import EncoderParts
from training.model.assembly.from_flags import build_from_flags, check_pooling, check_precision
from training.model.names.files import file_sha256
from training.model.names.resolve import resolve_weights
from training.readers.images import BrokenImageError
from training.runtime.distributed import DistEnv, failing_with, on_main_rank
from training.runtime.lease import Lease
from training.runtime.messages import or_warn
from training.runtime.watchdog import BUILDING, EVALUATING, joined_ranks

CARD = ("Long-text card", "long_text_card.png")


@dataclass(frozen=True)
class Plan:
    """Result of rank 0's checks before a model is built; the same on every rank.

    Attributes:
        work: benchmarks; without retrieval sets if these are given as features.
        weights_sha256: hash of the weights file; None without weights.
        folder: folder of this run, LOGS/NAME.
        printed: published numbers of this model.
    """

    work: RetrievalWork
    weights_sha256: str | None
    folder: Path
    printed: list[PublishedNumber]


@dataclass(frozen=True)
class Outcome:
    """Everything that was measured, and its inputs."""

    ranked: list[RankedSet]
    zero_shot: list[ClassificationResult]
    reranked: list[RetrievalResult] = field(default_factory=list)
    diagnostics: dict[str, dict] = field(default_factory=dict)


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
        with failing_with(2, ValueError, OSError):
            plan = on_main_rank(lambda: _check(args, lease, env), env)
            watchdog.at(0, BUILDING)
            encoded = read_features(args.features) if args.features else None
            if args.dry_run:
                return _describe(args, plan, encoded, env)
            parts = None if encoded and not asks_about_texts(args) else _build(args, env)
        watchdog.at(0, EVALUATING)
        with failing_with(2, ValueError, OSError), failing_with(1, BrokenImageError, FloatingPointError):
            outcome = _measure(args, parts, plan.work, env, encoded)
        if env.is_main:
            _report(args, plan, outcome, env, time.monotonic() - start)
    return 0


def _check(args: argparse.Namespace, lease: Lease, env: DistEnv) -> Plan:
    """Checks flags and files before a model is built, and takes the lease of the run's folder. Rank 0 only.

    Raises:
        ValueError, FileNotFoundError: the message says what is wrong and what to do.
    """
    check_precision(args.precision, env.device)
    weights = None
    work = RetrievalWork([], {}) if args.features else plan_benchmarks(args)
    if not args.features or asks_about_texts(args):
        weights = resolve_weights(args.model, args.pretrained, args.cache_dir)
        if args.rerank:
            check_pooling(args.model, args.cache_dir)
        if weights is None:
            logging.warning(f"{args.model} is UNTRAINED: no weights are given, so its numbers are at chance level.")
    sha256 = file_sha256(weights) if weights else None
    printed = find_published(args.published, args.model, args.pretrained, sha256)
    name = args.name or (run_name("features") if args.features else run_name(args.model, args.precision))
    folder = Path(args.logs) / name
    for number in itertools.count(2):
        try:
            if not args.dry_run:  # a full or read-only disk is noticed now, not after an hour of encoding
                lease.take(folder / "checkpoints", f"--name {name}")
            return Plan(work, sha256, folder, printed)
        except ValueError:  # jobs that started in the same second have the same name unless they were given one
            if args.name:
                raise
            folder = Path(args.logs) / f"{name}-{number}"


def _describe(args: argparse.Namespace, plan: Plan, encoded: list[EncodedSet] | None, env: DistEnv) -> int:
    """Prints what would be evaluated, and under which protocol; returns exit code 0."""
    if not env.is_main:
        return 0
    sets = [s.pairs for s in encoded] if encoded else plan.work.sets
    for s in sets:
        print(f"{describe_completeness(s)[0]}\n  {describe_pairs(s.title, s.protocol, s.fingerprint())}")
    for s in plan.work.classification:
        print(f"{s.title}: {len(s.labels):,} of {max(s.num_published, len(s.labels)):,} images")
    images = set(plan.work.identity.values())
    captions = {caption for s in plan.work.sets for caption in s.captions}
    print(f"Model: {label_of(args)}, {args.precision}, weights {(plan.weights_sha256 or 'none')[:16]}")
    print(f"To encode: {len(images):,} distinct images and {len(captions):,} distinct captions")
    print(f"Dry run: nothing was encoded or written; results would go to {plan.folder}")
    return 0


def _build(args: argparse.Namespace, env: DistEnv) -> EncoderParts:
    parts = build_from_flags(args, env.device)
    _questions(args).checked(parts.tokenizer)  # raises now instead of after an hour of encoding
    return parts


def _questions(args: argparse.Namespace) -> Questions:
    return Questions(args.retrieval_lengths, args.retrieval_sentences, args.retrieval_sensitivity, args.diagnostics)


def _measure(
    args: argparse.Namespace,
    parts: EncoderParts | None,
    work: RetrievalWork,
    env: DistEnv,
    encoded: list[EncodedSet] | None,
) -> Outcome:
    """Encodes and ranks the benchmarks, and runs all analyses; with features in `encoded`, only changed captions are
    encoded.

    Raises:
        BrokenImageError: an image can't be read.
        FloatingPointError: the model returned NaN or infinity.
        ValueError: a cache is broken, or the features are those of another model.
    """
    options = ComputeOptions(
        args.batch_size,
        args.workers,
        args.precision,
        args.text_packing != "padded",
        args.text_batch_size,
        args.image_decoding or IN_EVALUATION,
        args.image_cache,
    )
    ranked, reranked, diagnostics = [], [], {}
    if encoded and parts:
        for one in encoded:
            check_text_model(parts, one, env, options)
    if encoded or work.sets:
        encoded = encoded or encode_sets(parts, work, env, options, args.allow_missing, args.feature_cache)
        ranked = [rank_set(one, env) for one in encoded]
        if args.rerank:
            reranked = rerank_sets(parts, ranked, args.rerank, env, options)
        if questions := _questions(args):
            diagnostics = diagnose(parts, ranked, questions.checked(parts.tokenizer), env, options, args.seed)
    zero_shot = evaluate_zero_shot(parts, work.classification, env, options, args.allow_missing, args.feature_cache)
    return Outcome(ranked, zero_shot, reranked, diagnostics)


def _report(args: argparse.Namespace, plan: Plan, outcome: Outcome, env: DistEnv, seconds: float) -> None:
    """Prints the tables and writes the run's files. Rank 0 only."""
    results = [r.result for r in outcome.ranked]
    extra = {"device": str(env.device), "world_size": env.world_size, "seconds": round(seconds, 1)}
    extra |= outcome.diagnostics
    comparisons = compare_with_published(results, plan.printed)
    extra |= {"published": to_json(comparisons)} if comparisons else {}
    found = [*results, *outcome.reranked, *outcome.zero_shot]
    label = label_of(args)
    if results:
        print(f"\n{label}, {args.precision}: recall in percent with 95% bootstrap intervals for R@1\n")
        print(format_table([*results, *outcome.reranked]))
        print(f"\nProtocols, and hashes of the exact lists of images and captions:\n{format_protocols(results)}")
    _show_published(args, plan, results, comparisons)
    if outcome.zero_shot:
        print(f"\n{label}, {args.precision}: accuracy in percent, {outcome.zero_shot[0].prompts}\n")
        print(format_zero_shot(outcome.zero_shot))
    _print_missing(outcome)
    if results:
        print(f"\nFor a README (R@1, I2T / T2I):\n\n{format_markdown(results, label)}")
    if outcome.diagnostics:
        print(f"\nRecall with changed captions (percent and points):\n\n{_format_diagnostics(outcome)}")
    print(flush=True)
    # Every number is on the screen now; a file that can't be written costs a warning.
    line = partial(write_results, found, plan.folder / "checkpoints", args, plan.weights_sha256, extra)
    if path := or_warn(line, "results.jsonl"):
        print(f"Results: {path}")
    if outcome.ranked:
        or_warn(lambda: write_ranks(outcome.ranked, plan.folder / FILE), FILE)
    if outcome.diagnostics:
        or_warn(lambda: _write_diagnostics(plan, outcome, label), "the figures of the diagnostics")
    if args.save_features:
        saved = or_warn(
            lambda: [write_features(r, plan.folder / "features") for r in outcome.ranked], "--save-features"
        )
        if saved:
            print(f"Features: {plan.folder / 'features'}")
    if args.report and (
        page := or_warn(partial(_write_page, args, plan, outcome, label, env, comparisons), "--report")
    ):
        print(f"Report: {page}")


def _show_published(
    args: argparse.Namespace, plan: Plan, results: list[RetrievalResult], comparisons: list[Comparison]
) -> None:
    if not comparisons:
        if args.published and results:
            logging.warning(
                f"--published {args.published}: there are no published numbers for the protocols of this run."
            )
        return
    print(f"\nPublished numbers of {comparisons[0].model} (R@1, percent):\n\n{format_published(comparisons)}")
    reasons = explain(comparisons, results, plan.printed, args.precision, args.image_decoding or IN_EVALUATION)
    if reasons:
        print("\nPossible explanations of differences larger than the interval:")
        print("\n".join(f"  {reason}" for reason in reasons))


def _format_diagnostics(outcome: Outcome) -> str:
    from training.eval.report.card import format_diagnostics

    return format_diagnostics(outcome.diagnostics)


def _write_diagnostics(plan: Plan, outcome: Outcome, label: str) -> None:
    drawn = _draw_diagnostics(outcome, label)
    if drawn:
        title, file, figure = drawn
        figure.savefig(plan.folder / file, dpi=120)
        print(f"{title}: {plan.folder / file}")
    if "diagnostics" in outcome.diagnostics and (not drawn or drawn[1] != CARD[1]):
        print("No long-text card: with fewer than 10 right answers on every benchmark, the model is at chance level.")
    path = plan.folder / "cut_captions.csv"
    number = write_cut_captions(outcome.ranked, path)
    print(f"Captions that the tokenizer truncates: {number:,}, listed in {path}")


def _draw_diagnostics(outcome: Outcome, label: str) -> tuple[str, str, object] | None:
    """Returns title, file name and figure; the curves alone if the model is at chance level; None without curves."""
    from training.eval.report.card import above_chance, draw_card

    found = outcome.diagnostics
    if above_chance(found.get("diagnostics", {})):
        return *CARD, draw_card(label, found)
    curves = {"lengths": found["lengths"]} if "lengths" in found else {}
    if any({"tokens", "sentences"} & kinds.keys() for kinds in curves.get("lengths", {}).get("sets", {}).values()):
        return "Recall with shortened captions", "lengths.png", draw_card(label, curves)
    return None


def _print_missing(outcome: Outcome) -> None:
    missing = {r.result.key: describe_missing(r.pairs) for r in outcome.ranked if r.pairs.missing}
    for result in [*(r.result for r in outcome.ranked), *outcome.zero_shot]:
        if not result.is_complete:
            left_out = ""
            if result.num_missing or result.num_broken:
                left_out = f" ({result.num_missing:,} missing, {result.num_broken:,} unreadable)"
            unit = "pairs" if isinstance(result, RetrievalResult) else "images"
            print(f"\n{result.title}: {result.pairs} {unit}{left_out}; not comparable with the full benchmark.")
            if result.key in missing:
                print(missing[result.key])


def _write_page(
    args: argparse.Namespace, plan: Plan, outcome: Outcome, label: str, env: DistEnv, comparisons: list[Comparison]
) -> Path:
    from training.eval.report.curves import to_svg  # imported here because matplotlib is slow to import
    from training.eval.report.page import write_report

    figures = []
    if outcome.diagnostics and (drawn := _draw_diagnostics(outcome, label)):
        figures.append((drawn[0], _format_diagnostics(outcome), to_svg(drawn[2])))
    facts = {"precision": args.precision, "weights": (plan.weights_sha256 or "none")[:16]}
    return write_report(
        plan.folder / "report.html",
        label,
        {} if args.features else facts,
        outcome.ranked,
        outcome.zero_shot,
        figures,
        comparisons,
        env.device,
    )
