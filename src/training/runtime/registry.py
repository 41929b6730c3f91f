"""Tables of what is chosen by name: text towers, encoders, views of captions, terms of a loss, benchmarks."""

from collections.abc import Callable, Collection
from typing import TypeVar

Item = TypeVar("Item")


class Registry(dict[str, Item]):
    """What is registered under a name, in this order; an experiment's file registers as the package does.

        @TEXT_TOWERS.register("mine")
        class Mine(TextTower): ...

    Args:
        kind: what an item is, for messages.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def register(self, *names: str) -> Callable[[Item], Item]:
        """Returns a decorator that adds an item under one or several names.

        Raises:
            ValueError: by the decorator, if another item has one of the names.
        """

        def add(item: Item) -> Item:
            for name in names:
                found = self.setdefault(name, item)
                if getattr(found, "__qualname__", found) != getattr(item, "__qualname__", item):  # not defined anew
                    raise ValueError(f"{self.kind} {name}: another one has this name; expected unique names")
                self[name] = item
            return item

        return add

    def find(self, name: str, source: str = "") -> Item:
        """Returns the item of a name.

        Args:
            name: the name, as a user gives it.
            source: the flag or file with the name, for the message.

        Raises:
            ValueError: there is none; the message lists the names.
        """
        expect_one_of(self, name, f"{source}: {self.kind}" if source else self.kind)
        return self[name]


def expect_one_of(known: Collection[str], value: object, what: str) -> None:
    """Raises ValueError with what was found and what was expected if a value is unknown."""
    if value not in known:
        raise ValueError(f"{what} {value}: expected one of {', '.join(known)}")
