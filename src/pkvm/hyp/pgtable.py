# SPDX-License-Identifier: GPL-2.0-or-later
"""Stage-2 tables: real descriptors in physical memory, one entry at a time (Arm ARM D8.3).

`Stage2` is any tree that EL2 keeps: the host's, that of the DMA masters, a
guest's. Pages for tables come from the tree's `TableSource` and go back to it
when their last entry goes; a table's refcount is 1 plus its non-zero entries
(facts §3.8). Many pages at once are `pkvm.hyp.bulk`'s subject.

What a caller must do, and what is checked here as far as it costs nothing:
count the table pages before changing anything; never turn a valid entry into a
different valid one without going through an invalid one and a TLBI (break
before make, Arm ARM D8.17); invalidate after a valid entry is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pkvm.arm64.stage2 import (
    ADDRESS_MASK,
    AF,
    ANNOTATION,
    LAST_LEVEL,
    PAGE_SHIFT,
    PAGE_SIZE,
    PERMISSION_MASK,
    SW_STATE_MASK,
    TABLE_ENTRIES,
    TABLE_OR_PAGE,
    VALID,
    InvalidType,
    geometry_of_vtcr,
    is_table,
    level_shift,
    level_size,
    vttbr,
)
from pkvm.events import NO_ADDRESS
from pkvm.hyp.errors import Errno, HypBug, Refused
from pkvm.hyp.vmemmap import Vmemmap
from pkvm.machine.memory import PhysicalMemory

TABLE = VALID | TABLE_OR_PAGE
LOCKED = ANNOTATION.encode(type=InvalidType.LOCKED)
"""What stands in an entry between the break and the make."""
_TABLE_SHIFT = level_shift(LAST_LEVEL - 1)
_SHIFTS = tuple(level_shift(level) for level in range(LAST_LEVEL + 1))
_INDEX_MASK = TABLE_ENTRIES - 1
STEPS = np.arange(TABLE_ENTRIES, dtype=np.uint64)
"""Of the entries of one table."""


class TableSource(Protocol):
    """Where a tree's table pages come from and go to."""

    @property
    def available(self) -> int:
        """Pages left."""
        ...

    def alloc(self) -> int:
        """PA of a zeroed page, refcount 1."""
        ...

    def alloc_many(self, npages: int) -> npt.NDArray[np.uint64]:
        """PAs of so many pages, as `alloc` gives them."""
        ...

    def free(self, pa: int) -> None:
        """Take a table page back; it is zeroed, refcount 0."""
        ...

    def free_many(self, pas: npt.NDArray[np.uint64]) -> None:
        """Take many back."""
        ...


class Stage2:
    """The tree whose root tables are at PA `root` (aligned to their size, zero, refcount 1 each).

    `vtcr` gives its geometry, `vmid` its TLB tag, `invalidate(ipa)` is TLBI and DSB for one IPA
    or, with NO_ADDRESS, for the whole VMID.
    """

    def __init__(
        self,
        memory: PhysicalMemory,
        vmemmap: Vmemmap,
        tables: TableSource,
        *,
        root: int,
        vmid: int,
        vtcr: int,
        invalidate: Callable[[int], None],
    ) -> None:
        geometry = geometry_of_vtcr(vtcr)
        self.memory = memory
        self.tables = tables
        self.root = root
        self.root_tables = geometry.root_tables
        self.vmid = vmid
        self.vtcr = vtcr
        self.vttbr = vttbr(root, vmid)
        """VTTBR_EL2 for this tree."""
        self.ipa_bits = geometry.ipa_bits
        self.start_level = geometry.start_level
        self.invalidate = invalidate
        self.refcount = vmemmap.refcount
        """By page number within RAM, which is also `index >> 9` of an entry's word index."""
        self.refcounts = vmemmap.refcounts
        """The same for numpy."""
        self.grid = memory.u64.reshape(-1, TABLE_ENTRIES)
        """All RAM as tables, by page number."""
        self.root_index = (root - memory.ram_base) >> 3
        """Index in `memory.words` of the root's first entry."""
        self._words = memory.words
        self._base = memory.ram_base
        self._root_shift = _SHIFTS[geometry.start_level]
        self.walks: dict[int, int] = {}
        """Where walks have ended, by IPA >> 21: index in `memory.words` of the first entry of the
        table of pages. Every table that is freed empties it."""

    def find(self, ipa: int) -> tuple[int, int, int]:
        """Where the walk of `ipa` (bytes) ends: (index of the entry in `memory.words`, the entry,
        its level). The entry is a valid leaf, an annotation or zero.

        Raises Refused(ERANGE) beyond the input space.
        """
        words = self._words
        first = self.walks.get(ipa >> _TABLE_SHIFT)
        if first is not None:
            index = first + (ipa >> PAGE_SHIFT & _INDEX_MASK)
            return index, words[index], LAST_LEVEL
        if ipa >> self.ipa_bits:
            raise Refused(Errno.ERANGE, "ipa_range", "the IPA is beyond the VM's space", ipa=ipa)
        index = self.root_index + (ipa >> self._root_shift)
        entry = words[index]
        level = self.start_level
        while entry & TABLE == TABLE and level < LAST_LEVEL:
            level += 1
            index = ((entry & ADDRESS_MASK) - self._base >> 3) + (
                ipa >> _SHIFTS[level] & _INDEX_MASK
            )
            entry = words[index]
        if level == LAST_LEVEL:
            self.walks[ipa >> _TABLE_SHIFT] = index & ~_INDEX_MASK
        return index, entry, level

    def leaf(self, ipa: int) -> tuple[int, int]:
        """(descriptor, level) where the walk of `ipa` ends. Raises Refused(ERANGE)."""
        return self.find(ipa)[1:]

    def put(self, ipa: int, entry: int, level: int = LAST_LEVEL) -> int:
        """Write the leaf for `ipa` at `level`: valid, annotated, or 0 to clear. Returns the old.

        Tables on the way are made, and freed when their last entry goes. Invalidating the TLB
        after a valid entry is gone is the caller's. Raises HypBug where a leaf or a table stands
        in the way, and for valid to valid with other than software bits changed.
        """
        words = self._words
        index = self.root_index + (ipa >> self._root_shift)
        at = self.start_level
        while at < level:
            table = words[index]
            if table & TABLE != TABLE:
                if table:
                    raise HypBug(f"a leaf stands where a table must go, IPA {ipa:#x}")
                if not entry:
                    return 0
                table = self._new_table(index)
            at += 1
            index = ((table & ADDRESS_MASK) - self._base >> 3) + (ipa >> _SHIFTS[at] & _INDEX_MASK)
        old = words[index]
        if is_table(old, level):
            raise HypBug(f"a table stands where a leaf must go, IPA {ipa:#x}")
        if level == LAST_LEVEL:
            self.walks[ipa >> _TABLE_SHIFT] = index & ~_INDEX_MASK
        self.store(ipa, index, old, entry)
        return old

    def store(self, ipa: int, index: int, old: int, entry: int) -> None:
        """Write `entry` over the leaf or empty entry `old` that `find` saw for `ipa` at `index`,
        with the rules of `put`: for those who looked anyway."""
        if old & VALID and entry & VALID and (old ^ entry) & ~SW_STATE_MASK:
            raise HypBug(f"make without break, IPA {ipa:#x}")
        self._words[index] = entry
        if entry:
            if not old:
                self.refcount[index >> 9] += 1
        elif old:
            self.refcount[index >> 9] -= 1
            if self.refcount[index >> 9] == 1:
                self.prune(ipa)

    def clear(self, index: int) -> None:
        """Zero the leaf at `index`, which is not zero, and leave its table even if it is empty
        then. A TLBI is due."""
        self._words[index] = 0
        self.refcount[index >> 9] -= 1

    def set_state(self, index: int, entry: int, state: int) -> None:
        """Store the valid leaf `entry` with other software bits; no TLBI is due for those."""
        self._words[index] = entry & ~SW_STATE_MASK | state

    def set_attributes(self, index: int, old: int, entry: int) -> None:
        """Store the valid leaf `old` with other permissions or another access flag, for which no
        break is needed (Arm ARM D8.17.1). If it permits less than before, a TLBI is the caller's.
        """
        if (old ^ entry) & ~(PERMISSION_MASK | AF) or not old & VALID:
            raise HypBug("more than attributes of a leaf would change")
        self._words[index] = entry

    def prune(self, ipa: int) -> None:
        """Free the tables on the way to `ipa` that have no entry left, deepest first."""
        words = self._words
        path = []
        index = self.root_index + (ipa >> self._root_shift)
        level = self.start_level
        while level < LAST_LEVEL and words[index] & TABLE == TABLE:
            table = words[index] & ADDRESS_MASK
            path.append((index, table))
            level += 1
            index = (table - self._base >> 3) + (ipa >> _SHIFTS[level] & _INDEX_MASK)
        for slot, table in reversed(path):
            if self.refcount[table - self._base >> PAGE_SHIFT] != 1:
                break
            words[slot] = 0
            self.refcount[slot >> 9] -= 1
            self.walks.clear()
            self.tables.free(table)

    def split(self, ipa: int) -> None:
        """Replace the block that maps `ipa` by a table of 512 leaves of the next size with the
        same addresses, permissions and states. Takes one page of the table source."""
        index, block, level = self.find(ipa)
        if not block & VALID or level == LAST_LEVEL:
            raise HypBug(f"no block to split at IPA {ipa:#x}")
        step = np.uint64(level_size(level + 1))
        page_bit = TABLE_OR_PAGE if level + 1 == LAST_LEVEL else 0
        table = self.tables.alloc()
        self.memory.table(table)[:] = np.uint64(block | page_bit) + STEPS * step
        self.refcount[table - self._base >> PAGE_SHIFT] = 1 + TABLE_ENTRIES
        self._words[index] = LOCKED
        self.invalidate(NO_ADDRESS)
        self._words[index] = table | TABLE

    def destroy(self) -> None:
        """Free every table, the root's pages too, into the table source.

        The tree must not be used again, and its VMID must have been flushed. Pages that it still
        maps stay what they are: a protected guest's stay annotated in the host's stage-2, lost
        but never exposed.
        """
        self.walks.clear()
        for page in range(self.root, self.root + self.root_tables * PAGE_SIZE, PAGE_SIZE):
            self._free_tree(page, self.start_level)

    def _free_tree(self, table: int, level: int) -> None:
        if level < LAST_LEVEL:
            entries: npt.NDArray[np.uint64] = self.memory.table(table)
            for entry in entries[entries != 0].tolist():
                if is_table(entry, level):
                    self._free_tree(entry & ADDRESS_MASK, level + 1)
        self.tables.free(table)

    def _new_table(self, index: int) -> int:
        table = self.tables.alloc() | TABLE
        self._words[index] = table
        self.refcount[index >> 9] += 1
        return table
