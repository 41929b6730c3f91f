"""The tokenizer of a folder in transformers' format, called like open_clip's tokenizers."""

from pathlib import Path

from open_clip.tokenizer import HFTokenizer

from training.model.names.transformers_clip import HF
from training.runtime.messages import first_line


class FolderTokenizer(HFTokenizer):
    """The tokenizer of a folder in transformers' format; unlike open_clip's, it does not change the texts first.

    Args:
        folder: folder with tokenizer files.
        context_length: number of tokens to which texts are truncated and padded.

    Raises:
        FileNotFoundError: the folder has no tokenizer.
    """

    def __init__(self, folder: Path, context_length: int):
        try:
            super().__init__(str(folder), context_length, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            raise FileNotFoundError(
                f"--model {HF}{folder}: no tokenizer in this folder ({first_line(error)})"
            ) from error
        self.clean_fn = str
