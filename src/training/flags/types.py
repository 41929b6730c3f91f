"""Kinds of flags, and types of their values. Each function parses a text; its error says what was expected."""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dataloaders.registry import names, positive_numbers, whole_number

__all__ = [
    "Calls",
    "Flags",
    "HelpFormatter",
    "Switch",
    "json_object",
    "names",
    "not_negative",
    "positive",
    "positive_numbers",
]


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
        absent = action.default is False or action.default in (None, "", (), [], argparse.SUPPRESS)
        if absent or isinstance(action, Switch) or "default" in action.help:
            return action.help
        return f"{action.help} (default: %(default)s)"


class Calls(argparse.Action):
    """A flag without a value of its own: calls `const` with parser, namespace, the flag's value and its spelling."""

    def __init__(self, option_strings: Sequence[str], dest: str, const: Callable[..., object], **kwargs: Any):
        super().__init__(option_strings, argparse.SUPPRESS, const=const, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None):
        self.const(parser, namespace, values, option_string)


class Flags:
    """A group of flags in --help.

    `flags` holds the names of a flag with blanks between; the first is the name of its value. The help adds the default
    to a text that does not mention one.
    """

    def __init__(self, parser: argparse.ArgumentParser, title: str):
        self.group = parser.add_argument_group(title)
        self.add_argument = self.group.add_argument

    def switch(self, flags: str, text: str, default: bool | None = False) -> None:
        """Adds a flag without a value; see `Switch`."""
        self.add_argument(*flags.split(), action=Switch, default=default, help=text)

    def count(self, flags: str, default: int | None, text: str, metavar: str = "N") -> None:
        """Adds a whole number of at least 1."""
        self.add_argument(*flags.split(), type=positive, default=default, metavar=metavar, help=text)

    def whole(self, flags: str, default: int | None, text: str, metavar: str = "N") -> None:
        """Adds a whole number of at least 0."""
        self.add_argument(*flags.split(), type=not_negative, default=default, metavar=metavar, help=text)

    def number(self, flags: str, default: float | None, text: str, metavar: str = "X") -> None:
        """Adds a number."""
        self.add_argument(*flags.split(), type=float, default=default, metavar=metavar, help=text)

    def choice(self, flags: str, choices: Iterable[str], default: str | None, text: str) -> None:
        """Adds one word of several."""
        self.add_argument(*flags.split(), choices=tuple(choices), default=default, help=text)

    def text(
        self, flags: str, metavar: str, text: str, default: object = None, type: Callable[[str], object] = str
    ) -> None:
        """Adds any other value, a text unless `type` converts it."""
        self.add_argument(*flags.split(), type=type, default=default, metavar=metavar, help=text)

    def numbers(self, flags: str, text: str, metavar: str, type: Callable[[str], object] = float) -> None:
        """Adds one or several numbers."""
        self.add_argument(*flags.split(), type=type, nargs="+", metavar=metavar, help=text)

    def calls(self, flag: str, function: Callable[..., object], text: str, metavar: str = "X", nargs: Any = None):
        """Adds a flag that calls a function; see `Calls`."""
        self.add_argument(flag, action=Calls, const=function, metavar=metavar, nargs=nargs, help=text)

    def refused(self, flag: str, reason: str, text: str, nargs: Any = None) -> None:
        """Adds a flag that is a usage error; `reason` follows its name in the message."""
        self.calls(flag, lambda parser, *_: parser.error(f"{flag}{reason}"), text, nargs=nargs)


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
