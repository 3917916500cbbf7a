# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's page allocator: contiguous runs of physical pages, zeroed, counted.

Runs of 2 MiB and more are aligned to 2 MiB, as Linux's transparent huge pages
make them, so that EL2 can map them with blocks; smaller ones come from the top
of memory, out of the way. A page is zeroed when it is handed out, unless it
never was before: RAM is zero when the machine starts.
"""

from __future__ import annotations

import errno
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

from pkvm.host.ports import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Bus

BLOCK_PAGES = 512
"""Pages of a 2 MiB block."""
_ZEROING_BYTES = 1 << 20


class PageAllocator:
    """Physical pages of the host, from `ranges` of (base PA, bytes), both page-aligned.

    `misalign` shifts large runs by a page against 2 MiB, so that no block can ever map them: the
    worst case, for tests and benchmarks. Not safe for threads: the kernel lock covers it.
    """

    def __init__(
        self, bus: Bus, ranges: Iterable[tuple[int, int]], *, misalign: bool = False
    ) -> None:
        self._bus = bus
        self._misalign = misalign
        self._free: list[tuple[int, int]] = []
        """Free page numbers as sorted, separate intervals [start, end)."""
        self._used_before: list[tuple[int, int, bytearray]] = []
        """Per range: first page number, end, and a byte per page, 1 once handed out."""
        for base, length in sorted(ranges):
            if (base | length) & PAGE_MASK or length <= 0:
                raise ValueError(f"memory at {base:#x} (+{length:#x}) is not page-aligned")
            start, end = base >> PAGE_SHIFT, (base + length) >> PAGE_SHIFT
            if self._free and self._free[-1][1] > start:
                raise ValueError(f"memory at {base:#x} overlaps the range before it")
            self._free.append((start, end))
            self._used_before.append((start, end, bytearray(end - start)))

    @property
    def free_pages(self) -> int:
        """Pages that nobody uses."""
        return sum(end - start for start, end in self._free)

    def alloc(self, npages: int, align: int = 1) -> int:
        """PA of `npages` contiguous zeroed pages, aligned to `align` pages (a power of two).

        Raises ENOMEM if there is no such run.
        """
        if npages >= BLOCK_PAGES and align <= BLOCK_PAGES:
            start = self._find_low(npages, BLOCK_PAGES, 1 if self._misalign else 0)
        else:
            start = self._find_high(npages, align)
        if start is None:
            raise OSError(
                errno.ENOMEM,
                f"the host has no {npages} contiguous pages; {self.free_pages} pages are free",
            )
        self._take(start, start + npages)
        self._zero(start, start + npages)
        return start << PAGE_SHIFT

    def free(self, pa: int, npages: int = 1) -> None:
        """Take back `npages` pages from PA `pa`. Any part of a run may be freed by itself."""
        start = pa >> PAGE_SHIFT
        end = start + npages
        at = bisect_left(self._free, (start, end))
        before = self._free[at - 1] if at else (0, 0)
        after = self._free[at] if at < len(self._free) else (end, end)
        if before[1] > start or after[0] < end:
            raise AssertionError(f"pages from PA {pa:#x} (+{npages}) were free already")
        low, high = at, at
        if at and before[1] == start:
            start, low = before[0], at - 1
        if at < len(self._free) and after[0] == end:
            end, high = after[1], at + 1
        self._free[low:high] = [(start, end)]

    def _find_low(self, npages: int, align: int, skew: int) -> int | None:
        for start, end in self._free:
            first = (start - skew + align - 1) // align * align + skew
            if first + npages <= end:
                return first
        return None

    def _find_high(self, npages: int, align: int) -> int | None:
        for start, end in reversed(self._free):
            first = (end - npages) // align * align
            if first >= start:
                return first
        return None

    def _take(self, start: int, end: int) -> None:
        for index, (low, high) in enumerate(self._free):
            if low <= start and end <= high:
                parts = [(low, start), (end, high)]
                self._free[index : index + 1] = [part for part in parts if part[0] < part[1]]
                return
        raise AssertionError("the run is not free")

    def _zero(self, start: int, end: int) -> None:
        """Zero those pages of [start, end) that were handed out before, and note them all."""
        for low, high, used in self._used_before:
            if not low <= start < high:
                continue
            first, last = start - low, end - low
            dirty = used.find(1, first, last)
            while dirty >= 0:
                clean = used.find(0, dirty, last)
                stop = last if clean < 0 else clean
                self._zero_bytes((low + dirty) << PAGE_SHIFT, (stop - dirty) << PAGE_SHIFT)
                dirty = used.find(1, stop, last)
            used[first:last] = b"\1" * (end - start)
            return

    def _zero_bytes(self, pa: int, length: int) -> None:
        while length:
            step = min(length, _ZEROING_BYTES)
            self._bus.write(pa, bytes(step))
            pa += step
            length -= step


Hold = list[tuple[int, int]]
"""What one holder needs of a run: number of the first page in it, pages. Add to it freely."""


class PageRun:
    """Contiguous pages of user memory. Mappings and VMs hold parts of them; a page that was given
    up and is in no other hold is free."""

    __slots__ = ("_holds", "_pages", "npages", "pa", "pfn")

    def __init__(self, pages: PageAllocator, npages: int) -> None:
        self._pages = pages
        self.pa = pages.alloc(npages)
        """PA of the first byte."""
        self.pfn = self.pa >> PAGE_SHIFT
        self.npages = npages
        self._holds: list[Hold] = []

    @property
    def length(self) -> int:
        """Bytes."""
        return self.npages * PAGE_SIZE

    def hold(self, *parts: tuple[int, int]) -> Hold:
        """A new hold, of these parts."""
        hold = [*parts]
        self._holds.append(hold)
        return hold

    def release(self, *holds: Hold) -> None:
        """Give these holds up."""
        gone = {id(hold) for hold in holds}
        before = self._held()
        self._holds = [hold for hold in self._holds if id(hold) not in gone]
        kept = deque(self._held())
        for first, end in before:
            while kept and kept[0][1] <= end:
                begin, stop = kept.popleft()
                self._free(first, begin)
                first = stop
            self._free(first, end)

    def give_up(self, hold: Hold, page: int) -> None:
        """A holder needs one page no longer."""
        for at, (first, npages) in enumerate(hold):
            if first <= page < first + npages:
                parts = [(first, page - first), (page + 1, first + npages - page - 1)]
                hold[at : at + 1] = [part for part in parts if part[1]]
                break
        for first, npages in chain.from_iterable(self._holds):
            if first <= page < first + npages:
                return
        self._free(page, page + 1)

    def _held(self) -> list[tuple[int, int]]:
        """What is held, as [first, end): sorted, and none overlaps or touches the next."""
        held: list[tuple[int, int]] = []
        for first, npages in sorted(chain.from_iterable(self._holds)):
            end = first + npages
            if held and first <= held[-1][1]:
                first, stop = held.pop()
                end = max(end, stop)
            held.append((first, end))
        return held

    def _free(self, first: int, end: int) -> None:
        if first < end:
            self._pages.free((self.pfn + first) << PAGE_SHIFT, end - first)


class Place(NamedTuple):
    """User pages: the run that has them, the first one's number in it, and how many."""

    run: PageRun
    first: int
    npages: int

    @property
    def pfn(self) -> int:
        """PA >> 12 of the first one."""
        return self.run.pfn + self.first
