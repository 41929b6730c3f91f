"""Hard negative texts made of the caption itself, with attributes or parts of sentences exchanged.

    python -m training.main --experiment examples/hard_texts.py --hard-text-kind attributes --train-data ...
    python -m training.main --experiment examples/hard_texts.py --siglip --hard-text-kind sentences --train-data ...

Yuksekgonul et al., When and why vision-language models behave like bags-of-words (ICLR 2023, arXiv 2210.01936), the
section on hard negatives (NegCLIP): with N images, N captions and N hard texts, the softmax of an image is over all 2N
texts, that of a caption over the N images; hard texts are no rows of their own.

    loss = (CE(scale * images . [captions; hard texts]^T) + CE(scale * captions . images^T)) / 2

What differs: NegCLIP exchanges parts of speech that a tagger finds, and picks hard images; here words of the lists
below exchange places, or two sentences exchange their second halves. With several texts of a sample, each is compared
on its own, all with the hard texts of the last one, and the losses are averaged. A caption that offers nothing to
exchange has no hard text. For the sigmoid loss (--siglip) hard texts are further negative pairs; that is ours, not
published.
"""

import random
import re

import torch
from torch import nn
from torch.nn.functional import cross_entropy, logsigmoid

from training import Experiment
from training.flags.types import positive
from training.loss import gather_rows
from training.readers.captions import join_sentences, split_sentences

KINDS = (
    "red orange yellow green cyan blue purple pink white black gray grey beige brown navy olive lavender",
    "large small big little tall short long huge tiny",
    "left right",
    "top bottom above below under over",
    "one two three four five six seven eight",
)
KIND_OF = {word: number for number, words in enumerate(KINDS) for word in words.split()}


class HardTexts(Experiment):
    @classmethod
    def add_flags(cls, group):
        group.add_argument(
            "--hard-texts", type=positive, default=1, metavar="N", help="hard negative texts of a sample"
        )
        group.add_argument(
            "--hard-text-kind", choices=("attributes", "sentences"), default="attributes", help="what exchanges places"
        )

    def views(self, texts, record, at):
        exchange = {"attributes": exchange_attributes, "sentences": exchange_halves}[self.args.hard_text_kind]
        return [*texts, *(exchange(texts[-1], at.random) for _ in range(self.args.hard_texts))]

    def sample_fields(self, record, texts):
        *_, caption = texts[: -self.args.hard_texts]
        return {"is_hard": torch.tensor([text != caption for text in texts[-self.args.hard_texts :]])}

    def make_loss(self, loss, core):
        return HardTextLoss(self.args.siglip, loss.rank, loss.world_size)


def exchange_attributes(caption: str, rng: random.Random) -> str:
    """Exchanges two different words of one kind, such as two colours; returns the caption if it has none."""
    words = re.split(r"(\W+)", caption)
    kinds = [KIND_OF.get(word.lower()) for word in words]
    pairs = [
        (a, b)
        for a in range(len(words))
        for b in range(a)
        if kinds[a] is not None and kinds[a] == kinds[b] and words[a].lower() != words[b].lower()
    ]
    if pairs:
        a, b = rng.choice(pairs)
        words[a], words[b] = words[b], words[a]
    return "".join(words)


def exchange_halves(caption: str, rng: random.Random) -> str:
    """Exchanges the second halves of two sentences; returns the caption if it has only one."""
    sentences = [sentence.split() for sentence in split_sentences(caption)]
    if len(sentences) < 2:
        return caption
    a, b = rng.sample(range(len(sentences)), 2)
    (first, rest), (second, other) = (
        (s[: (len(s) + 1) // 2], s[(len(s) + 1) // 2 :]) for s in (sentences[a], sentences[b])
    )
    sentences[a], sentences[b] = first + other, second + rest
    return join_sentences([" ".join(words) for words in sentences])


class HardTextLoss(nn.Module):
    def __init__(self, sigmoid: bool = False, rank: int = 0, world_size: int = 1):
        super().__init__()
        self.sigmoid, self.rank, self.world_size = sigmoid, rank, world_size

    def forward(self, image_features, text_features, logit_scale, is_hard, logit_bias=None, output_dict=True, **_):
        """Returns the loss of this rank's rows; averaged over ranks, it is that of the whole batch.

        Args:
            image_features: [batch, dim].
            text_features: [batch, T + n, dim]: the texts, then n hard ones.
            logit_scale, logit_bias: scalars.
            is_hard: [batch, n] bool, whether a hard text differs from the caption.
        """
        number, count = is_hard.shape[1], text_features.shape[1] - is_hard.shape[1]
        everyone = gather_rows(torch.cat([image_features[:, None], text_features], dim=1), self.world_size)
        images, texts, hard = everyone.split([1, count, number], dim=1)
        counted = gather_rows(is_hard.float(), self.world_size).flatten() > 0
        targets = torch.arange(len(image_features), device=image_features.device) + self.rank * len(image_features)
        to_hard = logit_scale * image_features @ hard.flatten(0, 1).T  # [batch, N n]
        losses = []
        for column in range(count):
            to_texts = logit_scale * image_features @ texts[:, column].T
            if self.sigmoid:
                signs = torch.full_like(to_texts, -1.0).scatter(1, targets[:, None], 1.0)
                total = logsigmoid(signs * (to_texts + logit_bias)).sum()
                total = total + (counted * logsigmoid(-(to_hard + logit_bias))).sum()
                losses.append(-total / len(image_features))
                continue
            of_images = torch.cat([to_texts, to_hard.masked_fill(~counted, -torch.inf)], dim=1)
            of_texts = logit_scale * text_features[:, column] @ images[:, 0].T
            losses.append((cross_entropy(of_images, targets) + cross_entropy(of_texts, targets)) / 2)
        return {"hard_text_loss": torch.stack(losses).mean()}
