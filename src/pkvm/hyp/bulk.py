# SPDX-License-Identifier: GPL-2.0-or-later
"""Stage-2 tables, many entries at once: runs of numbers in, tables filled with numpy.

An entry at `level` has the number IPA >> level_shift(level); at the last level
that is a frame. Entries of consecutive numbers are a run. 512 of them, aligned,
are a whole table, whose refcount says without a look whether anything is in it.
The rules are `pkvm.hyp.pgtable`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pkvm.arm64.stage2 import (
    ADDRESS_MASK,
    LAST_LEVEL,
    PAGE_SHIFT,
    TABLE_ENTRIES,
    VALID,
    level_shift,
    level_size,
)
from pkvm.hyp.errors import HypBug
from pkvm.hyp.pgtable import STEPS, TABLE, Stage2

Frames = npt.NDArray[np.int64]
Entries = npt.NDArray[np.uint64]
_TABLE_SHIFT = 9
_INDEX_MASK = TABLE_ENTRIES - 1


class Runs(NamedTuple):
    """Runs of numbers, which rise and are apart: the first number and the length of each."""

    starts: Frames
    sizes: Frames

    @property
    def ends(self) -> Frames:
        """The number after each run."""
        return self.starts + self.sizes

    def where(self, mask: npt.NDArray[np.bool_]) -> Runs:
        """Some of the runs."""
        return Runs(self.starts[mask], self.sizes[mask])


class Leaves(NamedTuple):
    """Non-zero leaves of a tree by rising IPA: first frame, descriptor and level of each."""

    frames: Frames
    entries: Entries
    levels: Frames

    @property
    def npages(self) -> Frames:
        """Pages that each leaf covers."""
        return np.left_shift(1, _TABLE_SHIFT * (LAST_LEVEL - self.levels))


def one_run(start: int, size: int) -> Runs:
    """A single run."""
    return Runs(np.array([start], np.int64), np.array([size], np.int64))


def runs_in(numbers: Frames) -> Runs:
    """The runs that `numbers`, which rise, form."""
    starts = joints(1, numbers)
    return Runs(numbers[starts], np.diff(np.append(starts, numbers.size)))


def joined(runs: Runs) -> Runs:
    """The same numbers in as few runs as possible."""
    starts = joints(runs.sizes, runs.starts)
    return Runs(runs.starts[starts], np.add.reduceat(runs.sizes, starts))


def joints(sizes: Frames | int, *columns: Frames) -> Frames:
    """Rows of a list that do not continue the row before: those where a column is not the column
    of that row plus its size."""
    follows = np.ones(columns[0].size, np.bool_)
    follows[:1] = False
    for column in columns:
        follows[1:] &= column[1:] == (column + sizes)[:-1]
    return np.flatnonzero(~follows)


def distinct(numbers: Frames) -> Frames:
    """Numbers of which equal ones come together, each once."""
    return numbers[_is_new(numbers)]


def _is_new(numbers: Frames) -> npt.NDArray[np.bool_]:
    """Which numbers are not the one before."""
    new = np.ones(numbers.size, np.bool_)
    np.not_equal(numbers[1:], numbers[:-1], out=new[1:])
    return new


def cut(runs: Runs) -> tuple[Runs, Frames]:
    """The runs cut where a table ends, and for each piece the run that it is of."""
    first = runs.starts >> _TABLE_SHIFT
    more = (runs.ends - 1 >> _TABLE_SHIFT) - first
    if not more.any():
        return runs, np.arange(first.size)
    of, nth = _each(more + 1)
    tables = first[of] + nth
    starts = np.maximum(runs.starts[of], tables << _TABLE_SHIFT)
    ends = np.minimum(runs.ends[of], tables + 1 << _TABLE_SHIFT)
    return Runs(starts, ends - starts), of


def _each(sizes: Frames) -> tuple[Frames, Frames]:
    """Every item of groups of these sizes: the number of its group, and its own in the group."""
    of = np.repeat(np.arange(sizes.size), sizes)
    return of, np.arange(of.size) - (np.cumsum(sizes) - sizes)[of]


def leaves(stage2: Stage2, frame: int, nr: int) -> Leaves:
    """The non-zero leaves that overlap `nr` frames from `frame`, which must be in the tree's
    space. Costs what is mapped, not what is asked for."""
    parts = list(_leaves_below(stage2, stage2.root, stage2.start_level, 0, frame, frame + nr))
    if not parts:
        empty = np.empty(0, np.int64)
        return Leaves(empty, np.empty(0, np.uint64), empty)
    return Leaves(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _leaves_below(
    stage2: Stage2, table: int, level: int, first: int, start: int, end: int
) -> Iterator[tuple[Frames, Entries, Frames]]:
    """The leaves in [start, end) below the table at PA `table`, whose first entry covers frame
    `first`; at the start level the concatenated tables count as one."""
    shift = level_shift(level) - PAGE_SHIFT
    count = TABLE_ENTRIES * (stage2.root_tables if table == stage2.root else 1)
    low = max(0, start - first >> shift)
    high = min(count, (end - 1 - first >> shift) + 1)
    entries = stage2.memory.span(table + low * 8, (high - low) * 8)
    used = np.flatnonzero(entries)
    frames = first + (low + used << shift)
    found = entries[used]
    tables = np.flatnonzero(found & TABLE == TABLE).tolist() if level < LAST_LEVEL else []
    begin = 0
    for at in [*tables, used.size]:
        if begin < at:
            yield frames[begin:at], found[begin:at], np.full(at - begin, level)
        if at < used.size:
            table = int(found[at]) & ADDRESS_MASK
            yield from _leaves_below(stage2, table, level + 1, int(frames[at]), start, end)
        begin = at + 1


def slots(stage2: Stage2, numbers: Frames, level: int) -> Frames:
    """As `Stage2.find` for many numbers of `level`, and no deeper: the index in `memory.u64` of
    the entry where each walk ends."""
    words = stage2.memory.u64
    found = stage2.root_index + (numbers >> _TABLE_SHIFT * (level - stage2.start_level))
    for depth in range(stage2.start_level + 1, level + 1):
        entries = words[found]
        inside = numbers >> _TABLE_SHIFT * (level - depth) & _INDEX_MASK
        below = (_pages(stage2, entries) << _TABLE_SHIFT) + inside
        found = np.where(entries & TABLE == TABLE, below, found)
    return found


def missing_tables(stage2: Stage2, wanted: list[tuple[int, Runs]]) -> int:
    """Table pages to be made before runs can be written, each (level, runs); where they go,
    nothing is mapped yet."""
    missing = 0
    tables = np.empty(0, np.int64)
    for level in range(LAST_LEVEL, stage2.start_level, -1):
        new = [cut(runs)[0].starts >> _TABLE_SHIFT for at, runs in wanted if at == level]
        # Not np.unique: the first use of it imports numpy.ma, which takes 10 ms.
        tables = distinct(np.sort(np.concatenate((tables >> _TABLE_SHIFT, *map(distinct, new)))))
        entries = stage2.memory.u64[slots(stage2, tables, level - 1)]
        missing += int(np.count_nonzero(entries & TABLE != TABLE))
    return missing


def write(stage2: Stage2, runs: Runs, firsts: Entries, step: int, level: int = LAST_LEVEL) -> bool:
    """Write the leaves of runs at `level`: the first of each run is in `firsts`, each other is
    the one before plus `step`; none is 0.

    Tables are made where missing. Returns whether a valid entry was overwritten: then a TLBI is
    due. Raises HypBug where a leaf or a table stands in the way.
    """
    if not runs.starts.size:
        return False
    words, grid, refcounts = stage2.memory.u64, stage2.grid, stage2.refcounts
    pieces, of = cut(runs)
    entries = firsts[of] + (pieces.starts - runs.starts[of]).astype(np.uint64) * np.uint64(step)
    tables = _tables(stage2, pieces.starts >> _TABLE_SHIFT, level)
    whole = pieces.sizes == TABLE_ENTRIES
    pages = tables[whole]
    was_valid = _any_valid(grid[pages[refcounts[pages] > 1]], level)
    grid[pages] = entries[whole, np.newaxis] + STEPS * np.uint64(step)
    refcounts[pages] = 1 + TABLE_ENTRIES

    part = ~whole
    if part.any():
        index, which, nth = _words(pieces.where(part), tables[part])
        old = words[index]
        was_valid |= _any_valid(old, level)
        words[index] = entries[part][which] + nth.astype(np.uint64) * np.uint64(step)
        _count(stage2, index[old == 0], 1)
    return was_valid


def clear(stage2: Stage2, runs: Runs, level: int = LAST_LEVEL) -> None:
    """Zero the leaves of runs at `level` and free the tables that are empty then. A TLBI is due.

    Raises HypBug where a leaf of another size or a table stands in the way.
    """
    if not runs.starts.size:
        return
    words, grid, refcounts = stage2.memory.u64, stage2.grid, stage2.refcounts
    pieces, _ = cut(runs)
    tables = _tables(stage2, pieces.starts >> _TABLE_SHIFT, level)
    whole = pieces.sizes == TABLE_ENTRIES
    pages = tables[whole]
    if level < LAST_LEVEL:
        _any_valid(grid[pages], level)
    grid[pages] = 0
    refcounts[pages] = 1

    part = ~whole
    if part.any():
        index, _, _ = _words(pieces.where(part), tables[part])
        old = words[index]
        _any_valid(old, level)
        words[index] = 0
        _count(stage2, index[old != 0], -1)
    _prune(stage2, distinct(pieces.starts >> _TABLE_SHIFT), level)


def clear_leaves(stage2: Stage2, found: Leaves) -> None:
    """Zero these leaves, whole blocks included, as `clear` does."""
    for level in np.flatnonzero(np.bincount(found.levels)).tolist():
        frames = found.frames[found.levels == level]
        clear(stage2, runs_in(frames >> level_shift(level) - PAGE_SHIFT), level)


def prune_tables(stage2: Stage2, regions: Frames) -> None:
    """Free those tables of pages for regions, IPA >> 21, that rise, that have no entry; as after
    `Stage2.clear`."""
    if regions.size:
        entries = stage2.memory.u64[slots(stage2, regions, LAST_LEVEL - 1)]
        _prune(stage2, regions[entries & TABLE == TABLE], LAST_LEVEL)


def break_blocks(stage2: Stage2, frames: Runs) -> bool:
    """Zero every block that maps any of the frames, for those who will write there: tables stay,
    empty or not. Returns whether there was one: then a TLBI is due."""
    regions = distinct(cut(frames)[0].starts >> _TABLE_SHIFT)
    found = blocks_at(stage2, regions)
    if not found.any():
        return False
    index = distinct(slots(stage2, regions[found], LAST_LEVEL - 1))
    stage2.memory.u64[index] = 0
    _count(stage2, index, -1)
    return True


def blocks_at(stage2: Stage2, regions: Frames) -> npt.NDArray[np.bool_]:
    """Which of these regions, IPA >> 21, a block maps."""
    entries = stage2.memory.u64[slots(stage2, regions, LAST_LEVEL - 1)]
    found: npt.NDArray[np.bool_] = entries & TABLE == VALID
    return found


def _tables(stage2: Stage2, numbers: Frames, level: int) -> Frames:
    """Page number within RAM of the table of `level` for each of `numbers`, which rise and are
    those of its entries >> 9; made where missing. Raises HypBug if a leaf stands in the way."""
    if level == stage2.start_level:
        return (stage2.root_index >> _TABLE_SHIFT) + numbers
    words = stage2.memory.u64
    once = distinct(numbers)
    for depth in range(stage2.start_level, level):
        index = slots(stage2, distinct(once >> _TABLE_SHIFT * (level - 1 - depth)), depth)
        missing = index[words[index] == 0]
        if missing.size:
            words[missing] = stage2.tables.alloc_many(missing.size) | np.uint64(TABLE)
            _count(stage2, missing, 1)
    entries = words[index]
    if (entries & TABLE != TABLE).any():
        raise HypBug("a leaf stands where a table must go")
    pages: Frames = _pages(stage2, entries)[np.cumsum(_is_new(numbers)) - 1]
    return pages


def _prune(stage2: Stage2, numbers: Frames, level: int) -> None:
    """Free those of the tables of `level` for `numbers`, as `_tables` has them, that have no
    entry left, and then their parents."""
    words = stage2.memory.u64
    for above in range(level - 1, stage2.start_level - 1, -1):
        index = slots(stage2, numbers, above)
        entries = words[index]
        empty = stage2.refcounts[_pages(stage2, entries)] == 1
        words[index[empty]] = 0
        _count(stage2, index[empty], -1)
        stage2.walks.clear()
        stage2.tables.free_many(entries[empty] & ADDRESS_MASK)
        numbers = distinct(numbers[empty] >> _TABLE_SHIFT)


def _count(stage2: Stage2, index: Frames, by: int) -> None:
    """Add `by` to a table's refcount for each of its entries in `index`; those of one table come
    together."""
    pages = index >> _TABLE_SHIFT
    starts = np.flatnonzero(_is_new(pages))
    counts = by * np.diff(np.append(starts, pages.size))
    pages = pages[starts]
    stage2.refcounts[pages] = stage2.refcounts[pages] + counts


def _words(pieces: Runs, tables: Frames) -> tuple[Frames, Frames, Frames]:
    """Every entry of pieces in `tables`: its index in `memory.u64`, its piece, and its number in
    the piece."""
    which, nth = _each(pieces.sizes)
    firsts = (tables << _TABLE_SHIFT) + (pieces.starts & _INDEX_MASK)
    return firsts[which] + nth, which, nth


def _pages(stage2: Stage2, tables: Entries) -> Frames:
    """Page numbers within RAM of the tables that these descriptors point to."""
    pages: Frames = (tables & ADDRESS_MASK).astype(np.int64) - stage2.memory.ram_base >> PAGE_SHIFT
    return pages


def _any_valid(old: Entries, level: int) -> bool:
    """Whether there is a valid leaf. Raises HypBug for a table, of which no leaf may take the
    place."""
    if level < LAST_LEVEL and (old & TABLE == TABLE).any():
        raise HypBug("a table stands where a leaf must go")
    return bool(np.bitwise_or.reduce(old, axis=None) & VALID)


def splits(stage2: Stage2, wanted: list[tuple[int, int]]) -> list[int]:
    """IPAs to be split, in order, one table page each, so that no block maps any IPA of `wanted`,
    (ipa, level) each, at a level above the one that goes with it."""
    found: list[int] = []
    seen = set()
    for ipa, target in wanted:
        _, entry, level = stage2.find(ipa)
        if not entry & VALID:
            continue
        for at in range(level, target):
            if (at, ipa >> level_shift(at)) not in seen:
                seen.add((at, ipa >> level_shift(at)))
                found.append(ipa)
    return found


def splits_at_ends(stage2: Stage2, frame: int, nr: int) -> list[int]:
    """What `splits` says so that no block straddles an end of the `nr` frames from `frame`."""
    wanted = []
    for edge in (frame, frame + nr):
        ipa = edge << PAGE_SHIFT
        if ipa >> stage2.ipa_bits == 0:
            level = stage2.start_level
            while ipa % level_size(level):
                level += 1
            wanted.append((ipa, level))
    return splits(stage2, wanted)


def splits_to_pages(stage2: Stage2, frame: int, nr: int) -> list[int]:
    """What `splits` says so that all `nr` frames from `frame` are mapped by pages."""
    regions = range(frame >> _TABLE_SHIFT, (frame + nr - 1 >> _TABLE_SHIFT) + 1)
    return splits(stage2, [(region << level_shift(2), LAST_LEVEL) for region in regions])


def runs_of(frames: Frames) -> list[tuple[int, int, int]]:
    """(offset, first frame, number) of each run of consecutive numbers in the array."""
    starts = joints(1, frames)
    npages = np.diff(np.append(starts, frames.size))
    return list(zip(starts.tolist(), frames[starts].tolist(), npages.tolist(), strict=True))


def page_entries(found: Leaves) -> tuple[Frames, Frames]:
    """(frames, PFNs) of the single pages that valid leaves cover, blocks taken apart."""
    npages = found.npages
    total = int(npages.sum())
    offsets = np.arange(total) - np.repeat(np.cumsum(npages) - npages, npages)
    pfns = ((found.entries & np.uint64(ADDRESS_MASK)) >> np.uint64(PAGE_SHIFT)).astype(np.int64)
    return np.repeat(found.frames, npages) + offsets, np.repeat(pfns, npages) + offsets
