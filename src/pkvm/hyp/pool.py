# SPDX-License-Identifier: GPL-2.0-or-later
"""Free pages that EL2 keeps: a stack linked through the pages, and EL2's own pool on top of it.

A free page is zero but for the link in its first word, so a page that is taken
out is zero (facts §3.9). A page in use as a table has a refcount of 1 plus its
entries; a free one has 0.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pkvm.arm64.stage2 import PAGE_SHIFT, PAGE_SIZE, TABLE_ENTRIES
from pkvm.hyp.errors import Errno, HypBug, Refused
from pkvm.hyp.vmemmap import Vmemmap
from pkvm.machine.memory import PhysicalMemory

_Pages = npt.NDArray[np.uint64]
ZERO_PAGE = memoryview(bytes(PAGE_SIZE)).cast("Q")
"""The words of a page that is zero."""


class PageStack:
    """A stack of free, zeroed pages of EL2's; the first word of each is the PA of the next."""

    def __init__(self, memory: PhysicalMemory, vmemmap: Vmemmap) -> None:
        self._words = memory.words
        self._base = memory.ram_base
        self._refcount = vmemmap.refcount
        self._refcounts = vmemmap.refcounts
        self._grid = memory.u64.reshape(-1, TABLE_ENTRIES)
        self._head = 0
        self._count = 0

    @property
    def available(self) -> int:
        """Pages that `alloc` can still give."""
        return self._count

    def alloc(self) -> int:
        """PA of a page, all zero, refcount 1. Raises HypBug if there is none: callers count
        before they change anything."""
        if not self._count:
            raise HypBug("a table page was taken from an empty cache")
        pa = self._head
        offset = pa - self._base
        self._head = self._words[offset >> 3]
        self._words[offset >> 3] = 0
        self._refcount[offset >> PAGE_SHIFT] = 1
        self._count -= 1
        return pa

    def alloc_many(self, npages: int) -> _Pages:
        """PAs of `npages` pages, as so many calls of `alloc` would give them."""
        if npages > self._count:
            raise HypBug("table pages were taken from an empty cache")
        found, self._head = self._walk(npages)
        self._count -= npages
        pas = np.array(found, np.uint64)
        pages = self._numbers(pas)
        self._grid[pages, 0] = 0
        self._refcounts[pages] = 1
        return pas

    def free(self, pa: int) -> None:
        """Put the page at `pa` (bytes, aligned) on the stack, zeroed, refcount 0."""
        offset = pa - self._base
        first = offset >> 3
        self._words[first : first + TABLE_ENTRIES] = ZERO_PAGE
        self._words[first] = self._head
        self._refcount[offset >> PAGE_SHIFT] = 0
        self._head = pa
        self._count += 1

    def free_many(self, pas: _Pages) -> None:
        """Put pages on the stack, in order, as so many calls of `free` would."""
        if not pas.size:
            return
        pages = self._numbers(pas)
        self._grid[pages] = 0
        self._grid[pages, 0] = np.concatenate((np.array([self._head], np.uint64), pas[:-1]))
        self._refcounts[pages] = 0
        self._head = int(pas[-1])
        self._count += pas.size

    def pages(self) -> list[int]:
        """PAs of the free pages on the stack, next to go first: for EL2's end of a VM and for
        those who check."""
        return self._walk(self._count)[0]

    def _walk(self, npages: int) -> tuple[list[int], int]:
        """The first pages of the stack, and the one after them."""
        found = []
        pa = self._head
        for _ in range(npages):
            found.append(pa)
            pa = self._words[(pa - self._base) >> 3]
        return found, pa

    def _numbers(self, pas: _Pages) -> npt.NDArray[np.int64]:
        """Page numbers within RAM."""
        numbers: npt.NDArray[np.int64] = pas.astype(np.int64) - self._base >> PAGE_SHIFT
        return numbers


class PagePool(PageStack):
    """EL2's own pages [base, base + nbytes), from which host and DMA tables are made.

    Fresh pages are handed out from the bottom, freed ones are used first. `base` and `nbytes` are
    page-aligned; the pages are zero when the pool is made.
    """

    def __init__(self, memory: PhysicalMemory, vmemmap: Vmemmap, base: int, nbytes: int) -> None:
        super().__init__(memory, vmemmap)
        self._fresh = base
        self._end = base + nbytes

    @property
    def available(self) -> int:
        """Pages that `alloc` can still give."""
        return self._count + (self._end - self._fresh >> PAGE_SHIFT)

    def alloc(self) -> int:
        """PA of a page, all zero, refcount 1. Raises Refused(ENOMEM)."""
        if self._count:
            return super().alloc()
        return self.alloc_aligned(1)

    def alloc_many(self, npages: int) -> _Pages:
        """PAs of `npages` pages, as so many calls of `alloc` would give them. Raises
        Refused(ENOMEM) and has then taken none."""
        if npages > self.available:
            raise Refused(Errno.ENOMEM, "hyp_pool", f"EL2 has no {npages} free pages left")
        used = super().alloc_many(min(npages, self._count))
        fresh = [self.alloc_aligned(1) for _ in range(npages - used.size)]
        return np.concatenate((used, np.array(fresh, np.uint64)))

    def alloc_aligned(self, npages: int) -> int:
        """PA of `npages` fresh contiguous pages, aligned to their size (a power of two of
        pages), each with refcount 1: for concatenated root tables. Raises Refused(ENOMEM)."""
        size = npages * PAGE_SIZE
        pa = -(-self._fresh // size) * size
        if pa + size > self._end:
            raise Refused(Errno.ENOMEM, "hyp_pool", f"EL2 has no {npages} free pages left")
        for skipped in range(self._fresh, pa, PAGE_SIZE):
            self.free(skipped)
        self._fresh = pa + size
        for page in range(pa, pa + size, PAGE_SIZE):
            self._refcount[(page - self._base) >> PAGE_SHIFT] = 1
        return pa
