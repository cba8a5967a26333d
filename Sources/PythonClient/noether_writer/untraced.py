# SPDX-License-Identifier: Apache-2.0
"""torch.compile stays out of this library: what it compiles may log and save.

Dynamo, which finds out what there is to compile, follows a call into the functions of others, as long as tensors are
near. There is nothing to compile here, and in a pickler it ends in an error of its own, which the trainer would get.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def untraced(call: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """The same function, in which and below which Dynamo traces nothing."""
    untraced_call: Callable[_Arguments, _Result] | None = None

    @functools.wraps(call)
    def outside(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        nonlocal untraced_call
        if untraced_call is None:
            # Nobody has compiled anything before that module is there. It takes seconds to import.
            if (disable := getattr(sys.modules.get("torch._dynamo"), "disable", None)) is None:
                return call(*args, **kwargs)
            untraced_call = disable(call)
        return untraced_call(*args, **kwargs)

    return not_followed(outside)


def not_followed(call: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """The function itself, marked as torch.compiler.disable marks one: Dynamo does not look into it from its caller."""
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call
