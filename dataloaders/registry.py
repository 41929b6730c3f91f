"""The registry of benchmarks, which benchmarks.yaml declares.

`training.main`, `dataloaders.prepare stats`, evaluation, training and the report take everything they need to know
about a benchmark from its declaration. An experiment's file declares further ones.
"""

import argparse
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from dataloaders.pairs import ClassificationSet, OfficialLists, RetrievalSet, check_list
from training.readers.files import naming
from training.runtime.registry import Registry

GROUPS = ("long", "short", "own")
_ADDED: list["Benchmark"] = []


@dataclass(frozen=True)
class Benchmark:
    """The declaration of a benchmark.

    Attributes:
        name: its name in ``prepare stats``.
        names: the names of the flag of `training.main` that says where it is, and the placeholder of its value.
        help: the flag's line in --help.
        read: function of the flag's value, `arguments`, and the keyword ``protocol`` if there are several, that returns
            a set or several. Its errors name neither the flag nor the source. Also ``FILE.FUNCTION`` of this package.
        group: one of `GROUPS`, the heading in --help.
        arguments: keyword argument of `read` -> the flag whose value it is.
        constants: further keyword arguments of `read`.
        options: further flags: names and placeholder -> arguments of `training.flags.types.add_flag`. Benchmarks that
            share one have the same entry.
        needs: further flag that must be given -> what it is and how to get it.
        classification: `read` returns classification sets.
        protocols: variants that ``--protocol`` chooses from, the default first, with their official lists.
        folder: where it is below ``--data-root``, as described in EVAL_DATASETS.md; empty if it has no fixed location.
            Upper and lower case don't matter.
        holds: files or folders of which at least one must be in this folder for the benchmark to count as present.
        beside: further flag -> the path of its value in this folder.
        suite: the value of ``--suite`` that includes it, besides ``all``.
        source: how to get it, one line.
    """

    name: str
    names: str
    help: str
    read: Callable[..., Any] | str
    group: str = "long"
    arguments: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    needs: Mapping[str, str] = field(default_factory=dict)
    classification: bool = False
    protocols: Mapping[str, OfficialLists] = field(default_factory=dict)
    folder: str = ""
    holds: Sequence[str] = ()
    beside: Mapping[str, str] = field(default_factory=dict)
    suite: str = ""
    source: str = ""

    @property
    def flag(self) -> str:
        """The first name of the flag."""
        return self.names.split()[0]

    def find(self, root: Path) -> Path | None:
        """Returns the benchmark's folder below ``--data-root``, or None if it isn't there."""
        found = root
        for name in self.folder.split("/"):
            folders = [path for path in found.iterdir() if path.name.lower() == name.lower() and path.is_dir()]
            if not folders:
                return None
            found = found / name if found / name in folders else folders[0]
        return found if not self.holds or any((found / name).exists() for name in self.holds) else None

    def set_flags(self, args: argparse.Namespace, folder: Path) -> None:
        """Sets the benchmark's flag to a folder, and those of its files that are in it, unless they were given."""
        setattr(args, destination(self.flag), str(folder))
        for flag, path in self.beside.items():
            setattr(args, destination(flag), getattr(args, destination(flag), None) or str(folder / path))

    def sets(self, args: argparse.Namespace) -> list[RetrievalSet | ClassificationSet]:
        """Returns the sets of the protocols that ``--protocol`` names; of the first one if it names none of them.

        A set whose list is not an official one of its protocol is marked by `check_list`.

        Raises:
            FileNotFoundError, ValueError: files are missing, broken or have an unexpected structure.
        """
        flags = {name: destination(flag) for name, flag in self.arguments.items()}
        given = {name: getattr(args, flag) for name, flag in flags.items() if hasattr(args, flag)}
        return self.load(getattr(args, destination(self.flag)), getattr(args, "protocol", ()), **given)

    def load(self, root: str | Path, protocols: Sequence[str] = (), **given: Any) -> list:
        """Returns the sets below a folder, or in a table; see `sets`.

        Args:
            root: the folder or table.
            protocols: names of protocols, also those of other benchmarks.
            given: further arguments of `read`.
        """
        read = self.read
        if isinstance(read, str):
            file, _, function = read.partition(".")
            read = getattr(importlib.import_module(f"dataloaders.{file}"), function)
        default = [next(iter(self.protocols), "")]
        sets = []
        for protocol in [name for name in self.protocols if name in protocols] or default:
            with naming(self.flag, self.source if self.group != "own" else ""):
                found = read(
                    root, **self.constants, **given, **({"protocol": protocol} if len(self.protocols) > 1 else {})
                )
            for s in found if isinstance(found, list) else [found]:
                s = replace(s, source=s.source or self.source)
                sets.append(self._checked(s, s.protocol or protocol) if isinstance(s, RetrievalSet) else s)
        return sets

    def _checked(self, s: RetrievalSet, protocol: str) -> RetrievalSet:
        official = self.protocols.get(protocol, {})
        s = replace(s, protocol=protocol, num_published=s.num_published or max(official, default=None))
        return check_list(s, official) if official or s.fault else s


def destination(flag: str) -> str:
    """Returns the attribute of a flag in the namespace of parsed flags: ``--iiw-anno`` -> ``iiw_anno``."""
    return flag[2:].replace("-", "_")


@functools.cache
def benchmarks() -> tuple[Benchmark, ...]:
    """Returns the benchmarks in the order of tables.

    Raises:
        ValueError: two benchmarks have the same name or the same flag, or a group is none of `GROUPS`.
    """
    groups = yaml.safe_load(Path(__file__).with_name("benchmarks.yaml").read_text(encoding="utf-8"))
    found = [
        Benchmark(name, fields.pop("flag", f"--{name}-retrieval DIR"), group=group, **fields)
        for group, declared in groups.items()
        for name, fields in declared.items()
    ]
    known = Registry[Benchmark]("benchmark")
    for benchmark in [*found, *_ADDED]:
        known.register(benchmark.name, benchmark.flag)(benchmark)
    return tuple(sorted([*found, *_ADDED], key=lambda b: GROUPS.index(b.group)))


def benchmark(name: str) -> Benchmark:
    """Returns the benchmark of a name, such as ``dci``."""
    return next(b for b in benchmarks() if b.name == name)


def set_further_benchmarks(further: Sequence[Benchmark]) -> None:
    """Adds benchmarks that are declared elsewhere, in place of those of an earlier call."""
    if further or _ADDED:
        _ADDED[:] = further
        benchmarks.cache_clear()


def suites() -> tuple[str, ...]:
    """Returns the values of ``--suite``: ``all``, and every suite that a benchmark declares."""
    return ("all", *sorted({benchmark.suite for benchmark in benchmarks() if benchmark.suite}))


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
        if not benchmark.folder or args.suite not in ("all", benchmark.suite) or given:
            continue
        folder = benchmark.find(root)
        if folder is None:
            absent.append(f"  {root / benchmark.folder} ({benchmark.flag}): {benchmark.source}")
            continue
        any_found = True
        benchmark.set_flags(args, folder)
    if not any_found:
        raise ValueError("\n".join([f"--data-root {root}: found no benchmark; looked for", *absent]))
    return "\n".join([f"--data-root {root}: left out because they are missing:", *absent]) if absent else None
