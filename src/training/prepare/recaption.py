"""`prepare recaption`: writes long captions for images in shards with a vision-language model.

The captions of a shard are first kept in a file beside the new shards, batch by batch, so that none has to be generated
twice. Then they are added to the shard's JSON files as in `prepare join`.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import yaml
from PIL import Image

from training.data.reader import read_image
from training.prepare.clean import clean_caption, is_repetitive, without_cut_sentence
from training.prepare.engines import Generated, TransformersEngine, VllmEngine, make_engine
from training.prepare.job import ShardJob
from training.prepare.shards import Shard, plain_tar, read_json_samples, rewrite_shard
from training.prepare.work import add_counts, format_counts, processes, progress
from training.readers.faults import FAULT_KINDS, BadSample
from training.readers.files import parallel_map
from training.readers.images import load_rgb
from training.readers.samples import RawSample, read_samples
from training.runtime.files import atomic_write

Engine = TransformersEngine | VllmEngine
PROMPTS: dict[str, str] = yaml.safe_load(Path(__file__).with_name("prompts.yaml").read_text(encoding="utf-8"))
SAMPLE_KINDS = ("samples", *FAULT_KINDS)
CAPTION_KINDS = ("captions", "refused", "repetitive", "empty", "cut short")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 0, or 1 if shards can't be read."""
    prompts = read_prompts(args.caption)
    job = ShardJob(args, args.shards, "SHARDS", ".recaption")
    settings = {"vlm": args.vlm, "prompts": prompts, "max_tokens": args.max_tokens}
    counts = {"captions": {key: dict.fromkeys(CAPTION_KINDS, 0) for key in prompts}}
    left = job.left(settings, dict.fromkeys(SAMPLE_KINDS, 0) | counts)
    if left:
        engine = make_engine(args)
        batch_size = args.batch_size or engine.batch_size
        recaption = partial(
            recaption_shard, engine=engine, prompts=prompts, batch_size=batch_size, fingerprint=job.fingerprint
        )
        with processes(1) as parallel:
            job.write(parallel, recaption, left, "captioning")
    total = job.total
    faults = {kind: total[kind] for kind in SAMPLE_KINDS[1:]}
    lines = [f"{total['samples']:,} samples; bad: {format_counts(faults)}"]
    lines += [f"{key}: {format_counts(counts)}" for key, counts in total["captions"].items()]
    return job.finish({"prompts": prompts, "vlm": args.vlm}, lines)


def read_prompts(pairs: list[str]) -> dict[str, str]:
    """Parses ``KEY=detailed`` or ``KEY=Some text.`` to a dict of key -> prompt.

    Raises:
        ValueError: a text has another form, or a key is given twice.
    """
    prompts = {}
    for pair in pairs:
        key, equals, prompt = pair.partition("=")
        if not equals or not key or not prompt:
            raise ValueError(f"--caption {pair}: expected KEY=PROMPT, a text or one of {', '.join(PROMPTS)}")
        if key in prompts:
            raise ValueError(f"--caption {key}: given twice")
        prompts[key] = PROMPTS.get(prompt, prompt)
    return prompts


def recaption_shard(shard: Shard, engine: Engine, prompts: dict[str, str], batch_size: int, fingerprint: str) -> dict:
    """Writes one shard with the captions of a model.

    Args:
        shard: the shard, and where to write it.
        engine: the model.
        prompts: key -> prompt.
        batch_size: number of images per call of the model.
        fingerprint: of model and prompts; captions with another one are generated again.

    Returns:
        Counts of `SAMPLE_KINDS`, and under ``captions`` for each key counts of `CAPTION_KINDS`.

    Raises:
        OSError: the shard can't be read or written.
    """
    written = shard.state / "captions" / f"{shard.target.name}.{fingerprint}.jsonl"
    with plain_tar(shard) as path:
        samples = read_json_samples(path)  # raises for a broken shard, before the model spends time on it
        whole_lines = written.read_text(encoding="utf-8").split("\n")[:-1] if written.exists() else []
        lines, keys = list(map(json.loads, whole_lines)), [sample.key for sample in samples]
        if [line["key"] for line in lines] != keys[: len(lines)]:
            lines = []
        if len(lines) < len(keys):
            lines = lines[: len(lines) // batch_size * batch_size]  # a batch gives the same captions only as a whole
            with atomic_write(written) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            with open(written, "a", encoding="utf-8") as file:
                raw = progress(read_samples(str(path), len(lines)), len(keys) - len(lines), written.name, "image")
                for batch in caption_samples(raw, engine, prompts, batch_size):
                    file.write("".join(json.dumps(line) + "\n" for line in batch))
                    file.flush()  # a killed job loses no more than this batch
                    lines += batch
        counts: dict = {"samples": len(lines), "captions": {}}
        additions = []
        for line, sample in zip(lines, samples, strict=True):
            if fault := line["fault"] or sample.fault:
                add_counts(counts, {fault: 1})
            add_counts(counts["captions"], {key: Counter(kinds) for key, kinds in line["kinds"].items()})
            additions.append({} if sample.fault else line["captions"])
        rewrite_shard(path, shard.target, samples, additions)
    return counts


def caption_samples(
    samples: Iterable[RawSample], engine: Engine, prompts: dict[str, str], batch_size: int
) -> Iterator[list[dict]]:
    """Yields for each batch of samples, in order, the captions and faults of each as the dict to write to the file.

    The images of the next batch are decoded while the model works.
    """
    for batch, images in _decoded(samples, batch_size):
        good = [image for image, fault in images if not fault]
        lines: list[dict] = [
            {"key": sample.key, "fault": fault, "captions": {}, "kinds": {}}
            for sample, (_, fault) in zip(batch, images)
        ]
        for key, prompt in prompts.items():
            answers = iter(engine.caption(good, prompt) if good else [])
            for line in lines:
                if line["fault"]:
                    continue
                text, kinds = judge(next(answers))
                line["kinds"][key] = kinds
                if text:
                    line["captions"][key] = text
        yield lines


def _decoded(samples: Iterable[RawSample], batch_size: int) -> Iterator[tuple[list[RawSample], list[tuple]]]:
    samples = iter(samples)

    def read() -> tuple[list[RawSample], list[tuple]]:
        batch = list(islice(samples, batch_size))
        return batch, parallel_map(_image, batch)

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(read)
        while (ready := coming.result())[0]:
            coming = pool.submit(read)
            yield ready


def _image(sample: RawSample) -> tuple[Image.Image | None, str | None]:
    """Returns (image, None), or (None, one of training's kinds of fault)."""
    if sample.fault:
        return None, sample.fault
    try:
        return read_image(sample, partial(load_rgb, upright=True)), None
    except BadSample as error:
        return None, error.kind


def judge(answer: Generated) -> tuple[str | None, list[str]]:
    """Decides which part of an answer to keep as a caption.

    Returns:
        (the caption or None, the `CAPTION_KINDS` to count). An incomplete answer loses its last sentence.
    """
    kinds = [] if answer.complete else ["cut short"]
    cleaned = clean_caption(answer.text)
    if cleaned.text is None:
        return None, [cleaned.fault or "empty", *kinds]
    if is_repetitive(cleaned.text):
        return None, ["repetitive", *kinds]
    return (cleaned.text if answer.complete else without_cut_sentence(cleaned.text)), ["captions", *kinds]
