"""Kinds of flags, and types of their values. Each function parses a text; its error says what was expected."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from string import Template
from typing import Any

from training.data.captions import parse_views


class Switch(argparse.Action):
    """A flag without a value: ``--name`` turns it on; ``--no-name`` turns it off, overriding a --config file."""

    def __init__(self, option_strings: Sequence[str], dest: str, default: bool | None = False, help: str | None = None):
        self.negatives = ["--no-" + name[2:] for name in option_strings]
        super().__init__([*option_strings, *self.negatives], dest, nargs=0, default=default, help=help)

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None):
        setattr(namespace, self.dest, option_string not in self.negatives)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows only the form of a switch that changes its default, and the defaults of other flags."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not isinstance(action, Switch):
            return super()._format_action_invocation(action)
        return ", ".join(action.negatives if action.default else action.option_strings[: len(action.negatives)])

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        absent = action.default is False or action.default in (None, "", (), [], argparse.SUPPRESS)
        if absent or isinstance(action, Switch) or "default" in text:
            return text
        return f"{text} (default: %(default)s)"


class Calls(argparse.Action):
    """A flag without a value of its own: calls `const` with parser, namespace, the flag's value and its spelling."""

    def __init__(self, option_strings: Sequence[str], dest: str, const: Callable[..., object], **kwargs: Any):
        super().__init__(option_strings, argparse.SUPPRESS, const=const, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None):
        self.const(parser, namespace, values, option_string)


def whole_number(text: str, minimum: int) -> int:
    """Parses a whole number, which may be written as ``4e8``."""
    try:
        number = Decimal(text)
        whole = number.is_finite() and number == int(number)
    except InvalidOperation:
        whole = False
    if not whole or number < minimum:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, found {text!r}")
    return int(number)


def positive_numbers(text: str) -> tuple[int, ...]:
    """Parses a list of positive numbers without duplicates: ``1000,10000`` -> (1000, 10000)."""
    return tuple(dict.fromkeys(whole_number(part, 1) for part in text.split(",")))


def names(text: str) -> tuple[str, ...]:
    """Parses a list of names: ``a,b`` -> (a, b); an empty text gives an empty tuple."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def positive(text: str) -> int:
    """Parses a whole number of at least 1; ``4e8`` gives 400000000."""
    return whole_number(text, 1)


def not_negative(text: str) -> int:
    """Parses a whole number of at least 0."""
    return whole_number(text, 0)


def character(text: str) -> str:
    r"""Parses one character; ``\t`` is a tab."""
    text = text.replace("\\t", "\t")
    if len(text) != 1:
        raise argparse.ArgumentTypeError(f"expected one character, found {text!r}")
    return text


def json_object(text: str) -> dict[str, Any]:
    """Parses a JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object like '{{\"max_model_len\": 4096}}', found {text!r}")
    return value


def text_views(text: str) -> str:
    """Checks a list of views and returns it; an empty text means that other flags define the views."""
    try:
        if text.strip():
            parse_views(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text.strip()


def optimizer(text: str) -> str:
    """Checks the format of an optimizer's name; timm checks the name itself later."""
    name = text.lower()
    if name != "adamw" and not name.startswith("timm/"):
        raise argparse.ArgumentTypeError(f"expected adamw or timm/NAME, found {text!r}")
    return name


# Kind of a flag -> the arguments of `argparse.add_argument` that all flags of the kind have.
KINDS: dict[str, dict[str, Any]] = {
    "text": {"type": str},
    "switch": {"action": Switch},
    "count": {"type": positive, "metavar": "N"},
    "whole": {"type": not_negative, "metavar": "N"},
    "number": {"type": float, "metavar": "X"},
    "integer": {"type": int},
    "names": {"type": names, "default": ()},
    "numbers": {"type": positive_numbers, "default": ()},
    "character": {"type": character},
    "object": {"type": json_object},
    "views": {"type": text_views},
    "optimizer": {"type": optimizer},
    "calls": {"action": Calls},
    "path": {"type": Path},
}


def add_flag(
    group: Any, names: str, values: Mapping[str, object], kind: str = "text", either: str = "", **fields: Any
) -> list[str]:
    """Adds a flag as a YAML file declares it.

    Args:
        group: a parser, or a group of one.
        names: the names of the flag, or of a positional argument, and the placeholder of its value in --help.
        values: what ``$NAME`` means, by NAME: as a whole value, or within the help.
        kind: one of `KINDS`.
        either: see `add_groups`.
        fields: further arguments of `argparse.add_argument`.

    Returns:
        The names of the flag.
    """
    words = names.split()
    flags = [word for word in words if word.startswith("-")] or words[:1]
    if placeholder := words[len(flags) :]:
        fields["metavar"] = placeholder[0]
    for key, value in fields.items():
        if isinstance(value, str) and value[:1] == "$":
            fields[key] = values[value[1:]]
    fields["help"] = Template(fields["help"]).safe_substitute(values)
    group.add_argument(*flags, **({} if "action" in fields else KINDS[kind]) | fields)
    return flags


def add_groups(parser: argparse.ArgumentParser, groups: Mapping, values: Mapping[str, object]) -> None:
    """Adds groups of flags as a YAML file declares them: title -> names of a flag -> the arguments of `add_flag`.

    Of the flags of a group that have the field ``either``, only one may be given; if its value is ``required``, one
    must be.
    """
    for title, flags in groups.items():
        group: Any = parser.add_argument_group(title)
        kinds = {fields["either"] for fields in flags.values() if "either" in fields}
        only_one = group.add_mutually_exclusive_group(required="required" in kinds) if kinds else group
        for flag, fields in flags.items():
            add_flag(only_one if "either" in fields else group, flag, values, **fields)


def command_parser(module: str, about: str | None, file: Path, **values: object) -> argparse.ArgumentParser:
    """Returns the parser of ``python -m MODULE`` with the flags that a YAML file declares; see `add_groups`."""
    import yaml  # imported here, because usage errors of training.main need none

    prog = f"python -m {module}"
    parser = argparse.ArgumentParser(prog=prog, description=about, formatter_class=HelpFormatter, allow_abbrev=False)
    add_groups(parser, yaml.safe_load(file.read_text(encoding="utf-8")), values)
    return parser
