# SPDX-License-Identifier: GPL-2.0-or-later
"""P3, P4, P8 and P9: what the host and its devices reach (facts §11.3).

An identity tree is looked at by regions of 2 MiB: each has a table of pages, or
a block, or nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pkvm.arm64.stage2 import (
    ADDRESS_MASK,
    AF,
    ANNOTATION_HYP,
    ATTR_DEVICE_RW,
    ATTR_NORMAL_RWX,
    LAST_LEVEL,
    PAGE_SHIFT,
    PAGE_SIZE,
    S2AP_R,
    S2AP_W,
    TABLE_ENTRIES,
    TABLE_OR_PAGE,
    VALID,
    level_size,
)
from pkvm.check.assignment import assigned_pages
from pkvm.check.trees import Entries, Numbers, rows_at
from pkvm.check.view import DMA, HOST, Mask, View, rows_of
from pkvm.hyp.identity_domain import ATTR_DMA, IDENTITY_VMID
from pkvm.machine.bus import Bus
from pkvm.machine.stage2 import Access, Stage2Fault, walk

_REGION_SHIFT = 9
_NEEDED = {Access.READ: AF | S2AP_R, Access.WRITE: AF | S2AP_W}
"""Bits of a leaf that an access needs."""
_STEPS = np.arange(TABLE_ENTRIES, dtype=np.uint64) * np.uint64(PAGE_SIZE)


def host_tree(view: View) -> Iterator[str]:
    """P3: the host's stage-2 maps no page that the host may not access, and what the host lost is
    annotated; what it may access is mapped or will be at its first fault. P4: an annotation names
    the owner, and a guest's leaf at that frame maps the page."""
    if not view.first_guest:
        return
    yield from _not_ram(view, HOST)
    for page, entry in _suspects(view, HOST, ATTR_NORMAL_RWX, view.expected):
        pa, lost, should = view.pa(page), view.lost[page], view.expected[page]
        annotated = entry != 0 and not entry & VALID
        if lost and not annotated:
            yield f"P3: PA {pa:#x} is lost to the host, but its entry is {entry:#x}"
        elif not lost and annotated:
            yield f"P3: PA {pa:#x} is the host's to use, but its entry is {entry:#x}"
        elif not lost:
            yield f"P3: the host's entry for {pa:#x} is {entry:#x}"
        if lost or annotated:
            shown = entry if annotated else 0
            yield f"P4: PA {pa:#x} is annotated {shown:#x} and should be {should:#x}"


def dma_tree(view: View) -> Iterator[str]:
    """P8: devices reach exactly the RAM that the host may access."""
    if not view.first_guest or view.mem.smmu is None:
        return
    yield from _not_ram(view, DMA)
    for page, entry in _suspects(view, DMA, ATTR_DMA, None):
        pa = view.pa(page)
        if view.lost[page] == (entry != 0) or not entry:
            yield f"P8: PA {pa:#x} has DMA entry {entry:#x}"
        else:
            yield f"P3: the dma tree's entry for {pa:#x} is {entry:#x}"


def bus_tlbs(view: View) -> Iterator[str]:
    """P9: no bus keeps a translation that its tables do not give any more."""
    if not view.first_guest:
        return
    cached = []
    host = view.mem.host.host_bus
    for bus in (host, *host.peers) if isinstance(host, Bus) else ():
        if bus.context is not None:
            cached.append((HOST, bus.name, bus.tlb_columns()))
    if view.mem.smmu is not None:
        columns = view.mem.smmu.hardware.tlb_columns().get(IDENTITY_VMID)
        if columns:
            cached.append((DMA, "dma", columns))
    for tree, name, kinds in cached:
        context = view.forest.trees[tree].context
        for access, size, numbers, deltas in kinds:
            ipas = np.array(numbers, np.int64) * size
            distances = np.array(deltas, np.int64)
            good = _translates(view, tree, ipas, size, distances, access)
            for ipa in ipas[~good].tolist():
                try:
                    walk(view.mem.memory, context, ipa, access)
                    yield f"P9: the {name} TLB leads {ipa:#x} astray"
                except Stage2Fault:
                    yield f"P9: the {name} TLB still has {ipa:#x}"


def _translates(
    view: View, tree: int, ipas: Numbers, size: int, distances: Numbers, access: Access
) -> Mask:
    """Which of these cached translations, of `size` bytes each, the tree still gives."""
    forest = view.forest
    entries, levels, _ = forest.lookup(tree, ipas >> PAGE_SHIFT)
    sizes = np.left_shift(PAGE_SIZE, 9 * (LAST_LEVEL - levels))
    is_page = levels == LAST_LEVEL
    good: Mask = np.where(is_page, entries & 3 == 3, entries & 3 == 1)
    good &= entries & np.uint64(_NEEDED[access]) == np.uint64(_NEEDED[access])
    good &= sizes >= size
    outputs = (entries & np.uint64(ADDRESS_MASK)).astype(np.int64)
    good &= outputs + (ipas & sizes - 1) == ipas + distances
    return good


def _suspects(
    view: View, tree: int, attributes: int, expected: Entries | None
) -> Iterator[tuple[int, int]]:
    """(page number, entry as that of a page) of every page of RAM whose entry is not what it must
    be: an identity mapping with `attributes`, or, if the page is lost to the host, nothing.

    If there is an `expected`, by page number, then lost pages have that instead of nothing, and
    the others may have nothing yet.
    """
    forest, memory = view.forest, view.mem.memory
    lead = memory.ram_base >> PAGE_SHIFT & ~(TABLE_ENTRIES - 1)
    lost = view.by_region(view.lost)
    wanted = None if expected is None else view.by_region(expected)
    inside = view.by_region(np.ones(view.npages, np.bool_))
    shift = (memory.ram_base >> PAGE_SHIFT) - lead
    bare = np.ones(len(lost), np.bool_)

    tables = forest.last.of_tree(tree)
    regions = tables.frames - lead >> _REGION_SHIFT
    tables = tables.part((regions >= 0) & (regions < len(lost)))
    for piece in tables.pieces():
        at = piece.frames - lead >> _REGION_SHIFT
        bare[at] = False
        rows = rows_at(forest.grid, piece.pages)
        if wanted is not None:
            wrong = rows != rows_at(wanted, at)
            if not wrong.any():
                continue
        own = (piece.frames << PAGE_SHIFT).astype(np.uint64)[:, np.newaxis] + _STEPS
        own |= np.uint64(attributes | TABLE_OR_PAGE)
        if wanted is not None:
            wrong &= rows_at(lost, at) | (rows != own)
        else:
            wrong = rows != np.where(rows_at(lost, at), np.uint64(0), own)
        wrong &= rows_at(inside, at)
        row, column = np.nonzero(wrong)
        pages = (at[row] << _REGION_SHIFT) + column - shift
        yield from zip(pages.tolist(), rows[row, column].tolist(), strict=True)

    leaves = forest.leaves.part(forest.leaves.trees == tree)
    for _, frame, level, entry in rows_of(leaves):
        size = level_size(level) >> PAGE_SHIFT
        if not memory.is_ram(frame << PAGE_SHIFT, level_size(level)):
            continue
        first = frame - lead >> _REGION_SHIFT
        covered = slice(first, first + (size >> _REGION_SHIFT))
        bare[covered] = False
        if entry != frame << PAGE_SHIFT | attributes:
            yield frame - (memory.ram_base >> PAGE_SHIFT), entry
        elif lost[covered].any():
            for offset in view.pages(lost[covered].ravel()):
                page = frame + offset - (memory.ram_base >> PAGE_SHIFT)
                yield page, entry + (offset << PAGE_SHIFT) | TABLE_OR_PAGE

    left_out = lost[bare] if wanted is not None else ~lost[bare] & inside[bare]
    if left_out.any():
        row, column = np.nonzero(left_out)
        pages = (np.flatnonzero(bare)[row] << _REGION_SHIFT) + column - shift
        yield from ((page, 0) for page in pages.tolist())


def _not_ram(view: View, tree: int) -> Iterator[str]:
    """What an identity tree has where no RAM is: the host may have devices there, in their place;
    the DMA masters nothing, and EL2's own devices nobody."""
    memory, forest = view.mem.memory, view.forest
    devices = view.mem.host.devices if tree == HOST else []
    withheld = {
        page: ANNOTATION_HYP
        for base, size in devices
        for page in range(base, base + size, PAGE_SIZE)
    }
    if tree == HOST:
        withheld |= assigned_pages(view)
    found = list(rows_of(forest.leaves.part(forest.leaves.trees == tree)))
    tables = forest.last.of_tree(tree)
    pas = tables.frames << PAGE_SHIFT
    partly = (pas < memory.ram_base) | (pas + (PAGE_SIZE << _REGION_SHIFT) > memory.ram_end)
    for piece in tables.part(partly).pieces():
        rows = forest.grid[piece.pages]
        row, column = np.nonzero(rows)
        frames = piece.frames[row] + column
        found += [
            (tree, frame, LAST_LEVEL, entry)
            for frame, entry in zip(frames.tolist(), rows[row, column].tolist(), strict=True)
        ]
    for _, frame, level, entry in found:
        ipa, page_bit = frame << PAGE_SHIFT, TABLE_OR_PAGE if level == LAST_LEVEL else 0
        if memory.is_ram(ipa, level_size(level)):
            continue
        if ipa in withheld:
            if entry != withheld.pop(ipa):
                yield f"P8: the host's entry for {ipa:#x}, a device it has not, is {entry:#x}"
        elif tree == DMA or not entry & VALID:
            yield f"P8: the {view.name(tree)} tree has an entry for {ipa:#x}, no RAM"
        elif entry != ipa | ATTR_DEVICE_RW | page_bit or _touches_ram(view, ipa, level):
            yield f"P3: the host's device entry for {ipa:#x} is {entry:#x}"
    for ipa in sorted(withheld):
        yield f"P8: the host may map {ipa:#x}, a device it has not"


def _touches_ram(view: View, ipa: int, level: int) -> bool:
    """Whether an entry for `ipa` at `level` covers any RAM."""
    memory = view.mem.memory
    return ipa < memory.ram_end and ipa + level_size(level) > memory.ram_base
