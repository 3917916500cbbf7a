# SPDX-License-Identifier: GPL-2.0-or-later
"""What the host and its devices can reach: the host's stage-2, and with it the identity domain.

The host's is an identity map, filled lazily by its faults with the largest
blocks that fit (facts §3.5). A page that the host lost has an annotation in its
place: its owner, and for a guest the frame. Default mappings carry no state, so
a block that loses one page is dropped whole and the rest faults back. EL2's own
device, the SMMU, is annotated like a page that EL2 owns.

Order (facts §10): a page is lost by host entry, TLBI, DMA entry, TLBI, then the
state; it comes back by host entry, DMA entry, then the state, which the caller
sets. Both trees live on EL2's own pool, which is large enough for all RAM at
page granularity: see `pool_pages`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from pkvm.arm64.esr import FSC_TRANSLATION
from pkvm.arm64.stage2 import (
    ANNOTATION,
    ANNOTATION_FFA,
    ANNOTATION_HYP,
    ATTR_DEVICE_RW,
    ATTR_NORMAL_RWX,
    BLOCK_1G,
    BLOCK_2M,
    BLOCK_LEVELS,
    LAST_LEVEL,
    PAGE_SHIFT,
    PAGE_SIZE,
    TABLE_ENTRIES,
    TABLE_OR_PAGE,
    VALID,
    Geometry,
    Owner,
    level_size,
)
from pkvm.events import NO_ADDRESS, HostAbort, Recorder, Refusal, Tlbi
from pkvm.hyp.bulk import (
    Entries,
    Leaves,
    Runs,
    break_blocks,
    clear,
    clear_leaves,
    cut,
    distinct,
    joined,
    leaves,
    write,
)
from pkvm.hyp.errors import Errno
from pkvm.hyp.identity_domain import DMA_PAGE, IDENTITY_VMID, IdentityDomain
from pkvm.hyp.pgtable import Stage2
from pkvm.hyp.pool import PagePool
from pkvm.hyp.smmu import SMMU_PAGES, SmmuDriver
from pkvm.hyp.vmemmap import Vmemmap
from pkvm.machine.memory import PhysicalMemory
from pkvm.machine.stage2 import Access, Stage2Context

HOST_VMID = 0
HOST_PAGE = ATTR_NORMAL_RWX | TABLE_OR_PAGE
_TABLE_SHIFT = 9
_REGION_SHIFT = PAGE_SHIFT + _TABLE_SHIFT
_INDEX_MASK = TABLE_ENTRIES - 1
_make = tuple.__new__
"""An event, as its class makes it, but without another Python call: see `ownership`."""
_SPARE_PAGES = 16
"""Among them FF-A's two message buffers."""
_MMIO_BYTES = BLOCK_1G


class BusMaster(Protocol):
    """The host CPU's bus, as far as EL2 programs it; `pkvm.machine.bus.Bus` is one."""

    on_fault: Callable[[int, Access, int], bool] | None

    def attach(self, ctx: Stage2Context | None) -> None:
        """Translate by this tree from now on."""
        ...

    def invalidate(self, ipa: int | None = None) -> None:
        """TLBI and DSB: one page, or everything."""
        ...


def tree_pages(nbytes: int, geometry: Geometry) -> int:
    """Table pages of an identity map of `nbytes` at page granularity, wherever they lie."""
    pages = 2 * geometry.root_tables
    for level in range(geometry.start_level, LAST_LEVEL):
        pages += -(-nbytes // level_size(level)) + 1
    return pages


def pool_pages(ram_bytes: int, geometry: Geometry) -> int:
    """Pages of EL2's pool: two trees of all RAM, and some for MMIO (facts §3.5)."""
    return (
        2 * tree_pages(ram_bytes, geometry)
        + _MMIO_BYTES // BLOCK_2M
        + _MMIO_BYTES // BLOCK_1G
        + SMMU_PAGES
        + _SPARE_PAGES
    )


def describe_owner(annotation: int) -> str:
    """Whose a page is by its annotated entry in the host's stage-2, in words."""
    if ANNOTATION["owner"].get(annotation) == Owner.GUEST:
        handle = ANNOTATION["vm"].get(annotation)
        return f"VM {handle:#x} (guest frame {ANNOTATION['gfn'].get(annotation):#x})"
    return "the secure world" if annotation == ANNOTATION_FFA else "EL2"


class HostMemory:
    """The host's tree, and the identity domain that follows it if there is an SMMU. With `enforced`
    False neither is built nor kept, and every page stays reachable: a host that is not in
    protected mode.

    Pages are given by PA (bytes) or PFN and lie in RAM: the callers have checked.
    """

    def __init__(
        self,
        memory: PhysicalMemory,
        vmemmap: Vmemmap,
        pool: PagePool,
        *,
        vtcr: int,
        host_bus: BusMaster,
        smmu: SmmuDriver | None,
        recorder: Recorder,
        enforced: bool,
    ) -> None:
        self.memory = memory
        self.pool = pool
        self.enforced = enforced
        self.host_bus = host_bus
        self._words = memory.words
        self._record = recorder.record
        trees = []
        for vmid, invalidate in (
            (HOST_VMID, self._invalidate_host),
            (IDENTITY_VMID, self._invalidate_dma),
        ):
            root_tables = Geometry(64 - (vtcr & 0x3F)).root_tables
            trees.append(
                Stage2(
                    memory,
                    vmemmap,
                    pool,
                    root=pool.alloc_aligned(root_tables),
                    vmid=vmid,
                    vtcr=vtcr,
                    invalidate=invalidate,
                )
            )
        self.stage2, self.dma = trees
        self.identity: IdentityDomain | None = None
        """None on a machine without an SMMU; then `dma` stays empty."""
        if smmu is not None:
            self._invalidate_dma_page = smmu.invalidate_page
            self.identity = IdentityDomain(
                self.dma, smmu, reserve=lambda: self._reserve(self._most_tables)
            )
        self.smmu = smmu
        self.devices: list[tuple[int, int]] = []
        """(PA, bytes) of the devices that EL2 has for itself."""
        self._walks, self._dma_walks = self.stage2.walks, self.dma.walks
        self._refcount = vmemmap.refcount
        self._most_tables = 2 * (LAST_LEVEL - self.stage2.start_level)

    def withhold(self, pfns: Runs, annotation: int) -> None:
        """Annotate pages that neither the host nor a device has reached before."""
        write(self.stage2, pfns, np.full(pfns.starts.size, annotation, np.uint64), 0)

    def withhold_device(self, base: int, nbytes: int) -> None:
        """Annotate the pages of a device that is EL2's."""
        self.devices.append((base, nbytes))
        for page in range(base, base + nbytes, PAGE_SIZE):
            self.stage2.put(page, ANNOTATION_HYP)

    def take_device(self, base: int, nbytes: int) -> None:
        """The host loses the registers of a device of its own to EL2."""
        for page in range(base, base + nbytes, PAGE_SIZE):
            self._take_anywhere(page, ANNOTATION_HYP)

    def pass_device_page(self, pa: int, annotation: int) -> None:
        """Registers that the host has lost are those of whom the annotation names."""
        self.stage2.put(pa, annotation)

    def give_device(self, base: int, nbytes: int) -> None:
        """The host may use these registers again; it maps them when it touches them."""
        for page in range(base, base + nbytes, PAGE_SIZE):
            self.stage2.put(page, 0)

    def attach(self, on_fault: Callable[[int, Access, int], bool]) -> None:
        """Put the host's bus behind its tree; its faults go to `on_fault`."""
        if not self.enforced:
            return
        self.host_bus.on_fault = on_fault
        self.host_bus.attach(Stage2Context(self.stage2.vttbr, self.stage2.vtcr))
        self._invalidate_host(NO_ADDRESS)

    def take_page(self, pa: int, annotation: int) -> None:
        """The host loses the page at `pa` to the owner that `annotation` names."""
        if not self.enforced:
            return
        # What is nearly always so, in as few calls as possible: both have a table of pages there.
        region, page = pa >> _REGION_SHIFT, pa >> PAGE_SHIFT & _INDEX_MASK
        words = self._words
        first = self._walks.get(region)
        if first is None:
            self._take_anywhere(pa, annotation)
        else:
            entry = words[first + page]
            words[first + page] = annotation
            if entry & VALID:
                self.host_bus.invalidate(pa)
                self._record(_make(Tlbi, (HOST_VMID, pa, "cpu")))
            elif not entry:
                self._refcount[first >> _TABLE_SHIFT] += 1
        first = self._dma_walks.get(region)
        if first is not None:
            words[first + page] = 0
            self._refcount[first >> _TABLE_SHIFT] -= 1
            self._invalidate_dma_page(IDENTITY_VMID, pa)
        elif self.identity is not None:
            self.identity.lose_page(pa)

    def _take_anywhere(self, pa: int, annotation: int) -> None:
        """The host's part of `take_page`, whatever its tree has there."""
        stage2 = self.stage2
        self._reserve(self._most_tables)
        index, entry, level = stage2.find(pa)
        if level == LAST_LEVEL:
            stage2.store(pa, index, entry, annotation)
            if entry & VALID:
                self._invalidate_host(pa)
            return
        if entry & VALID:
            stage2.store(pa, index, entry, 0)
            self._invalidate_host(NO_ADDRESS)
        stage2.put(pa, annotation)

    def give_page(self, pa: int) -> None:
        """The host may use the page at `pa` again, which it had lost."""
        if not self.enforced:
            return
        region, page = pa >> _REGION_SHIFT, pa >> PAGE_SHIFT & _INDEX_MASK
        first = self._walks.get(region)
        if first is None:
            first = self.stage2.find(pa)[0] & ~_INDEX_MASK  # an annotation, and so that of a page
        self._words[first + page] = pa | HOST_PAGE
        first = self._dma_walks.get(region)
        if first is not None:
            self._words[first + page] = pa | DMA_PAGE
            self._refcount[first >> _TABLE_SHIFT] += 1
        elif self.identity is not None:
            self.identity.regain_page(pa)

    def take_runs(self, pfns: Runs, annotations: Entries, step: int) -> None:
        """The host loses these pages to the owners that the annotations name: that of each run's
        first page, and `step` more for each other."""
        if not self.enforced:
            return
        pieces, _ = cut(joined(pfns))
        self._reserve_for(pieces)
        if break_blocks(self.stage2, pieces):
            self._invalidate_host(NO_ADDRESS)
        if write(self.stage2, pfns, annotations, step):
            self._invalidate_host(NO_ADDRESS)
        if self.identity is not None:
            self.identity.lose_runs(pieces)

    def give_runs(self, pfns: Runs) -> None:
        """The host may use these pages again. It maps them lazily, in blocks where nothing else
        of the region is lost."""
        if not self.enforced:
            return
        pieces, _ = cut(joined(pfns))
        self._reserve_for(pieces)
        clear(self.stage2, pieces)
        self._invalidate_host(NO_ADDRESS)
        if self.identity is not None:
            self.identity.regain_runs(pieces)

    def abort(self, ipa: int, access: Access, fsc: int) -> bool:
        """The host CPU faulted at `ipa`. Maps what it may have (True: retry the access), or says
        no (False: the host gets an abort, facts §3.7)."""
        mapped, why = self._resolve(ipa, fsc)
        self._record(HostAbort(ipa, access.value, mapped))
        if not mapped:
            self._record(Refusal("host_access", "host_stage2", Errno.EFAULT, why, pa=ipa, ipa=ipa))
        return mapped

    def _resolve(self, ipa: int, fsc: int) -> tuple[bool, str]:
        stage2 = self.stage2
        if ipa < 0 or ipa >> stage2.ipa_bits:
            return False, "the address is beyond the physical address space"
        _, entry, level = stage2.find(ipa)
        if not entry & VALID and entry:
            return False, f"the page belongs to {describe_owner(entry)}"
        if fsc & ~3 != FSC_TRANSLATION:
            return False, "the mapping does not permit this access"
        if entry:
            return True, ""
        memory = self.memory
        if memory.is_ram(ipa):
            low, high, attr = memory.ram_base, memory.ram_end, ATTR_NORMAL_RWX
        elif ipa < memory.ram_base:
            low, high, attr = 0, memory.ram_base, ATTR_DEVICE_RW
        else:
            low, high, attr = memory.ram_end, 1 << stage2.ipa_bits, ATTR_DEVICE_RW
        self._reserve(self._most_tables)
        for at in BLOCK_LEVELS:
            start = ipa & -level_size(at)
            if at >= level and low <= start and start + level_size(at) <= high:
                stage2.put(start, start | attr, at)
                return True, ""
        page = ipa & -PAGE_SIZE
        stage2.put(page, page | attr | TABLE_OR_PAGE)
        return True, ""

    def _reserve_for(self, pieces: Runs) -> None:
        """As `_reserve`, for these pages, in both trees."""
        regions = distinct(pieces.starts >> _TABLE_SHIFT).size
        self._reserve(2 * regions + self._most_tables * 2)

    def _reserve(self, npages: int) -> None:
        """Have `npages` in the pool before anything changes, if need be by dropping the host's
        MMIO mappings, which fault back. RAM alone never exhausts the pool."""
        if self.pool.available >= npages:
            return
        stage2 = self.stage2
        ram_start = self.memory.ram_base >> PAGE_SHIFT
        ram_end = self.memory.ram_end >> PAGE_SHIFT
        limit = 1 << stage2.ipa_bits - PAGE_SHIFT
        for first, end in ((0, ram_start), (ram_end, limit)):
            if first < end:
                found = leaves(stage2, first, end - first)
                mapped = found.entries & np.uint64(VALID) != 0
                clear_leaves(stage2, Leaves(*(column[mapped] for column in found)))
        self._invalidate_host(NO_ADDRESS)

    def _invalidate_host(self, ipa: int) -> None:
        self.host_bus.invalidate(None if ipa == NO_ADDRESS else ipa)
        self._record(Tlbi(HOST_VMID, ipa))

    def _invalidate_dma(self, ipa: int) -> None:
        """Of the whole identity domain: its tree asks only when a block is split."""
        assert self.smmu is not None
        self.smmu.invalidate_all(IDENTITY_VMID)
