"""Features by content: what an earlier benchmark or caption has in common with a later one is encoded once."""

from collections.abc import Callable, Hashable, Sequence

import torch

from training.eval.encode import Encoding


class FeatureStore:
    """Encodes items whose content it has not seen yet, and returns the features of all.

    Args:
        encode: distinct items -> their encoding, complete on every rank.
    """

    def __init__(self, encode: Callable[[list], Encoding]):
        self.encode = encode
        self._row_of: dict[Hashable, int] = {}  # content -> row in the concatenation of all parts
        self._parts: list[Encoding] = []

    @property
    def contents(self) -> list[Hashable]:
        """What has been encoded."""
        return list(self._row_of)

    def add(self, contents: Sequence[Hashable], encoding: Encoding) -> None:
        """Adds items that are encoded already; of equal contents, the first counts."""
        first = sum(len(encoding.features) for encoding in self._parts)
        self._parts.append(encoding)
        for row, content in enumerate(contents, first):
            self._row_of.setdefault(content, row)

    def copy(self, encode: Callable[[list], Encoding] | None = None) -> "FeatureStore":
        """Returns a store of the same features; what is added to one of them does not reach the other."""
        new = FeatureStore(encode or self.encode)
        new._row_of, new._parts = dict(self._row_of), list(self._parts)
        return new

    def __call__(self, items: Sequence, contents: Sequence[Hashable] | None = None) -> Encoding:
        """Returns the encoding of all items.

        Args:
            items: captions, or image files.
            contents: items with equal contents have equal features; default: the items themselves.
        """
        contents = items if contents is None else contents
        new = {content: item for content, item in zip(contents, items) if content not in self._row_of}
        if new:
            self.add(list(new), self.encode(list(new.values())))
        if len(new) == len(items) > 0:
            return self._parts[-1]  # the usual case: there is only one copy of a benchmark's features
        return self._gather(torch.tensor([self._row_of[content] for content in contents], dtype=torch.int64))

    def _gather(self, rows: torch.Tensor) -> Encoding:
        dim = self._parts[0].features.shape[1] if self._parts else 0
        found = Encoding(torch.empty(len(rows), dim), {}, torch.zeros(len(rows), dtype=torch.int64))
        first = 0
        for encoding in self._parts:
            items = ((rows >= first) & (rows < first + len(encoding.features))).nonzero()[:, 0]
            chosen = rows[items] - first
            found.features[items], found.lost_tokens[items] = encoding.features[chosen], encoding.lost_tokens[chosen]
            if encoding.broken:
                pairs = zip(items.tolist(), chosen.tolist())
                found.broken.update((item, encoding.broken[row]) for item, row in pairs if row in encoding.broken)
            first += len(encoding.features)
        return found
