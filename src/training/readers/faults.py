"""Why a sample or file can't be used: one list of kinds for training, evaluation and preparation."""

from pathlib import Path

FAULT_KINDS = (
    "unreachable shard",
    "broken shard",
    "file too large",
    "sparse file",
    "link in the tar",
    "no image",
    "broken image",
    "image too large",
    "image too narrow",
    "image values of unknown range",
    "HEIC without pillow-heif",
    "AVIF without 'Pillow>=11.3'",
    "no caption",
    "empty caption",
    "caption not text",
    "caption too long",
    "broken JSON",
    "JSON not an object",
    "text not UTF-8",
)
LFS_POINTER = b"version https://git-lfs"
IS_POINTER = "a Git LFS pointer, not the file itself; fetch it with git lfs pull"


class BadSample(ValueError):
    """A sample that can't be used.

    Attributes:
        kind: one of `FAULT_KINDS`; the message itself if none is given.
    """

    def __init__(self, message: str, kind: str = ""):
        super().__init__(message)
        self.kind = kind or message


def refuse_pointer(head: bytes, name: str | Path) -> None:
    """Raises ValueError if a file's first bytes are those of a Git LFS pointer, which a clone without LFS leaves."""
    if head.startswith(LFS_POINTER):
        raise ValueError(f"{name}: {IS_POINTER}")
