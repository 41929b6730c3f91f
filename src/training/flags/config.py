"""--config: flags in YAML files. They are converted to command-line words, so each is checked like a typed flag.

ConfigArgParse 1.9 and jsonargparse 4.53 were tried instead. Both silently use the last of two equal keys, and neither
names the file and line of an unknown key.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from training.flags.types import Switch

RECIPES = Path(__file__).parents[1] / "recipes"
_ON = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def config_words(paths: list[str], actions: Mapping, check: Callable | None = None) -> list[str]:
    """Reads configuration files; later files override earlier ones.

    A file is one YAML mapping of flags to values; ``_`` and ``-`` are equivalent. A switch takes true or false; a flag
    with several values takes a list, or a mapping for KEY=VALUE pairs. A key without a value restores a flag's default.
    The key ``config`` names files that are read first; their paths are relative to the file itself.

    Args:
        paths: the files or names of recipes, in order.
        actions: flag -> its action in the parser.
        check: called with the words of one flag; raises ValueError if they are wrong. None skips unknown flags instead.

    Returns:
        The equivalent command-line words.

    Raises:
        ValueError: a file is wrong; the message names file, line and key.
    """
    words: dict[str, list[str]] = {}  # destination of a flag -> its words
    for path in paths:
        recipe = RECIPES / f"{path}.yaml"
        if not Path(path).exists() and not recipe.exists():
            names = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
            raise ValueError(f"--config {path}: No such file; there are also the recipes {names}")
        _read(Path(path) if Path(path).exists() else recipe, actions, check, words, ())
    return [word for flag in words.values() for word in flag]


def _read(
    path: Path, actions: Mapping, check: Callable | None, words: dict[str, list[str]], above: tuple[Path, ...]
) -> None:
    import yaml  # imported here to keep commands without --config fast

    if path.resolve() in above:
        raise ValueError(f"--config {path}: includes itself")
    try:
        with open(path, encoding="utf-8") as file:
            root = yaml.compose(file, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: {' '.join(str(error).split())}") from error
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"--config {path}: expected lines of the form FLAG: VALUE")
    seen: set[str] = set()
    chosen: dict[str, list[str]] = {}
    included: list[str] = []
    for key, value in root.value:
        where = f"--config {path}, line {key.start_mark.line + 1}: {key.value}"
        name = str(key.value).replace("_", "-")
        if name in seen:
            raise ValueError(f"{where}: given twice in this file")
        seen.add(name)
        plain = _plain(value, where)
        if name == "config":
            included = plain if isinstance(plain, list) else [plain]
            continue
        action = actions.get(f"--{name}")
        if action is None or action.dest in (argparse.SUPPRESS, "print_config"):
            if check is None:
                continue
            raise ValueError(f"{where}: unknown flag")
        if value.tag == "tag:yaml.org,2002:null":
            chosen[action.dest] = []
            continue
        flag = _words(f"--{name}", action, plain, where)
        try:
            if check:
                check(flag)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        chosen[action.dest] = flag
    for other in included:
        _read(path.parent / other, actions, check, words, (*above, path.resolve()))
    words |= chosen


def _plain(node, where: str) -> str | list[str]:
    """Returns a value as text or as a list of texts, KEY=VALUE for a mapping. The parser converts types, not YAML."""
    import yaml

    if isinstance(node, yaml.ScalarNode):
        return node.value
    items = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
    if not all(isinstance(item, yaml.ScalarNode) for item in items):
        raise ValueError(f"{where}: expected a value, a list or a mapping of values")
    if isinstance(node, yaml.SequenceNode):
        return [item.value for item in items]
    return [f"{key.value}={value.value}" for key, value in node.value]


def _words(flag: str, action: argparse.Action, value: str | list[str], where: str) -> list[str]:
    on = _ON.get(str(value).lower())
    if isinstance(action, Switch):
        if on is None:
            raise ValueError(f"{where}: expected true or false")
        return [action.option_strings[0] if on else action.negatives[0]]
    if action.nargs == "?" and on is not None:
        return [flag] if on else []
    if action.nargs in ("*", "+"):
        if value == []:
            return []
        return [flag, *([value] if isinstance(value, str) else value)]
    return [f"{flag}={value if isinstance(value, str) else ','.join(value)}"]


def format_config(args: argparse.Namespace, actions: Mapping[str, argparse.Action]) -> str:
    """Returns all flags that have a value, in the format that --config reads."""
    import yaml

    values = {}
    for action in dict.fromkeys(actions.values()):
        value = getattr(args, action.dest, None)
        nothing_by_default = value in (None, [], ()) and not action.default
        if nothing_by_default or action.dest in (argparse.SUPPRESS, "config", "print_config"):
            continue
        name = action.option_strings[0][2:]
        if isinstance(value, tuple):
            value = ",".join(map(str, value))
        values[name] = value
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=10_000)
