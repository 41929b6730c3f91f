"""The tokenizer of a folder in transformers' format, called like open_clip's tokenizers."""

from collections.abc import Sequence
from pathlib import Path

import torch

from training.model.names.transformers_clip import HF
from training.runtime.messages import first_line


class FolderTokenizer:
    """The tokenizer of a folder in transformers' format, called like open_clip's tokenizers.

    Args:
        folder: folder with tokenizer files.
        context_length: number of tokens to which texts are truncated and padded.

    Raises:
        FileNotFoundError: the folder has no tokenizer.
    """

    def __init__(self, folder: Path, context_length: int):
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            raise FileNotFoundError(
                f"--model {HF}{folder}: no tokenizer in this folder ({first_line(error)})"
            ) from error
        self.context_length = context_length

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> torch.Tensor:
        """Returns ids [n, context_length]."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        length = context_length or self.context_length
        options = {"padding": "max_length", "truncation": True, "max_length": length}
        return torch.tensor(self.tokenizer(texts, **options).input_ids, dtype=torch.int64).reshape(len(texts), length)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Returns the number of tokens of each text before truncation, special tokens included."""
        return [len(row) for row in self.tokenizer(list(texts), verbose=False).input_ids] if texts else []

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the tokenizer's files."""
        self.tokenizer.save_pretrained(str(folder))
