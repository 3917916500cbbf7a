# SPDX-License-Identifier: GPL-2.0-or-later
"""`witness`: which checks said no, and where in the source they stand.

EL2 has no hook for it. While a witness looks, what EL2 refuses by is wrapped
from outside: the making of a `Refused`, the answer to a host's abort, and the
report of the SMMU.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from traceback import walk_tb
from types import CodeType
from typing import Any, NamedTuple
from unittest.mock import patch

import pkvm
from pkvm.hyp.errors import Refused
from pkvm.hyp.host_memory import HostMemory
from pkvm.machine.smmu import Smmu

_ROOT = Path(pkvm.__file__).parent
MAX_PLACES = 8


class Place(NamedTuple):
    """A check that refused."""

    check: str
    """Its name."""
    file: str
    """Below src/pkvm."""
    line: int
    why: str
    """In words."""


@contextmanager
def witness() -> Iterator[list[Place]]:
    """The places where something was refused while the block runs: the first `MAX_PLACES` that
    differ, in order."""
    places: list[Place] = []

    def note(check: str, code: CodeType, line: int, why: str) -> None:
        path = Path(code.co_filename)
        if not path.is_relative_to(_ROOT) or len(places) == MAX_PLACES:
            return
        place = Place(check, str(path.relative_to(_ROOT)), line, why)
        if all(place[:3] != other[:3] for other in places):
            places.append(place)

    with ExitStack() as stack:
        for owner, name, wrap in (
            (Refused, "__init__", _refused),
            (HostMemory, "_resolve", _resolved),
            (Smmu, "report", _reported),
        ):
            wrapped = wrap(getattr(owner, name), note)
            stack.enter_context(patch.object(owner, name, wrapped))
        yield places


def place_of(function: str, check: str) -> Place:
    """Where a function stands, given as "module:qualified.name"."""
    module, _, name = function.partition(":")
    found: Any = import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    code = inspect.unwrap(found).__code__
    path = Path(code.co_filename).relative_to(_ROOT)
    return Place(check, str(path), code.co_firstlineno, "it takes no notice")


def comes_from_el2(error: BaseException) -> bool:
    """Whether an exception was raised in EL2, or in what EL2 called."""
    files = (frame.f_code.co_filename for frame, _ in walk_tb(error.__traceback__))
    return any(Path(file).is_relative_to(_ROOT / "hyp") for file in files)


_Note = Callable[[str, CodeType, int, str], None]


def _refused(whole: Callable[..., None], note: _Note) -> Callable[..., None]:
    def made(self: Refused, *args: Any, **kwargs: Any) -> None:
        whole(self, *args, **kwargs)
        frame = sys._getframe(1)
        note(self.check, frame.f_code, frame.f_lineno, self.why)

    return made


def _resolved(
    whole: Callable[..., tuple[bool, str]], note: _Note
) -> Callable[..., tuple[bool, str]]:
    def resolve(self: HostMemory, ipa: int, fsc: int) -> tuple[bool, str]:
        mapped, why = whole(self, ipa, fsc)
        if not mapped:
            note("host_stage2", whole.__code__, whole.__code__.co_firstlineno, why)
        return mapped, why

    return resolve


def _reported(whole: Callable[..., None], note: _Note) -> Callable[..., None]:
    def report(self: Smmu, master: Any, fault: Any) -> None:
        whole(self, master, fault)
        where = f"{master.name} (stream {master.stream:#x}) at {fault.ipa:#x}: {fault.words}"
        note("smmu", whole.__code__, whole.__code__.co_firstlineno, where)

    return report
