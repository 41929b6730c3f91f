"""What a user's own pairs have in common, whether they are in tables or in shards."""

from collections.abc import Container, Iterable, Sequence

from dataloaders.pairs import RetrievalSet, several_captions_per_image
from dataloaders.registry import Option
from dataloaders.values import names
from training.readers.sentences import normalise_caption

CAPTION_RULES = ("raw", "long")
CAPTION_KEYS = Option(
    "--retrieval-caption-keys",
    "where the captions are: columns of the table, or keys in a shard's .json; all that exist are read (default: the "
    "first of caption, raw_caption, txt, title, text, long_caption, conversations)",
    metavar="KEYS",
    default=("caption", "raw_caption", "txt", "title", "text", "long_caption", "conversations"),
    type=names,
    aliases=("--caption-keys",),
)
CAPTION_LISTS = Option(
    "--caption-lists",
    "alternatives: each text of a list is a caption; sentences: a list is one caption (default: %(default)s)",
    default="alternatives",
    choices=("alternatives", "sentences"),
    of_training=True,
)
CAPTION_LINES = Option(
    "--caption-lines",
    "each line of a .txt is a caption of its own",
    aliases=("--retrieval-caption-lines",),
    of_training=True,
)
CAPTION_RULE = Option(
    "--retrieval-caption-rule",
    "raw: captions unchanged; long: split and joined as in the long benchmarks (default: %(default)s)",
    default="raw",
    choices=CAPTION_RULES,
)


def present_keys(keys: Sequence[str], present: Container[str]) -> list[str]:
    """Returns the caption keys that a sample or table has; of the default ones only the first."""
    found = [key for key in dict.fromkeys(keys) if key in present]
    return found[:1] if keys == CAPTION_KEYS.default else found


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
