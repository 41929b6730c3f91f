"""From flags to data: opens and checks the source that --train-data or --val-data names."""

import argparse
import logging
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from open_clip.tokenizer import SimpleTokenizer

from training.data.captions import CaptionRule, choose_captions, find_captions
from training.data.images import IN_TRAINING, ImageReader, without_normalisation
from training.data.loader import make_loader
from training.data.order import Share
from training.data.reader import SampleReader, read_image, read_record
from training.data.shards import ShardSource, Source, StreamedShards
from training.data.sizes import count_samples, expand_sources, trusted_sizes
from training.data.synthetic import SyntheticSource, is_synthetic
from training.data.tables import embedded_sources, read_tables, warn_of_repeated_images
from training.readers.faults import BadSample
from training.readers.files import naming
from training.readers.images import load_rgb
from training.readers.samples import OF_ONE_SAMPLE, SEVERAL_LINES
from training.readers.table_files import local_spec, names_tables, table_files
from training.runtime.distributed import DistEnv, on_main_rank
from training.runtime.experiment import Experiment
from training.runtime.workers import Loader

NUM_LOOKED_AT = 100
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainData:
    """A source of samples, with everything needed to make batches of it.

    Attributes:
        source: the samples.
        reader: turns a raw sample of epoch 0 into pixels and texts.
        workers: number of loader processes.
    """

    source: Source
    reader: SampleReader
    workers: int

    def loader(self, epoch: int, share: Share, pin: bool, refill: bool = True, step: int = 0) -> Loader:
        """Returns the batches of an epoch for one process after `step` steps; for `refill` see `TrainBatches`."""
        reader = replace(self.reader, epoch=epoch, step=step)
        return make_loader(self.source, reader, share, self.workers, pin, refill)


def caption_rule(args: argparse.Namespace) -> CaptionRule:
    """Returns the rule that the flags describe."""
    return CaptionRule(**{field.name: getattr(args, field.name) for field in fields(CaptionRule)})


def open_source(
    args: argparse.Namespace, flag: str, spec: str, rule: CaptionRule, env: DistEnv, resampled: bool = False
) -> Source:
    """Opens data on every rank; rank 0 looks for files, counts samples and checks captions.

    Args:
        args: the parsed flags; those about tables, order and upsampling factors are used.
        flag: ``--train-data`` or ``--val-data``, for messages.
        spec: the flag's value.
        rule: the captions to look for.
        env: this process.
        resampled: draw shards with replacement.

    Raises:
        FileNotFoundError, ValueError: raised on all ranks; the message names what is missing or wrong.
    """

    with naming(flag):
        return _open(args, flag, spec, rule, env, resampled)


def _open(args: argparse.Namespace, flag: str, spec: str, rule: CaptionRule, env: DistEnv, resampled: bool) -> Source:
    on_main_rank(lambda: local_spec(spec), env)  # downloads before the others look
    spec = local_spec(spec)
    embedded = on_main_rank(lambda: embedded_sources(spec, args.csv_img_key), env)
    is_table, keys = names_tables(spec), ((*rule.raw_caption_keys, *rule.short_caption_keys), rule.long_caption_keys)
    found = "synthetic" if is_synthetic(spec) else "csv" if is_table else "webdataset"
    if args.dataset_type not in ("auto", found):
        raise ValueError(f"{spec}: of type {found}, not --dataset-type {args.dataset_type}; use auto")
    if found == "synthetic":
        return SyntheticSource(spec, args.train_num_samples, args.seed, keys)
    has_paths = is_table and not embedded
    if has_paths and resampled:
        raise ValueError(f"{spec}: each row of a table is used once per epoch; --dataset-resampled is for shards")

    def opened() -> Source:
        if has_paths:
            return read_tables(table_files(spec), args.csv_img_key, sum(keys, ()), args.csv_separator, args.seed)
        return _open_shards(args, flag, embedded or expand_sources(spec), resampled)

    source = None
    if env.is_main:
        source = opened()
        check_first_samples(source, rule, spec)
        if embedded:
            warn_of_repeated_images(embedded[0][0])
        if not resampled and not isinstance(source, StreamedShards):
            total = source.num_samples + source.num_left_out
            logger.info(f"{flag} {spec}: {source.num_samples:,} samples of {total:,} there are")
    # A table is too large to send to other ranks, so they read it as well.
    shared = on_main_rank(lambda: None if has_paths else source, env)
    return source or shared or opened()


def _open_shards(args: argparse.Namespace, flag: str, sources: list[list[str]], resampled: bool) -> Source:
    urls = [url for shards in sources for url in shards]
    order = {"window": args.shuffle_window, "lanes": args.shuffle_shards}
    of_training = flag == "--train-data"
    sizes = trusted_sizes(urls, args.train_sizes if of_training else None)
    factors = _factors(args.train_data_upsampling_factors, len(sources))
    weights = [factor for factor, shards in zip(factors, sources) for _ in shards]
    pipe = next((url for url, size in zip(urls, sizes) if size is None and url.startswith("pipe:")), None)
    if pipe and of_training and args.train_num_samples:
        logger.warning(
            f"{flag} {pipe}: number of samples unknown, so shards are drawn with replacement and always read from "
            "their beginning, whose samples come more often; add --train-sizes FILE to read each sample once per epoch"
        )
        return StreamedShards(urls, weights, args.train_num_samples, args.seed, **order)
    drawn = {"factors": weights, "num_drawn": args.train_num_samples} if resampled else {}
    counted = count_samples(urls, sizes, args.index_cache, run_pipes=not of_training)
    return ShardSource(urls, counted, args.seed, **order, index_cache=args.index_cache, **drawn)


def open_train_data(
    args: argparse.Namespace,
    transform: Callable,
    tokenizer: Callable,
    source: Source,
    arrange: Callable | None = None,
    experiment: Experiment = Experiment(None),
) -> TrainData:
    """Combines a source with the reader of its samples.

    Args:
        args: the parsed flags.
        transform: function from PIL image to [3, H, W].
        tokenizer: function from a list of texts to token ids.
        source: the samples.
        arrange: function that packs the captions of a batch; None pads them.
        experiment: may change the transform, the texts and the order, and add fields.

    Raises:
        ValueError: a view needs padding in front of the text, and the tokenizer doesn't support that.
    """
    decoding = args.image_decoding or IN_TRAINING
    transform = without_normalisation(experiment.image_transform(transform))
    images = ImageReader(transform, decoding, args.exif_rotation != "off")
    rule = caption_rule(args)
    clips = isinstance(getattr(tokenizer, "tokenizer", tokenizer), SimpleTokenizer)
    if any(entry.front for entry in rule.entries) and not clips:
        raise ValueError(
            "--text-views pad=front: this model's text tower ignores padding; use a model with CLIP's tokenizer, such "
            "as ViT-B-16, or leave pad=front out"
        )
    reader = SampleReader(images, tokenizer, rule, args.seed, 0, arrange, experiment, 0, args.accum_freq)
    return TrainData(source, reader, args.workers)


def _factors(text: str | None, num_sources: int) -> list[float]:
    if not text:
        return [1.0] * num_sources
    try:
        factors = [float(word) for word in text.split("::")]
    except ValueError:
        factors = []
    if len(factors) != num_sources or min(factors) < 0 or not sum(factors):
        raise ValueError(
            f"--train-data-upsampling-factors {text}: expected {num_sources} numbers separated by ::, one for each "
            "source, none negative and not all 0"
        )
    return factors


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
    keys, kinds, reasons = set[str](), Counter[str](), list[str]()
    for raw in source.read(0, 0, min(NUM_LOOKED_AT, source.num_samples)):
        try:
            record = read_record(raw)
            if raw.features is None:  # one image that can be decoded is enough
                read_image(raw, bool if num_usable else load_rgb)
            keys |= set(record)
            _, shorts, longs = find_captions(record, rule)
            has_short, has_long = has_short or bool(shorts), has_long or bool(longs)
            num_with_lines += "txt" in raw.files and "\n" in str(record["txt"]).strip()
            choose_captions(record, rule, random.Random(0))
            num_usable += 1
        except BadSample as error:
            kinds[error.kind] += 1
            reasons.append(f"{raw.name}: {error}")
    if not num_usable and set(kinds) != {"no caption"}:
        counts = [f"{count:,} {kind}" for kind, count in sorted(kinds.items())]
        found = ", ".join(counts) if len(counts) > 1 else min(kinds)
        more = f" ({reasons[0]})" if set(kinds) != {"no image", "no caption"} else f"; {OF_ONE_SAMPLE}"
        raise ValueError(f"{spec}: none of the first {kinds.total()} samples can be read: {found}{more}")
    if num_with_lines and not rule.caption_lines:
        logging.warning(f"{spec}: {num_with_lines:,} of the first samples have {SEVERAL_LINES}")
    found = f"the first samples have {', '.join(sorted(keys)) or 'no captions'}"
    wants_long = rule.num_long_used > 0
    if not has_short and not (wants_long and has_long):
        wanted = ", ".join((*rule.raw_caption_keys, *rule.short_caption_keys))
        raise ValueError(f"{spec}: no short caption under {wanted} (--raw-caption-keys); {found}")
    if wants_long and not has_long:
        raise ValueError(
            f"{spec}: no long caption under {', '.join(rule.long_caption_keys)} (--long-caption-keys); {found}. "
            "To train on short captions alone, add --captions raw"
        )
