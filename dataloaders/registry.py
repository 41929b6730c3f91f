"""The registry of benchmarks: it finds each file in this folder that assigns ``BENCHMARKS``.

`training.main`, `dataloaders.prepare stats`, evaluation, training and the report take everything they need to know
about a benchmark from its declaration, so a new benchmark is one new file.
"""

import argparse
import functools
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import dataloaders
from dataloaders.pairs import ClassificationSet, OfficialLists, RetrievalSet
from training.runtime.registry import Registry

GROUPS = ("long", "short", "own")
_ADDED: list["Benchmark"] = []
_DECLARES = re.compile(r"^BENCHMARKS\b", re.MULTILINE)


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


@dataclass(frozen=True)
class Option:
    """A further flag of a benchmark; benchmarks that share a flag use the same object.

    Attributes:
        flag: its name, such as ``--iiw-anno``.
        help: its line in --help.
        metavar: placeholder for the value in --help; None with `choices`.
        default: the value if the flag is not given.
        type: function that converts the text of the command line to the value.
        choices: allowed values.
        aliases: further names of the flag.
    """

    flag: str
    help: str
    metavar: str | None = None
    default: object = None
    type: Callable[[str], object] | None = None
    choices: tuple[str, ...] | None = None
    aliases: tuple[str, ...] = ()

    @property
    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of `argparse.add_argument`."""
        given = {name: getattr(self, name) for name in ("metavar", "default", "type", "choices", "help")}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Tree:
    """Where a benchmark is below ``--data-root``, as described in EVAL_DATASETS.md.

    Attributes:
        folder: path below the root; upper and lower case don't matter.
        holds: files or folders of which at least one must be in the folder for the benchmark to count as present.
        flags: (further flag of the benchmark, its path in the folder).
    """

    folder: str
    holds: tuple[str, ...] = ()
    flags: tuple[tuple[str, str], ...] = ()

    def find(self, root: Path) -> Path | None:
        """Returns the benchmark's folder below the root, or None if it isn't there."""
        found = root
        for part in self.folder.split("/"):
            names = [path for path in found.iterdir() if path.name.lower() == part.lower() and path.is_dir()]
            if not names:
                return None
            found = next((path for path in names if path.name == part), names[0])
        return found if not self.holds or any((found / name).exists() for name in self.holds) else None


@dataclass(frozen=True)
class Benchmark:
    """The declaration of a benchmark.

    Attributes:
        name: its name in ``prepare stats``.
        flag: the flag of `training.main` that names its folder.
        help: the flag's line in --help.
        read: function that takes the parsed flags, and a protocol if there are any, and returns the benchmark's sets.
        group: one of `GROUPS`, the heading in --help.
        metavar: placeholder for the flag's value in --help.
        order: position in tables within the group; benchmarks with the same number are sorted by name.
        options: further flags.
        classification: `read` returns classification sets.
        requires: (flag of `options` that must be given, what it is and how to get it).
        protocols: variants that ``--protocol`` chooses from, the default first, with their official lists.
        tree: where ``--data-root`` finds it; None if it has no fixed location.
        suites: the values of ``--suite`` that include it.
        source: how to get it, one line.
        old_flag: a former name of the flag, which is accepted as well.
    """

    name: str
    flag: str
    help: str
    read: Callable[..., Sequence[RetrievalSet | ClassificationSet]]
    group: str = "long"
    metavar: str = "DIR"
    order: int = 100
    options: tuple[Option, ...] = ()
    classification: bool = False
    requires: tuple[tuple[str, str], ...] = ()
    protocols: Mapping[str, OfficialLists] = field(default_factory=dict)
    tree: Tree | None = None
    suites: tuple[str, ...] = ()
    source: str = ""
    old_flag: str = ""

    @property
    def flags(self) -> tuple[str, ...]:
        """The flag and its former name."""
        return (self.flag, self.old_flag) if self.old_flag else (self.flag,)

    def place(self, args: argparse.Namespace, folder: Path) -> None:
        """Sets the benchmark's flag to a folder, and those of its files that are in it, unless they were given."""
        setattr(args, destination(self.flag), str(folder))
        for flag, path in self.tree.flags if self.tree else ():
            setattr(args, destination(flag), getattr(args, destination(flag)) or str(folder / path))

    def sets(self, args: argparse.Namespace) -> list[RetrievalSet | ClassificationSet]:
        """Returns the sets of the protocols that ``--protocol`` names; of the first one if it names none of them."""
        if not self.protocols:
            return list(self.read(args))
        chosen = [name for name in self.protocols if name in args.protocol] or [next(iter(self.protocols))]
        return [s for name in chosen for s in self.read(args, name)]


def destination(flag: str) -> str:
    """Returns the attribute of a flag in the namespace of parsed flags: ``--iiw-anno`` -> ``iiw_anno``."""
    return flag[2:].replace("-", "_")


@functools.cache
def benchmarks() -> tuple[Benchmark, ...]:
    """Imports every file of this package that declares benchmarks; returns them in the order of tables.

    Raises:
        ValueError: two benchmarks have the same name or the same flag, or a group is none of `GROUPS`.
    """
    found: list[Benchmark] = []
    for folder in dataloaders.__path__:
        for path in sorted(Path(folder).glob("*.py")):
            # Other files of the folder import libraries that would slow down --help.
            if _DECLARES.search(path.read_text(encoding="utf-8")):
                found += importlib.import_module(f"dataloaders.{path.stem}").BENCHMARKS
    found += _ADDED
    known = Registry[Benchmark]("benchmark")
    for benchmark in found:
        known.register(benchmark.name, benchmark.flag)(benchmark)
    return tuple(sorted(found, key=lambda b: (GROUPS.index(b.group), b.order, b.name)))


def set_further_benchmarks(further: Sequence[Benchmark]) -> None:
    """Adds benchmarks that are declared elsewhere, in place of those of an earlier call."""
    if further or _ADDED:
        _ADDED[:] = further
        benchmarks.cache_clear()


def options_of(chosen: Sequence[Benchmark]) -> dict[Option, list[str]]:
    """Returns a dict of each option of the benchmarks -> the flags of the benchmarks that have it."""
    owners: dict[Option, list[str]] = {}
    for benchmark in chosen:
        for option in benchmark.options:
            owners.setdefault(option, []).append(benchmark.flag)
    return owners


def suites() -> tuple[str, ...]:
    """Returns the values of ``--suite``: ``all``, and every suite that a benchmark declares."""
    return ("all", *sorted({name for benchmark in benchmarks() for name in benchmark.suites}))


def find_below_data_root(args: argparse.Namespace) -> str | None:
    """Sets the flags of the benchmarks found below ``--data-root``, except flags that were given explicitly.

    Returns:
        A message that lists the missing benchmarks and how to get them; None if none is missing.

    Raises:
        ValueError: there is no such folder, or no benchmark in it.
    """
    if not args.data_root:
        return None
    root, absent, any_found = Path(args.data_root), [], False
    if not root.is_dir():
        raise ValueError(f"--data-root {root}: no such folder")
    for benchmark in benchmarks():
        given = getattr(args, destination(benchmark.flag))
        any_found |= bool(given)
        if benchmark.tree is None or (args.suite != "all" and args.suite not in benchmark.suites) or given:
            continue
        folder = benchmark.tree.find(root)
        if folder is None:
            absent.append(f"  {root / benchmark.tree.folder} ({benchmark.flag}): {benchmark.source}")
            continue
        any_found = True
        benchmark.place(args, folder)
    if not any_found:
        raise ValueError("\n".join([f"--data-root {root}: found no benchmark; looked for", *absent]))
    return "\n".join([f"--data-root {root}: left out because they are missing:", *absent]) if absent else None
