"""Checks the first samples of a source before a model is built, to find mistakes in flags or data early."""

import logging
import random
from collections import Counter

from training.data.captions import CaptionRule, NoCaptionError, captions_found, choose_captions
from training.data.faults import BadSample
from training.data.reader import read_image, read_record
from training.data.shards import Source
from training.readers.samples import BrokenShardError, RawSample

NUM_LOOKED_AT = 100


def check_first_samples(source: Source, rule: CaptionRule, spec: str) -> None:
    """Checks that the first samples can be read and have the captions that the rule needs.

    Args:
        source: the samples.
        rule: the captions to look for.
        spec: value of the flag that names the source, for messages.

    Raises:
        ValueError: there is no sample, none of the first `NUM_LOOKED_AT` can be used, or none has the captions.
    """
    if not source.num_samples:
        raise ValueError(f"{spec}: no samples in it")
    has_short = has_long = num_usable = num_with_lines = 0
    keys, kinds, reasons = set(), Counter(), []
    for raw in source.read(0, 0, min(NUM_LOOKED_AT, source.num_samples)):
        try:
            record = _record(raw)
            keys |= set(record)
            short, long = captions_found(record, rule)
            has_short, has_long = has_short + short, has_long + long
            num_with_lines += "txt" in raw.files and "\n" in str(record["txt"]).strip()
            choose_captions(record, rule, random.Random(0))
            if not num_usable and raw.features is None:  # one image that can be decoded is enough
                read_image(raw)
            num_usable += 1
        except (BadSample, BrokenShardError, NoCaptionError) as error:
            kind = error.kind if isinstance(error, BrokenShardError) else str(error)
            kinds[kind] += 1
            where = "" if isinstance(raw, BrokenShardError) else f"{raw.source}/{raw.key}: "
            reasons.append(f"{where}{error.__cause__ or kind}" if where else str(error))
    if not num_usable and set(kinds) != {"no caption"}:
        found = _describe(kinds, reasons[0])
        raise ValueError(f"{spec}: none of the first {kinds.total()} samples can be read: {found}")
    if num_with_lines and not rule.lines:
        logging.warning(
            f"{spec}: {num_with_lines:,} of the first samples have a .txt of several lines; each file is one caption. "
            "If each line is a caption of its own, add --caption-lines"
        )
    there = f"the first samples have {', '.join(sorted(keys)) or 'no captions'}"
    wants_long = rule.num_long_used > 0
    if not has_short and not (wants_long and has_long):
        asked = ", ".join((*rule.raw_keys, *rule.short_keys))
        raise ValueError(f"{spec}: no short caption under {asked} (--raw-caption-keys); {there}")
    if wants_long and not has_long:
        raise ValueError(
            f"{spec}: no long caption under {', '.join(rule.long_keys)} (--long-caption-keys); {there}. "
            "To train on short captions alone, add --captions raw"
        )


def _record(raw: RawSample | BrokenShardError) -> dict:
    """Returns the captions of a sample; raises if the sample has no image."""
    if isinstance(raw, BrokenShardError):
        raise raw
    record = read_record(raw)
    if raw.features is None and raw.image_path is None and raw.image is None:
        raise BadSample("no image")
    return record


def _describe(kinds: Counter, reason: str) -> str:
    if set(kinds) == {"no image", "no caption"}:
        return f"{_counts(kinds)}; the files of a sample must be next to each other in the tar: tar --sort=name"
    return f"{_counts(kinds)} ({reason})"


def _counts(kinds: Counter) -> str:
    if len(kinds) == 1:
        return next(iter(kinds))
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
