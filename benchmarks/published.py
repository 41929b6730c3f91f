"""The published scheme in a plain implementation of ours: the baseline of the benchmarks.

Every caption is padded to the context length, masks are made sample by sample in Python, and all captions run as one
batch. The loss computes both logits matrices of every text feature. Each benchmark is encoded separately, in its own
order, with one tokenizer call per caption.

Source: LoTLIP (arXiv 2410.05249) and the behaviour of its published code; none of that code is used.
"""

import torch
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader, Dataset

from dataloaders.pairs import RetrievalSet
from training.model.assembly.factory import EncoderParts
from training.model.towers.corner import features_of_captions
from training.model.towers.hf_tower import CornerHFText
from training.readers.images import load_rgb


def attention_by_sample(ids: torch.Tensor, pad_id: int, num_corners: int) -> torch.Tensor:
    """Returns the attention masks, bool [batch, seq_len (query), seq_len (key)], made caption by caption."""
    masks = []
    for caption in ids:
        length = len(caption)
        mask = (caption != pad_id)[None, :].repeat(length, 1)
        mask[:, 1 : 1 + num_corners] = False
        for corner in range(1, 1 + num_corners):
            mask[corner, 0] = False
            mask[corner, corner] = True
        masks.append(mask)
    return torch.stack(masks)


def text_features(text: CornerHFText, ids: torch.Tensor) -> torch.Tensor:
    """Encodes token ids [batch, num_captions, 128] to text features [batch, T, dim], not normalised."""
    rows = ids.flatten(0, 1)
    hidden = text.run(rows, attention_by_sample(rows, text.pad_id, text.num_corners))
    special = hidden[:, : text.num_corners + 1]
    pooled = torch.tanh(text.transformer.pooler.dense(special))
    return features_of_captions(text.proj(pooled).unflatten(0, (len(ids), -1)).unbind(1))


def loss(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Computes the loss of normalised features [batch, dim] and [batch, T, dim], with both weights 1."""
    target = torch.arange(len(images), device=images.device)
    total = 0.0
    for number in range(texts.shape[1]):
        per_image = scale * images @ texts[:, number].T
        per_text = scale * texts[:, number] @ images.T
        total = total + (cross_entropy(per_image, target) + cross_entropy(per_text, target)) / (2 * texts.shape[1])
    return total


class _Pairs(Dataset):
    """A data set whose item i is (pixels, token ids) of pair i."""

    def __init__(self, parts: EncoderParts, pairs: RetrievalSet):
        self.preprocess, self.tokenizer, self.pairs = parts.preprocess, parts.tokenizer, pairs

    def __len__(self) -> int:
        return len(self.pairs.captions)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = self.preprocess(load_rgb(self.pairs.image_paths[number]))
        return pixels, self.tokenizer([self.pairs.captions[number]])[0]


@torch.no_grad()
def evaluate_set(
    parts: EncoderParts, pairs: RetrievalSet, batch_size: int, workers: int, device: torch.device
) -> tuple[float, float]:
    """Returns R@1 of image to text and of text to image for one set, in which caption i belongs to image i."""
    images, texts = [], []
    for pixels, ids in DataLoader(_Pairs(parts, pairs), batch_size, num_workers=workers):
        ids = ids.to(device)
        images.append(normalize(parts.model.encode_image(pixels.to(device)).float(), dim=-1))
        texts.append(normalize(text_features(parts.model.text, ids[:, None])[:, 0].float(), dim=-1))
    similarity = torch.cat(images) @ torch.cat(texts).T
    own = torch.arange(len(pairs.captions), device=device)
    hits = (similarity.argmax(1) == own), (similarity.argmax(0) == own)
    return tuple(float(hit.float().mean()) for hit in hits)
