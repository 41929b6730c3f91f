"""`prepare inspect`: counts the content of shards or tables, with the tokenizer that training will use.

Processes count one part each, and their counts are added up. The result depends neither on the number of processes nor
on the order.
"""

import argparse
from functools import partial
from pathlib import Path

from training.model.assembly.factory import get_tokenizer
from training.prepare.inspect.counts import BROKEN, Counts, Data, count_part, open_parts
from training.prepare.inspect.report import describe, summarise, write_html
from training.prepare.work import items_of_job, processes, write_json


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 0, or 1 if shards can't be read to their end."""
    data = Data(args.shards, args.csv_img_key, args.csv_separator, args.caption_keys or ())
    parts, places = open_parts(data)
    chosen = items_of_job(range(len(parts)), args.shard_range, {})
    tokenizer = get_tokenizer(args.model, cache_dir=args.cache_dir)
    lengths = sorted({*args.context_lengths, tokenizer.context_length})
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    total, broken, miscounted = Counts(), [], {}
    rules = {"lists": args.caption_lists, "tokenizer": (args.model, args.cache_dir), "read_images": args.read_images}
    count = partial(count_part, data=data, **rules, show=args.show, seed=args.seed)
    with processes(args.workers) as parallel:
        for number, counts in parallel(count, chosen, len(chosen), "counting", "part"):
            total.add(counts, args.show)
            name, size, found = parts[number].name, parts[number].size, counts.numbers["samples",]
            if any(counts.numbers["bad", kind] for kind in BROKEN):
                broken.append(name)
            if size not in (None, found):
                miscounted[name] = {"sizes.json": size, "samples": found}
    if args.shard_range:  # numbers of shards, or of parts of tables
        places = {kind: min(number, len(chosen)) for kind, number in places.items()}
    report = places | {"broken_shards": sorted(broken)} | summarise(total, lengths)
    report |= {"miscounted": dict(sorted(miscounted.items())), "model": args.model}
    write_json(out / "inspect.json", report | {"context_length": tokenizer.context_length})
    write_html(out / "samples.html", total.picked, args.shards)
    print(f"{describe(report)}\n{out}: inspect.json, samples.html ({len(total.picked)} samples)")
    return 1 if broken else 0
