# SPDX-License-Identifier: GPL-2.0-or-later
"""One look at memory: EL2's records, and what every stage-2 tree says of each page of RAM.

Everything that the rules need is read here once and kept by page number, as
arrays with a byte or a word for each page. A rule then compares arrays, and puts
into words only what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from pkvm.arm64.stage2 import (
    ADDRESS_MASK,
    ANNOTATION_FFA,
    ANNOTATION_GFN_SHIFT,
    ANNOTATION_HYP,
    ANNOTATION_MMIO,
    ANNOTATION_POISONED,
    LAST_LEVEL,
    PAGE_SHIFT,
    PAGE_SIZE,
    SW_STATE_MASK,
    SW_STATE_SHIFT,
    TABLE_ENTRIES,
    PageState,
    guest_annotation,
)
from pkvm.check.trees import Entries, Forest, Leaves, Numbers, Tree, rows_at
from pkvm.hyp.assignment import DEVICE_PAGE
from pkvm.hyp.mem_protect import GuestMemory, MemProtect
from pkvm.hyp.vmemmap import (
    GUEST_OWNED,
    GUEST_SHARED_WITH_HOST,
    HOST_SHARED,
    HYP_OWNED,
    SECURE_OWNED,
)

T = TypeVar("T", bound=np.generic)
States = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
HOST, DMA = 0, 1
"""Numbers of the identity trees, if the host is protected: then the guests' come after them."""
UNCLAIMED = 0xFF
"""In `View.claims`: no guest's leaf maps the page."""
_CLAIM = {
    PageState.OWNED: GUEST_OWNED,
    PageState.SHARED_OWNED: GUEST_SHARED_WITH_HOST,
    PageState.SHARED_BORROWED: HOST_SHARED,
}
"""What the record of a page must say, by what the guest's leaf says."""
_CLAIMS = np.array([_CLAIM.get(PageState(state), 0) for state in range(4)], np.uint8)
_SOFT = np.uint64(SW_STATE_MASK)
_STEPS = np.arange(TABLE_ENTRIES, dtype=np.uint64) * np.uint64(PAGE_SIZE)
_PIECE = 1 << 16
"""Records that are looked at together: half a megabyte."""
_NOT_STATES = np.uint64(~(0xFF << 24) & (1 << 64) - 1)
"""Of a record: all but the state byte."""
_FEW = 32
"""A run of fewer pages is not worth a Python statement of its own."""


class Runs(NamedTuple):
    """Pages that guests' leaves map, in runs: tree, first frame, first page number within RAM,
    number of pages, and the guest's state (`PageState`)."""

    trees: Numbers
    gfns: Numbers
    pages: Numbers
    sizes: Numbers
    states: Numbers

    def part(self, some: Mask) -> Runs:
        """Some of them."""
        return Runs(*(column[some] for column in self))

    def singles(self) -> Runs:
        """The same pages, each a run of its own."""
        of = np.repeat(np.arange(self.sizes.size), self.sizes)
        nth = np.arange(of.size) - (np.cumsum(self.sizes) - self.sizes)[of]
        return Runs(
            self.trees[of], self.gfns[of] + nth, self.pages[of] + nth,
            np.ones(of.size, np.int64), self.states[of],
        )  # fmt: skip


class Scratch:
    """Room for the large arrays of a `View`. Who looks often keeps it: to get and give back
    megabytes each time costs more than to fill them. Good for one view at a time."""

    def __init__(self) -> None:
        self._arrays: dict[str, npt.NDArray[Any]] = {}

    def array(self, name: str, size: int, kind: type[np.generic]) -> npt.NDArray[Any]:
        """An array with anything in it."""
        if name not in self._arrays:
            self._arrays[name] = np.empty(size, kind)
        return self._arrays[name]


class View:
    """Memory as it is now. Made and used with EL2's lock held.

    `vms` are all VMs whose stage-2 exists, `secure` the PFNs that the host shares with the secure
    world.
    """

    def __init__(
        self,
        mem: MemProtect,
        vms: Iterable[GuestMemory],
        secure: Iterable[int] = (),
        scratch: Scratch | None = None,
    ) -> None:
        memory = mem.memory
        self.mem = mem
        self.vms = list(vms)
        self.buffers: tuple[int, ...] = ()
        """PAs of the host's message buffers, which EL2 has pinned besides the VMs' pages."""
        self.secure = np.array(list(secure), np.int64) - (memory.ram_base >> PAGE_SHIFT)
        self.npages = mem.vmemmap.npages
        scratch = scratch or Scratch()
        self.states: States = scratch.array("states", self.npages, np.uint8)
        """The state byte of each page."""
        self.states[:] = mem.vmemmap.states
        self.is_hyp: Mask = self.states == HYP_OWNED
        self.is_secure: Mask = self.states == SECURE_OWNED
        self.lost: Mask = self.is_hyp | self.is_secure | (self.states == GUEST_OWNED)
        """Pages that the host must not reach."""
        self.counted: Numbers = _counted(mem.vmemmap.records)
        """Pages with a refcount or a share count."""
        identity = [("host", mem.host.stage2), ("dma", mem.host.dma)] if mem.protected else []
        trees = [Tree(name, stage2) for name, stage2 in identity]
        trees += [Tree(f"VM {vm.handle:#x}", vm.stage2, vm.handle) for vm in self.vms]
        self.first_guest = len(identity)
        """Number of the first tree that is a guest's."""
        self.forest = Forest(memory, trees)
        self.problems = self.forest.problems
        self.registers: list[tuple[int, int, int]] = []
        """(handle, gfn, PA) of the pages of devices' registers that guests map."""
        self.runs = self._guests()
        self.claims: States = scratch.array("claims", self.npages, np.uint8)
        self.expected: Entries = scratch.array("expected", self.npages, np.uint64)
        """By page: the state byte that a guest's leaf asks for, or UNCLAIMED; and the entry that
        the host's stage-2 must have, 0 if it is the host's own business."""
        self._claim()

    def pa(self, page: int) -> int:
        """PA of a page number within RAM."""
        return self.mem.memory.ram_base + (page << PAGE_SHIFT)

    def pages(self, where: Mask) -> Iterator[int]:
        """Page numbers where the mask is set."""
        yield from np.flatnonzero(where).tolist()

    def by_region(self, array: npt.NDArray[T]) -> npt.NDArray[T]:
        """An array by page number as rows of 512, one for each 2 MiB of the address space that has
        RAM; zero where that is no RAM."""
        base = self.mem.memory.ram_base >> PAGE_SHIFT
        lead = base % TABLE_ENTRIES
        tail = -(base + self.npages) % TABLE_ENTRIES
        if lead or tail:
            array = np.concatenate(
                (np.zeros(lead, array.dtype), array, np.zeros(tail, array.dtype))
            )
        return array.reshape(-1, TABLE_ENTRIES)

    def name(self, tree: int) -> str:
        """Whose the tree of that number is."""
        return self.forest.trees[tree].name

    def _guests(self) -> Runs:
        """What all guests' leaves map, joined where it continues; noting what cannot be."""
        forest = self.forest
        blocks = forest.leaves.part(forest.leaves.trees >= self.first_guest)
        found = [self._mapped(blocks)]
        start = int(np.searchsorted(forest.last.trees, self.first_guest))
        for piece in forest.last.part(slice(start, None)).pieces():
            rows = rows_at(forest.grid, piece.pages)
            firsts = rows[:, 0]
            # A whole table that maps consecutive pages alike is one leaf to us.
            alike = (rows - _STEPS == firsts[:, np.newaxis]).all(axis=1) & (firsts & 3 == 3)
            found.append(
                self._mapped(
                    Leaves(
                        piece.trees[alike],
                        piece.frames[alike],
                        np.full(int(np.count_nonzero(alike)), LAST_LEVEL - 1),
                        firsts[alike] & ~np.uint64(2),
                    )
                )
            )
            if alike.all():
                continue
            rows, rest = rows[~alike], piece.part(~alike)
            row, column = np.nonzero(rows)
            found.append(
                self._mapped(
                    Leaves(
                        rest.trees[row],
                        rest.frames[row] + column,
                        np.full(row.size, LAST_LEVEL),
                        rows[row, column],
                    )
                )
            )
        runs = Runs(*(np.concatenate(column) for column in zip(*found, strict=True)))
        order = np.lexsort((runs.gfns, runs.trees))
        return _joined(Runs(*(column[order] for column in runs)))

    def _mapped(self, leaves: Leaves) -> Runs:
        """Leaves of guests as runs, without those that map nothing."""
        at_last = leaves.levels == LAST_LEVEL
        noted = (leaves.entries == ANNOTATION_POISONED) | (leaves.entries == ANNOTATION_MMIO)
        right = np.where(at_last, leaves.entries & 3 == 3, leaves.entries & 3 == 1)
        right &= at_last | (leaves.levels > 0)
        if not right.all():
            strange = ~right & ~(noted & at_last)
            for tree, gfn, _, entry in rows_of(leaves.part(strange)):
                self.problems.append(
                    f"P2: {self.name(tree)} has the strange entry {entry:#x} at gfn {gfn:#x}"
                )
            leaves = leaves.part(right)
        sizes = np.left_shift(1, 9 * (LAST_LEVEL - leaves.levels))
        pfns = (leaves.entries & np.uint64(ADDRESS_MASK)).astype(np.int64) >> PAGE_SHIFT
        pages = pfns - (self.mem.memory.ram_base >> PAGE_SHIFT)
        outside = (pages < 0) | (pages + sizes > self.npages)
        if outside.any():
            for tree, gfn, level, entry in rows_of(leaves.part(outside)):
                pa = entry & ADDRESS_MASK
                if level == LAST_LEVEL and entry == pa | DEVICE_PAGE:
                    self.registers.append((self.forest.trees[tree].handle, gfn, pa))
                    continue
                self.problems.append(f"P1: {self.name(tree)} maps PA {pa:#x}, no RAM, at {gfn:#x}")
        states = ((leaves.entries & _SOFT) >> np.uint64(SW_STATE_SHIFT)).astype(np.int64)
        return Runs(leaves.trees, leaves.frames, pages, sizes, states).part(~outside)

    def _claim(self) -> None:
        """Fill in `claims` and `expected`."""
        claims, expected = self.claims, self.expected
        claims.fill(UNCLAIMED)
        expected.fill(0)
        expected[np.flatnonzero(self.is_hyp)] = ANNOTATION_HYP
        expected[np.flatnonzero(self.is_secure)] = ANNOTATION_FFA
        handles = np.array([tree.handle for tree in self.forest.trees], np.int64)
        long = self.runs.sizes >= _FEW
        for tree, gfn, page, size, state in rows_of(self.runs.part(long)):
            claims[page : page + size] = _CLAIMS[state]
            if state == PageState.OWNED:
                first = guest_annotation(self.forest.trees[tree].handle, gfn)
                end = first + (size << ANNOTATION_GFN_SHIFT)
                expected[page : page + size] = np.arange(
                    first, end, 1 << ANNOTATION_GFN_SHIFT, dtype=np.uint64
                )
        if not long.all():
            short = self.runs.part(~long).singles()
            claims[short.pages] = _CLAIMS[short.states]
            short = short.part(short.states == PageState.OWNED)
            vms = (handles[short.trees] << 4).astype(np.uint64)
            gfns = short.gfns.astype(np.uint64) << np.uint64(ANNOTATION_GFN_SHIFT)
            expected[short.pages] = np.uint64(guest_annotation(0, 0)) | vms | gfns


def _counted(records: Entries) -> Numbers:
    """Page numbers of the records that hold anything beside the states."""
    found = []
    rest = np.empty(_PIECE, np.uint64)
    for start in range(0, records.size, _PIECE):
        piece = records[start : start + _PIECE]
        np.bitwise_and(piece, _NOT_STATES, out=rest[: piece.size])
        found.append(np.flatnonzero(rest[: piece.size]) + start)
    return np.concatenate(found)


def _joined(runs: Runs) -> Runs:
    """Runs by tree and rising frame, those made one that continue each other."""
    if not runs.sizes.size:
        return runs
    new = np.ones(runs.sizes.size, np.bool_)
    new[1:] = (
        (runs.trees[1:] != runs.trees[:-1])
        | (runs.states[1:] != runs.states[:-1])
        | (runs.gfns[1:] != (runs.gfns + runs.sizes)[:-1])
        | (runs.pages[1:] != (runs.pages + runs.sizes)[:-1])
    )
    starts = np.flatnonzero(new)
    sizes = np.add.reduceat(runs.sizes, starts)
    return Runs(
        runs.trees[starts], runs.gfns[starts], runs.pages[starts], sizes, runs.states[starts]
    )


def rows_of(columns: Iterable[npt.NDArray[np.generic]]) -> Iterator[tuple[int, ...]]:
    """Rows of arrays of one length, as Python numbers."""
    return zip(*(column.tolist() for column in columns), strict=True)
