"""Why a sample can't be used: one list of kinds for training, evaluation and preparation."""

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


class BadSample(ValueError):
    """A sample that can't be used.

    Attributes:
        kind: one of `FAULT_KINDS`; the message itself if none is given.
    """

    def __init__(self, message: str, kind: str = ""):
        super().__init__(message)
        self.kind = kind or message
