"""Checks the first samples of a source before a model is built, to find mistakes in flags or data early."""

import logging
import random
from collections import Counter

from training.data.captions import CaptionRule, choose_captions, find_captions
from training.data.reader import read_image, read_record
from training.data.shards import Source
from training.readers.faults import BadSample
from training.readers.samples import OF_ONE_SAMPLE, SEVERAL_LINES

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
    has_short, has_long, num_usable, num_with_lines = False, False, 0, 0
    keys, kinds, reasons = set(), Counter(), []
    for raw in source.read(0, 0, min(NUM_LOOKED_AT, source.num_samples)):
        try:
            record = read_record(raw)
            if raw.features is None and raw.image_path is None and raw.image is None:
                raise BadSample("no image")
            keys |= set(record)
            _, shorts, longs = find_captions(record, rule)
            has_short, has_long = has_short or bool(shorts), has_long or bool(longs)
            num_with_lines += "txt" in raw.files and "\n" in str(record["txt"]).strip()
            choose_captions(record, rule, random.Random(0))
            if not num_usable and raw.features is None:  # one image that can be decoded is enough
                read_image(raw)
            num_usable += 1
        except BadSample as error:
            kinds[error.kind] += 1
            reasons.append(f"{raw.name}: {error}")
    if not num_usable and set(kinds) != {"no caption"}:
        counts = [f"{count:,} {kind}" for kind, count in sorted(kinds.items())]
        found = ", ".join(counts) if len(counts) > 1 else min(kinds)
        more = f" ({reasons[0]})" if set(kinds) != {"no image", "no caption"} else f"; {OF_ONE_SAMPLE}"
        raise ValueError(f"{spec}: none of the first {kinds.total()} samples can be read: {found}{more}")
    if num_with_lines and not rule.lines:
        logging.warning(f"{spec}: {num_with_lines:,} of the first samples have {SEVERAL_LINES}")
    found = f"the first samples have {', '.join(sorted(keys)) or 'no captions'}"
    wants_long = rule.num_long_used > 0
    if not has_short and not (wants_long and has_long):
        wanted = ", ".join((*rule.raw_keys, *rule.short_keys))
        raise ValueError(f"{spec}: no short caption under {wanted} (--raw-caption-keys); {found}")
    if wants_long and not has_long:
        raise ValueError(
            f"{spec}: no long caption under {', '.join(rule.long_keys)} (--long-caption-keys); {found}. "
            "To train on short captions alone, add --captions raw"
        )
