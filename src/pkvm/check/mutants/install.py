# SPDX-License-Identifier: GPL-2.0-or-later
"""How a guard is replaced from outside, for as long as a stack of contexts lasts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

Install = Callable[[ExitStack], None]


def replaced(target: object, attribute: str, value: Any) -> Install:
    """Another value for an attribute of a module or a class."""

    def install(stack: ExitStack) -> None:
        stack.enter_context(patch.object(target, attribute, value))

    return install


def unchecked(owner: type, method: str, *checks: str) -> Install:
    """A method of a class in which these checks, methods of the same class that return nothing,
    find nothing wrong."""

    def install(stack: ExitStack) -> None:
        inside = threading.local()
        whole = getattr(owner, method)

        def weak(self: Any, *args: Any, **kwargs: Any) -> Any:
            inside.depth = getattr(inside, "depth", 0) + 1
            try:
                return whole(self, *args, **kwargs)
            finally:
                inside.depth -= 1

        stack.enter_context(patch.object(owner, method, weak))
        for name in checks:
            stack.enter_context(patch.object(owner, name, _skipped(getattr(owner, name), inside)))

    return install


def _skipped(check: Callable[..., Any], inside: threading.local) -> Callable[..., Any]:
    def weak(self: Any, *args: Any, **kwargs: Any) -> Any:
        return None if getattr(inside, "depth", 0) else check(self, *args, **kwargs)

    return weak
