"""What a user's own pairs have in common, whether they are in tables or in shards."""

from collections.abc import Iterable

from dataloaders.pairs import RetrievalSet, several_captions_per_image
from dataloaders.registry import Option
from dataloaders.values import names
from training.readers.sentences import normalise_caption

CAPTION_RULES = ("raw", "long")
CAPTION_KEYS = Option(
    "--retrieval-caption-keys",
    "where the captions are: columns of the table, or keys in a shard's .json (default: caption)",
    metavar="KEYS",
    default=("caption",),
    type=names,
    aliases=("--caption-keys",),
)
CAPTION_RULE = Option(
    "--retrieval-caption-rule",
    "raw: captions unchanged; long: split and joined as in the long benchmarks (default: %(default)s)",
    default="raw",
    choices=CAPTION_RULES,
)


def texts_of(value: object, where: str) -> list[str]:
    """Returns the captions in a cell or a JSON value, which is a text or a list of texts; empty texts are left out.

    Raises:
        ValueError: the value is something else; the message begins with `where`.
    """
    if value is None:
        return []
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, bytes):
        try:
            return texts_of(value.decode("utf-8"), where)
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: bytes that are not UTF-8, expected a text") from error
    if isinstance(value, list):
        return [text for part in value for text in texts_of(part, where)]
    shown = str(value)[:60]
    raise ValueError(f"{where}: {type(value).__name__} {shown}, expected a text or a list of texts")


def as_set(name: str, pairs: Iterable[tuple], rule: str) -> RetrievalSet:
    """Builds a retrieval set from a user's own pairs.

    Args:
        name: name of the set; the keys of its results begin with ``NAME-retrieval``.
        pairs: (image, its captions) for each image.
        rule: ``raw``, or ``long`` to split and join captions as the long benchmarks do.
    """
    apply = normalise_caption if rule == "long" else str
    pairs = [(image, [apply(text) for text in captions]) for image, captions in pairs]
    return several_captions_per_image(f"{name}-retrieval", name, pairs, source="your own pairs")
