"""The flags that the YAML files of this folder declare, as groups of a parser.

Each file maps titles of groups to flags: the names of a flag, and the placeholder of its value in --help, to

    kind        one of `KINDS` in types.py (text if not given); or ``refused``, ``renamed`` or ``no-effect`` for a flag
                that is accepted only for its message
    effect      the conditions of effects.py under which the flag has an effect, or ``always``
    everyday    true for a flag of the short --help
    help        its line in --help; the default is added to a text that does not mention one
    default, choices, nargs, const, action      arguments of `argparse.add_argument`

``$NAME`` is a value from the code. ``benchmarks: GROUP`` stands for the flags that `dataloaders` declares.
"""

import argparse
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml

from dataloaders.registry import benchmarks
from training.flags.effects import Condition, conditions, needs
from training.flags.types import add_flag

FILES = ("model", "evaluation", "data", "training", "compute", "open_clip")
NO_EFFECT = "no_effect"  # attribute of the namespace that lists the messages of flags of the kind no-effect
# Kind of a flag that is accepted only for its message -> what precedes its help in the message, and in --help.
_MESSAGES = {
    "refused": (", a flag of open_clip's trainer, is not supported: ", "refused: "),
    "renamed": (" is now ", "is now "),
    "no-effect": (": no effect: ", "no effect: "),
}


class Parser(argparse.ArgumentParser):
    """A parser that raises its errors, and knows under which conditions its flags have an effect."""

    effects: dict[str, tuple[Condition, ...]]

    def error(self, message: str) -> Any:
        """Raises ValueError instead of exiting."""
        raise ValueError(message)

    @property
    def actions(self) -> dict[str, argparse.Action]:
        """The action of each flag, by the flag's name with its hyphens."""
        return dict(self._option_string_actions)  # argparse has no public name for it


@cache
def declared() -> dict[str, dict[str, Any]]:
    """Reads the files of this folder: title of a group -> names of a flag -> its declaration."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the first one is in C
    texts = [(Path(__file__).parent / f"{name}.yaml").read_text(encoding="utf-8") for name in FILES]
    return {title: flags for text in texts for title, flags in yaml.load(text, loader).items()}


def add_declared_flags(parser: Parser, values: Mapping[str, object], everything: bool) -> None:
    """Adds all groups, and sets the parser's `effects`.

    Args:
        parser: the parser to extend.
        values: what ``$NAME`` means, by NAME.
        everything: also add flags that are not for everyday use.
    """
    parser.effects = {}
    for title, flags in declared().items():
        group = parser.add_argument_group(title)
        for names, fields in flags.items():
            if names == "benchmarks":
                parser.effects |= _add_benchmarks(group, fields)
            elif everything or "everyday" in fields:
                parser.effects |= _add(group, names, values, **fields)


def _add(
    group: Any,
    names: str,
    values: Mapping[str, object],
    help: str,
    kind: str = "text",
    effect: str = "",
    everyday: bool = False,
    **fields: Any,
) -> dict[str, tuple[Condition, ...]]:
    """Adds a flag; returns its conditions, by its name."""
    if kind not in _MESSAGES:
        flag = add_flag(group, names, values, kind, help=help, **fields)[0]
        return {flag: conditions(effect)} if effect else {}
    in_message, in_help = _MESSAGES[kind]
    message = f"{names.split()[0]}{in_message}{help}"
    say = partial(_note, message) if kind == "no-effect" else lambda parser, *_: parser.error(message)
    arguments: dict[str, Any] = {"metavar": "X", "const": say, "help": in_help + help} | fields
    add_flag(group, names, values, "calls", **arguments)
    return {}


def _note(message: str, _: object, namespace: argparse.Namespace, *__: object) -> None:
    vars(namespace).setdefault(NO_EFFECT, []).append(message)


def _add_benchmarks(group: Any, name: str) -> dict[str, tuple[Condition, ...]]:
    """Adds the flags of the benchmarks of a group, and each option behind the last benchmark that has it."""
    effects: dict[str, tuple[Condition, ...]] = {}
    for benchmark in benchmarks():
        if benchmark.group == name:
            add_flag(group, benchmark.names, {}, help=benchmark.help, metavar="DIR")
            effects[benchmark.flag] = conditions("always")
            for option, fields in benchmark.options.items():
                owners = [other.flag for other in benchmarks() if option in other.options]
                if owners[-1] == benchmark.flag:
                    flag, *_ = add_flag(group, option, {}, **fields)
                    # With one owner it is clear which flag is missing, so the command is refused.
                    effects[flag] = (needs(*owners, refused=len(owners) == 1),)
    return effects
