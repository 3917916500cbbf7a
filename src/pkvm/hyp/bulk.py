# SPDX-License-Identifier: GPL-2.0-or-later
"""Stage-2 tables, many pages at once: arrays of frames in, tables filled with numpy.

A frame is an IPA >> 12, a region the 2 MiB that one last-level table covers
(frame >> 9). A contiguous range is nothing special: it is an array of frames
that happens to be dense. The rules are `pkvm.hyp.pgtable`'s.
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
    is_table,
    level_shift,
    level_size,
)
from pkvm.hyp.pgtable import Stage2

Frames = npt.NDArray[np.int64]
Entries = npt.NDArray[np.uint64]
REGION_FRAMES = TABLE_ENTRIES
_REGION_SHIFT = 9


class Leaves(NamedTuple):
    """Non-zero leaves of a tree by rising IPA: first frame, descriptor and level of each."""

    frames: Frames
    entries: Entries
    levels: Frames

    @property
    def npages(self) -> Frames:
        """Pages that each leaf covers."""
        return np.left_shift(1, _REGION_SHIFT * (LAST_LEVEL - self.levels))


class Region(NamedTuple):
    """The frames of an array that lie in one region: frames[start:end]."""

    number: int
    start: int
    end: int

    @property
    def is_whole(self) -> bool:
        """Whether they are all of the region's."""
        return self.end - self.start == REGION_FRAMES


def regions_of(frames: Frames) -> list[Region]:
    """The regions that hold `frames`, which rise."""
    if not frames.size:
        return []
    regions = frames >> _REGION_SHIFT
    starts = np.concatenate(([0], np.flatnonzero(regions[1:] != regions[:-1]) + 1))
    numbers = regions[starts].tolist()
    bounds = [*starts.tolist(), frames.size]
    return [Region(*each) for each in zip(numbers, bounds[:-1], bounds[1:], strict=True)]


def index_of(frames: Frames) -> slice | Frames:
    """What numpy indexes by `frames`, which rise: a slice if they are consecutive."""
    first, last = int(frames[0]), int(frames[-1])
    return slice(first, last + 1) if last - first + 1 == frames.size else frames


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
    if level == LAST_LEVEL:
        if used.size:
            yield frames, entries[used], np.full(used.size, level)
        return
    for at, entry in zip(frames.tolist(), entries[used].tolist(), strict=True):
        if is_table(entry, level):
            yield from _leaves_below(stage2, entry & ADDRESS_MASK, level + 1, at, start, end)
        else:
            yield np.array([at]), np.array([entry], np.uint64), np.array([level])


def missing_tables(stage2: Stage2, regions: list[int], blocks: list[tuple[int, int]]) -> int:
    """Table pages to be made before pages can be mapped in `regions`, and `blocks`, (frame, level)
    of each; where those go, nothing is mapped yet."""
    missing = 0
    wanted = set(regions)
    for level in range(LAST_LEVEL, stage2.start_level, -1):
        covers = level_shift(level - 1)
        wanted.update(frame >> covers - PAGE_SHIFT for frame, at in blocks if at == level)
        missing += sum(stage2.find(prefix << covers)[2] < level for prefix in wanted)
        wanted = {prefix >> _REGION_SHIFT for prefix in wanted}
    return missing


def write_pages(stage2: Stage2, frames: Frames, entries: Entries | None) -> bool:
    """Write the last-level entry of every frame, which rise; none of `entries` is 0. None: clear.

    Tables are made where missing and freed when their last entry goes; no block may cover a
    frame. Returns whether a valid entry was overwritten: then a TLBI is due.
    """
    words = stage2.memory.u64
    was_valid = False
    for region, start, end in regions_of(frames):
        table = stage2.l3_index(region)
        inside = index_of(table + (frames[start:end] & TABLE_ENTRIES - 1))
        old = words[inside]
        used = int(np.count_nonzero(old))
        was_valid = was_valid or bool(np.bitwise_or.reduce(old) & VALID)
        page = table >> _REGION_SHIFT
        if entries is None:
            words[inside] = 0
            stage2.refcount[page] -= used
            if stage2.refcount[page] == 1:
                stage2.prune(region << level_shift(2))
        else:
            words[inside] = entries[start:end]
            stage2.refcount[page] += end - start - used
    return was_valid


def clear(stage2: Stage2, found: Leaves) -> None:
    """Zero these leaves, whole blocks included, and free emptied tables. A TLBI is due."""
    is_page = found.levels == LAST_LEVEL
    for at in np.flatnonzero(~is_page).tolist():
        stage2.put(int(found.frames[at]) << PAGE_SHIFT, 0, int(found.levels[at]))
    if is_page.any():
        write_pages(stage2, found.frames[is_page], None)


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
    regions = range(frame >> _REGION_SHIFT, (frame + nr - 1 >> _REGION_SHIFT) + 1)
    return splits(stage2, [(region << level_shift(2), LAST_LEVEL) for region in regions])


def runs_of(frames: Frames) -> list[tuple[int, int, int]]:
    """(offset, first frame, number) of each maximal run of consecutive numbers in the array."""
    starts = np.concatenate(([0], np.flatnonzero(frames[1:] != frames[:-1] + 1) + 1))
    npages = np.diff(np.append(starts, frames.size))
    return list(zip(starts.tolist(), frames[starts].tolist(), npages.tolist(), strict=True))


def page_entries(found: Leaves) -> tuple[Frames, Frames]:
    """(frames, PFNs) of the single pages that valid leaves cover, blocks taken apart."""
    npages = found.npages
    total = int(npages.sum())
    offsets = np.arange(total) - np.repeat(np.cumsum(npages) - npages, npages)
    pfns = ((found.entries & np.uint64(ADDRESS_MASK)) >> np.uint64(PAGE_SHIFT)).astype(np.int64)
    return np.repeat(found.frames, npages) + offsets, np.repeat(pfns, npages) + offsets
