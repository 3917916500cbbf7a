# SPDX-License-Identifier: GPL-2.0-or-later
"""State of EL2's objects, kept in the pages that the host donated for them.

What EL2 knows of a VM or a vCPU is words in RAM that the host cannot read, not
attributes beside it: zeroing the pages at the end forgets the object.
"""

from __future__ import annotations

from typing import Any

from pkvm.machine.memory import PhysicalMemory


class Area:
    """`nbytes` of EL2's RAM at PA `pa`, zeroed, as 64-bit words; `Word` names single ones."""

    def __init__(self, memory: PhysicalMemory, pa: int, nbytes: int) -> None:
        first = (pa - memory.ram_base) >> 3
        self.pa = pa
        self.nbytes = nbytes
        self.words: memoryview[int] = memory.words[first : first + (nbytes >> 3)]

    @classmethod
    def index_of(cls, name: str) -> int:
        """Where in `words` the `Word` of this name is, for paths that every exit takes."""
        word = vars(cls)[name]
        assert isinstance(word, Word)
        return word.index


class Word:
    """An unsigned 64-bit attribute of an `Area`, at byte `offset`."""

    __slots__ = ("index",)

    def __init__(self, offset: int) -> None:
        self.index = offset >> 3

    def __get__(self, area: Area, owner: type[Any] | None = None) -> int:
        return area.words[self.index]

    def __set__(self, area: Area, value: int) -> None:
        area.words[self.index] = value
