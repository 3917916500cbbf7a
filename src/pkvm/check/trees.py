# SPDX-License-Identifier: GPL-2.0-or-later
"""Every stage-2 tree of a machine, read at once with numpy, level by level.

A second reading of the tables beside EL2's own and the machine's walker, so that
one mistake does not hide another; and a fast one: all trees are read together, a
level of all of them in a few operations. The last level, where most of memory
is, is left to the caller in pieces that stay in the CPU's cache.

Nothing is assumed of a tree. A table outside RAM is noted and not followed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from pkvm.arm64.stage2 import (
    ADDRESS_MASK,
    LAST_LEVEL,
    PAGE_SHIFT,
    TABLE_ENTRIES,
    level_shift,
)
from pkvm.hyp.pgtable import Stage2
from pkvm.machine.memory import PhysicalMemory
from pkvm.machine.stage2 import Stage2Context

T = TypeVar("T", bound=np.generic)
Numbers = npt.NDArray[np.int64]
Entries = npt.NDArray[np.uint64]
PIECE = 128
"""Tables of the last level that are looked at together: half a megabyte."""
_STRETCH = 16
"""Tables that lie in sequence, on average, so that it pays to look at each sequence apart."""
_TYPE = np.uint64(3)


class Tree(NamedTuple):
    """A tree and whose it is: `handle` is a VM's, 0 for the identity trees."""

    name: str
    stage2: Stage2
    handle: int = 0

    @property
    def context(self) -> Stage2Context:
        """The registers that select it, as a bus master has them."""
        return _context(self.stage2.vttbr, self.stage2.vtcr)


@lru_cache(maxsize=1024)
def _context(vttbr: int, vtcr: int) -> Stage2Context:
    return Stage2Context(vttbr, vtcr)


class Tables(NamedTuple):
    """Tables of one level: page number within RAM of each, its tree, and the first frame that it
    maps."""

    level: int
    pages: Numbers
    trees: Numbers
    frames: Numbers

    def part(self, some: slice | npt.NDArray[np.bool_]) -> Tables:
        """Some of them."""
        return Tables(self.level, self.pages[some], self.trees[some], self.frames[some])

    def of_tree(self, tree: int) -> Tables:
        """Those of one tree, which come together."""
        first, end = np.searchsorted(self.trees, (tree, tree + 1))
        return self.part(slice(first, end))

    def pieces(self) -> Iterator[Tables]:
        """All of them, `PIECE` at a time or fewer. Where many lie in memory as they lie in the
        tree, as those do that were made together, they are such a piece."""
        bends = np.flatnonzero((np.diff(self.pages) != 1) | (np.diff(self.frames) != 512)) + 1
        if bends.size * _STRETCH > self.pages.size:
            bends = bends[:0]
        start = 0
        for end in [*bends.tolist(), self.pages.size]:
            for first in range(start, end, PIECE):
                yield self.part(slice(first, min(first + PIECE, end)))
            start = end


def rows_at(array: npt.NDArray[T], numbers: Numbers) -> npt.NDArray[T]:
    """`array[numbers]`, not copied if these rows follow each other."""
    if numbers.size and numbers[-1] - numbers[0] == numbers.size - 1:
        first = int(numbers[0])
        if numbers.size == 1 or (np.diff(numbers) == 1).all():
            return array[first : first + numbers.size]
    return array[numbers]


class Leaves(NamedTuple):
    """Non-zero entries that are no tables: tree, frame, level and entry of each."""

    trees: Numbers
    frames: Numbers
    levels: Numbers
    entries: Entries

    def part(self, some: npt.NDArray[np.bool_]) -> Leaves:
        """Some of them."""
        trees, frames, levels, entries = self
        return Leaves(trees[some], frames[some], levels[some], entries[some])


class Forest:
    """All trees, but for what the tables of the last level hold."""

    def __init__(self, memory: PhysicalMemory, trees: Sequence[Tree]) -> None:
        self._memory = memory
        self.trees = trees
        self.grid = memory.u64.reshape(-1, TABLE_ENTRIES)
        """All RAM as tables, by page number."""
        self.above: list[tuple[Tables, Numbers]] = []
        """Tables above the last level, and the entries in use of each."""
        self.last = Tables(LAST_LEVEL, *(_none() for _ in range(3)))
        """Those of the last level, tree by tree."""
        self.problems: list[str] = []
        self._base = memory.ram_base >> PAGE_SHIFT
        self._npages = memory.ram_bytes >> PAGE_SHIFT
        found: list[Leaves] = []
        below: list[Tables] = []
        for level in range(LAST_LEVEL + 1):
            tables = _joined(level, [*below, *self._roots(level)])
            if level == LAST_LEVEL:
                self.last = tables
                break
            below = self._descend(tables, found) if tables.pages.size else []
        columns = zip(*found, strict=True) if found else iter(())
        joined = [np.concatenate(column) for column in columns]
        self.leaves = (
            Leaves(*joined) if joined else Leaves(_none(), _none(), _none(), np.empty(0, np.uint64))
        )
        """Blocks, and whatever else stands above the last level."""

    def lookup(self, tree: int, frames: Numbers) -> tuple[Entries, Numbers, Numbers]:
        """As the function `lookup`, in a tree."""
        return lookup(self._memory, self.trees[tree].context, frames)

    def _roots(self, level: int) -> Iterator[Tables]:
        """The root tables of the trees that start at `level`."""
        for number, tree in enumerate(self.trees):
            context = tree.context
            if context.start_level == level:
                nth = np.arange(context.root_tables)
                pages = (context.root >> PAGE_SHIFT) - self._base + nth
                frames = nth << (level_shift(level) - PAGE_SHIFT + 9)
                yield self._in_ram(Tables(level, pages, np.full(nth.size, number), frames))

    def _descend(self, tables: Tables, found: list[Leaves]) -> list[Tables]:
        """Note what these tables hold; the tables below them."""
        level = tables.level
        rows = self.grid[tables.pages]
        row, column = np.nonzero(rows)
        entries = rows[row, column]
        frames = tables.frames[row] + (column << level_shift(level) - PAGE_SHIFT)
        of = tables.trees[row]
        self.above.append((tables, np.bincount(row, minlength=tables.pages.size)))
        is_table = entries & _TYPE == _TYPE
        is_leaf = ~is_table
        if is_leaf.any():
            frame = frames[is_leaf]
            found.append(Leaves(of[is_leaf], frame, np.full(frame.size, level), entries[is_leaf]))
        pages = (entries[is_table] & np.uint64(ADDRESS_MASK)).astype(np.int64) >> PAGE_SHIFT
        below = Tables(level + 1, pages - self._base, of[is_table], frames[is_table])
        return [self._in_ram(below)]

    def _in_ram(self, tables: Tables) -> Tables:
        """Those of the tables that are in RAM; of the others there is a problem."""
        inside = (tables.pages >= 0) & (tables.pages < self._npages)
        if inside.all():
            return tables
        for tree, frame in zip(
            tables.trees[~inside].tolist(), tables.frames[~inside].tolist(), strict=True
        ):
            name = self.trees[tree].name
            self.problems.append(f"P5: the table of {name} for frame {frame:#x} is not in RAM")
        return tables.part(inside)


def lookup(
    memory: PhysicalMemory, context: Stage2Context, frames: Numbers
) -> tuple[Entries, Numbers, Numbers]:
    """Where the walks of many frames end: the entries, their levels, and the page numbers within
    RAM of the tables that they are in."""
    base, npages = memory.ram_base >> PAGE_SHIFT, memory.ram_bytes >> PAGE_SHIFT
    shift = 9 * (LAST_LEVEL - context.start_level)
    index = ((context.root >> PAGE_SHIFT) - base << 9) + (frames >> shift)
    entries = memory.u64[index]
    levels = np.full(frames.size, context.start_level)
    for level in range(context.start_level + 1, LAST_LEVEL + 1):
        pages = ((entries & np.uint64(ADDRESS_MASK)) >> np.uint64(PAGE_SHIFT)).astype(np.int64)
        pages -= base
        down = (entries & _TYPE == _TYPE) & (pages >= 0) & (pages < npages)
        down &= levels == level - 1
        shift = 9 * (LAST_LEVEL - level)
        index = np.where(down, (pages << 9) + (frames >> shift & TABLE_ENTRIES - 1), index)
        entries = memory.u64[index]
        levels[down] = level
    return entries, levels, index >> 9


def _none() -> Numbers:
    return np.empty(0, np.int64)


def _joined(level: int, parts: list[Tables]) -> Tables:
    """Tables of one level as one list, tree by tree."""
    if not parts:
        return Tables(level, _none(), _none(), _none())
    pages, trees, frames = (
        np.concatenate([part[column] for part in parts]) for column in (1, 2, 3)
    )
    if len(parts) > 1:
        order = np.argsort(trees, kind="stable")
        pages, trees, frames = pages[order], trees[order], frames[order]
    return Tables(level, pages, trees, frames)
