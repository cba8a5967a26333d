# SPDX-License-Identifier: Apache-2.0
"""Every public name of the library, and every public method of a public class, says what it is for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import ModuleType

import noether_writer
import pytest
from noether_writer import errors, subscription

MODULES = (noether_writer, errors, subscription)


def public_names(module: ModuleType) -> list[str]:
    """As `__all__` says, else what the module itself defines."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__ and callable(value)
    ]


def undocumented(module: ModuleType) -> Iterator[str]:
    for name in public_names(module):
        value = getattr(module, name)
        if not own_docstring(value):
            yield name
        if not inspect.isclass(value):
            continue
        for member, attribute in vars(value).items():
            if not member.startswith("_") and (
                inspect.isroutine(attribute) or isinstance(attribute, property | classmethod | staticmethod)
            ):
                # A method that overrides another may leave the words to it.
                inherited = any(own_docstring(vars(base).get(member)) for base in value.__mro__[1:])
                if not own_docstring(attribute) and not inherited:
                    yield f"{name}.{member}"


def own_docstring(value: object) -> bool:
    words = getattr(value, "__doc__", None) or ""
    # What dataclasses write where nothing else is.
    generated = inspect.isclass(value) and words.startswith(f"{value.__name__}(")
    return bool(words.strip()) and not generated


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_has_a_docstring(module: ModuleType) -> None:
    assert public_names(module)
    assert list(undocumented(module)) == []


def test_a_missing_docstring_is_found() -> None:
    class Undocumented:
        def method(self) -> None: ...

        def _private(self) -> None: ...

    module = ModuleType("made")
    module.__all__ = ["Undocumented"]  # type: ignore[attr-defined]
    module.Undocumented = Undocumented  # type: ignore[attr-defined]
    assert list(undocumented(module)) == ["Undocumented", "Undocumented.method"]


def test_older_name_is_an_alias_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="Series"):
        assert noether_writer.Values is noether_writer.Series
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        noether_writer.Nothing  # noqa: B018
    assert noether_writer.Series([1.0, 2.0]).values == [1.0, 2.0]
