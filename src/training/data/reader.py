"""From a raw sample to pixels and texts: decode, augment, choose captions."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import torch

from training.data.captions import CaptionRule, choose_captions
from training.data.images import ImageReader
from training.readers import captions
from training.readers.faults import BadSample
from training.readers.images import load_rgb
from training.readers.samples import RawSample
from training.runtime.experiment import Experiment, Reading

FIELD = "field."  # begins the names of inputs that are for the loss alone, see `Experiment.sample_fields`


class Sample(NamedTuple):
    """One row of a batch before it is tokenised.

    Attributes:
        inputs: ``image`` [3, H, W], or the cached ``image_features`` [dim]; and the experiment's fields.
        texts: the texts that the caption rule chose, the short caption first.
        fronts: for each text the fraction of its padding that is put in front, see `pad_in_front`.
        record: everything in the sample's JSON or row.
    """

    inputs: dict[str, torch.Tensor]
    texts: list[str]
    fronts: list[float]
    record: dict


@dataclass(frozen=True)
class SampleReader:
    """Turns a raw sample into pixels and texts.

    Random choices depend on the seed, the epoch, the sample's key, and how often the sample was read before in the
    epoch.

    Attributes:
        images: reads an image file and transforms it to [3, H, W].
        tokenizer: function from texts to token ids.
        rule: which captions to choose.
        seed, epoch: seed of augmentation and caption choice.
        arrange: function of (short ids [batch, L], long ids [batch, K, L]) that packs captions; None pads them.
        experiment: may change the texts and add fields.
        step: optimizer steps done before the first batch.
        accum_freq: batches of a step.
    """

    images: ImageReader
    tokenizer: Callable
    rule: CaptionRule
    seed: int
    epoch: int
    arrange: Callable | None = None
    experiment: Experiment = Experiment(None)
    step: int = 0
    accum_freq: int = 1

    def __call__(self, raw: RawSample, times_read: int = 0, step: int = 0) -> Sample:
        """Decodes and augments the image, and chooses captions.

        Args:
            raw: the sample.
            times_read: how often it was read before in this epoch; each time has another crop and other captions.
            step: optimizer steps done before its batch.

        Raises:
            BadSample: the sample can't be used.
        """
        key = raw.name + (f"/again {times_read}" if times_read else "")
        seed_augmentation(f"{self.seed}/{self.epoch}/{key}")
        record = read_record(raw)
        at = Reading(self.epoch, step, raw.source, random.Random(f"{self.seed}/{self.epoch}/{key}/views"))
        texts = self.experiment.views(choose_captions(record, self.rule, random), record, at)
        if not all(map(captions.is_unicode, texts)):
            raise BadSample("text not UTF-8")
        fronts = front_fractions(f"{self.seed}/{self.epoch}/{key}", self.rule)
        if raw.features is not None:
            view = random.randrange(len(raw.features))
            inputs = {"image_features": torch.from_numpy(raw.features[view].astype(np.float32))}
        else:
            inputs = {"image": self.images.transform(read_image(raw, self.images.decode))}
        fields = self.experiment.sample_fields(record, texts)
        inputs |= {FIELD + name: value for name, value in fields.items()}
        return Sample(inputs, texts, [*fronts, *[0.0] * (len(texts) - len(fronts))], record)


def read_record(raw: RawSample) -> dict:
    """Returns the captions of a sample by key, together with all other entries of its JSON file or row.

    Raises:
        BadSample: the sample has a fault, its JSON is broken or not an object, or a text is not UTF-8.
    """
    if raw.fault:
        raise BadSample(raw.fault)
    return raw.record | captions.read_record(raw.files)


def read_image(raw: RawSample, decode: Callable = load_rgb) -> Any:
    """Returns the output of `decode` for a sample's image.

    Raises:
        BadSample: there is no image, or it can't be decoded.
    """
    image = raw.image_path if raw.image is None else raw.image
    if image is None:
        raise BadSample("no image")
    return decode(image)


def seed_augmentation(name: str) -> None:
    """Seeds all random streams that image transforms use; the streams of GPUs are not changed."""
    number = int.from_bytes(sha256(name.encode()).digest()[:8], "big")
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.default_generator.manual_seed(number % 2**63)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restores the process's random streams afterwards: without workers, loading must not disturb dropout."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


def tokenise(tokenizer: Callable, texts: list[str], fronts: Sequence[float] = ()) -> tuple[torch.Tensor, int]:
    """Tokenises n texts.

    Args:
        tokenizer: the model's tokenizer.
        texts: n texts.
        fronts: for each text the fraction of its padding that is put in front, see `pad_in_front`.

    Returns:
        Token ids [n, length], where length is that of the longest text; and the number of tokens that are not padding.
    """
    ids = tokenizer(texts)
    return trim_padding(tokenizer, pad_in_front(ids, fronts) if any(fronts) else ids)


def trim_padding(tokenizer: Callable, ids: torch.Tensor, multiple: int = 8) -> tuple[torch.Tensor, int]:
    """Cuts off the padding that all texts share.

    Args:
        tokenizer: the tokenizer that made the ids. Only the ids of our own tokenizers are cut, because others may put
            tokens at the end of a row.
        ids: [n, context_length].
        multiple: the new length is a multiple of it, or the context length, to keep the number of shapes small.

    Returns:
        Ids [n, length], and the number of tokens that are not padding.
    """
    pad_id = getattr(tokenizer, "pad_id", getattr(getattr(tokenizer, "tokenizer", None), "pad_token_id", 0))
    lengths = (ids != pad_id).sum(dim=1)
    if hasattr(tokenizer, "pad_id"):
        # CLIP's padding is also the id of an exclamation mark, so the last token decides.
        lengths = ((ids != pad_id) * torch.arange(1, ids.shape[1] + 1)).amax(dim=1)
        ids = ids[:, : min(ids.shape[1], -(-int(lengths.max()) // multiple) * multiple)].contiguous()
    return ids, int(lengths.sum())


def front_fractions(name: str, rule: CaptionRule) -> list[float]:
    """Draws, for each text of a sample, the fraction of its padding that is put in front of it.

    Args:
        name: seed of the draws.
        rule: says which texts are padded in front.

    Returns:
        For each text a fraction, 0 <= fraction < 1; 0 for texts that are not padded in front.
    """
    rng = random.Random(f"{name}/front")
    return [rng.random() if entry.front else 0.0 for entry in rule.texts]


def pad_in_front(ids: torch.Tensor, fractions: Sequence[float]) -> torch.Tensor:
    """Moves padding from behind the text to between its start token and its first word.

    Of f padding tokens, floor(fraction x (f + 1)) are moved: 0 to f with equal probability.

    Args:
        ids: int64 [n, context_length] from CLIP's tokenizer, padded with 0.
        fractions: for each row the fraction of its padding to move, 0 <= fraction < 1.

    Returns:
        int64 [n, context_length].

    Source: DeBias-CLIP (CVPR 2026) as other papers describe it; see src/training/recipes/debias-clip.yaml.
    """
    positions = torch.arange(ids.shape[1])
    lengths = ((ids != 0) * (positions + 1)).amax(dim=1)
    fronts = (torch.tensor(fractions, dtype=torch.float64) * (ids.shape[1] - lengths + 1)).long()
    sources = positions - fronts[:, None]
    moved = ids.gather(1, sources.clamp(min=0))
    moved[(sources < 1) & (positions > 0)] = 0
    moved[:, 0] = ids[:, 0]
    return moved
