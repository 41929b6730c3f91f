"""Samples made on the spot, to measure the speed of a training without data: ``--train-data synthetic[:TOKENS]``."""

import io
import random
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from training.readers.samples import Part, RawSample

NAME = "synthetic"
NUM_SAMPLES = 100_000
SHORT_TOKENS, LONG_TOKENS = 18, 110  # means of the published short and long captions
IMAGE_SIZE = 256
# One token each in the vocabularies of BERT and CLIP.
_WORDS = "a red dog and the old man on his small boat with two white birds near green trees under blue sky".split()


class SyntheticSource:
    """One image of noise, with captions of random words that differ between samples and epochs.

    Args:
        spec: ``synthetic``, or ``synthetic:TOKENS`` with the number of tokens of a long caption, two special tokens
            and a full stop after every ten words included.
        num_samples: samples of an epoch; None: `NUM_SAMPLES`.
        seed: seed of the captions.
        keys: keys of the short and of the long captions.

    Raises:
        ValueError: TOKENS is not a number of at least 4.
    """

    num_left_out = 0

    def __init__(self, spec: str, num_samples: int | None, seed: int, keys: tuple[Sequence[str], Sequence[str]]):
        _, _, tokens = spec.partition(":")
        if tokens and (not tokens.isdecimal() or int(tokens) < 4):
            raise ValueError(f"{spec}: expected {NAME}:TOKENS with at least 4 tokens, such as {NAME}:{LONG_TOKENS}")
        self.num_tokens = int(tokens or LONG_TOKENS)
        self.num_samples, self.seed, self.keys = num_samples or NUM_SAMPLES, seed, keys
        noise = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).resize((IMAGE_SIZE, IMAGE_SIZE)).save(file, "JPEG", quality=90)
        self.image = file.getvalue()

    def read(self, epoch: int, start: int, stop: int, skip: int = 0) -> Iterator[RawSample]:
        """Yields samples of an epoch; see `Source.read`."""
        for number in range(start + skip, stop):
            stream = random.Random(f"{self.seed}/{epoch}/{number}")
            short, long = (_caption(stream, tokens) for tokens in (SHORT_TOKENS, self.num_tokens))
            record = dict.fromkeys(self.keys[1], long) | dict.fromkeys(self.keys[0], short)
            yield RawSample(str(number), NAME, {"jpg": self.image}, record)

    def parts(self) -> list[Part]:
        """Returns all samples of the first epoch as one part."""
        return [Part(NAME, self.num_samples, lambda: self.read(0, 0, self.num_samples))]

    def fingerprint(self) -> str:
        """Returns a text that identifies data and order; see `Source.fingerprint`."""
        return f"{NAME}: {self.num_samples} samples of {self.num_tokens} tokens, seed {self.seed}"


def is_synthetic(spec: str) -> bool:
    """Returns whether ``--train-data`` names these samples."""
    return spec == NAME or spec.startswith(f"{NAME}:")


def _caption(stream: random.Random, num_tokens: int) -> str:
    words = stream.choices(_WORDS, k=num_tokens - 2)
    for index in (*range(10, num_tokens - 4, 11), -1):  # two full stops in a row would be one token of CLIP's
        words[index] = "."
    return " ".join(words).replace(" .", ".")
