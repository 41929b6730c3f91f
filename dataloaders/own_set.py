"""What a user's own pairs have in common, whether they come in tables or in shards."""

from collections.abc import Iterable

from dataloaders.captions import normalise_caption
from dataloaders.pairs import RetrievalSet, several_captions_per_image
from dataloaders.registry import Option
from dataloaders.values import names

CAPTION_RULES = ("raw", "long")
CAPTION_KEYS = Option(
    "--retrieval-caption-keys",
    "their captions: columns of the table, keys in a shard's .json (default: caption)",
    metavar="KEYS",
    default=("caption",),
    type=names,
    aliases=("--caption-keys",),
)
CAPTION_RULE = Option(
    "--retrieval-caption-rule",
    "captions as they are, or split and joined as in the long benchmarks (default: %(default)s)",
    default="raw",
    choices=CAPTION_RULES,
)


def texts_of(value: object, where: str) -> list[str]:
    """Returns the captions that a cell or a JSON value holds: a text, or a list of texts; empty ones are none.

    Raises:
        ValueError: the value is no text; the message begins with `where`.
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
    """Makes a set of a user's own pairs.

    Args:
        name: of the set; its results are under ``NAME-retrieval``.
        pairs: (image, its captions); an image may come several times.
        rule: ``raw``, or ``long`` to split and join captions as the long benchmarks do.
    """
    apply = normalise_caption if rule == "long" else str
    pairs = [(image, [apply(text) for text in captions]) for image, captions in pairs]
    return several_captions_per_image(f"{name}-retrieval", name, pairs, source="your own pairs")
