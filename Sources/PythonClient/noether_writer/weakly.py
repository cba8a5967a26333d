# SPDX-License-Identifier: Apache-2.0
"""A bag of objects that it does not keep alive.

In the place of weakref.WeakSet: reading it takes one step, so another thread may add meanwhile, and nothing runs when
an object goes, so no exception of a signal's handler is lost in there.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class WeakBag(Generic[Item]):
    def __init__(self) -> None:
        self._references: dict[int, weakref.ref[Item]] = {}

    def add(self, item: Item) -> None:
        # Those that are gone go with the next one.
        for number, reference in list(self._references.items()):
            if reference() is None:
                self._references.pop(number, None)
        self._references[id(item)] = weakref.ref(item)

    def discard(self, item: Item) -> None:
        self._references.pop(id(item), None)

    def clear(self) -> None:
        self._references.clear()

    def __iter__(self) -> Iterator[Item]:
        for reference in list(self._references.values()):
            if (item := reference()) is not None:
                yield item
