# SPDX-License-Identifier: GPL-2.0-or-later
"""What must hold of memory between any two transitions (facts §11.3).

`check` reads EL2's records and every stage-2 tree and says in words what is
wrong; an empty list is the good news. It walks the trees with the machine's
walker, not with EL2's own, so that one mistake does not hide another.

P7 is about a change and not a state: `PrivacyWatch` looks at memory before and
after. P10 (a refused call changes nothing) is `Snapshot`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from pkvm.arm64.stage2 import (
    ADDRESS_MASK,
    ANNOTATION_HYP,
    ANNOTATION_MMIO,
    ANNOTATION_POISONED,
    ATTR_DEVICE_RW,
    ATTR_NORMAL_RWX,
    LAST_LEVEL,
    PAGE_SHIFT,
    PAGE_SIZE,
    SW_STATE_MASK,
    SW_STATE_SHIFT,
    TABLE_OR_PAGE,
    VALID,
    PageState,
    guest_annotation,
    is_leaf,
    level_size,
)
from pkvm.hyp.host_memory import ATTR_DMA
from pkvm.hyp.mem_protect import GuestMemory, MemProtect
from pkvm.hyp.pgtable import Stage2
from pkvm.hyp.vmemmap import (
    GUEST_OWNED,
    GUEST_SHARED_WITH_HOST,
    HOST_OWNED,
    HOST_SHARED,
    HOST_SHARED_WITH_HYP,
    HYP_OWNED,
)
from pkvm.machine.bus import Bus
from pkvm.machine.stage2 import Stage2Context, Stage2Fault, iter_leaves, iter_tables, walk

MAX_PROBLEMS = 20
"""Of each rule, so that one broken range does not drown the others."""


@dataclass(frozen=True, slots=True)
class GuestPage:
    """A page that a guest's stage-2 maps."""

    handle: int
    gfn: int
    page: int
    """Page number within RAM."""
    state: PageState
    descriptor: int


class View:
    """One look at memory: the states, and each tree flattened to pages of RAM."""

    def __init__(
        self, mem: MemProtect, vms: Iterable[GuestMemory], secure: Iterable[int] = ()
    ) -> None:
        self.mem = mem
        self.vms = list(vms)
        self.secure = np.array(list(secure), np.int64) - (mem.memory.ram_base >> PAGE_SHIFT)
        self.npages = mem.vmemmap.npages
        self.states = mem.vmemmap.states.copy()
        self.trees: dict[str, Stage2] = {}
        if mem.protected:
            self.trees = {"host": mem.host.stage2, "dma": mem.host.dma}
        self.trees |= {f"VM {vm.handle:#x}": vm.stage2 for vm in self.vms}
        self.problems: list[str] = []
        self.host = self._identity("host") if mem.protected else None
        self.dma = self._identity("dma") if mem.protected else None
        self.guest_pages = [page for vm in self.vms for page in self._guest_pages(vm)]

    def pa(self, page: int) -> int:
        """PA of a page number within RAM."""
        return self.mem.memory.ram_base + (page << PAGE_SHIFT)

    def pages(self, where: npt.NDArray[np.bool_]) -> Iterator[int]:
        """Page numbers where the mask is set."""
        yield from np.flatnonzero(where).tolist()

    def _identity(self, name: str) -> npt.NDArray[np.uint64]:
        """The entry that each page of RAM has in an identity tree, as if it were a page entry; 0
        where none. Notes what is valid and no identity."""
        memory = self.mem.memory
        attributes = {"host": ATTR_NORMAL_RWX, "dma": ATTR_DMA}[name]
        entries = np.zeros(self.npages, np.uint64)
        for ipa, level, entry in iter_leaves(memory, context(self.trees[name])):
            size = level_size(level)
            if not memory.is_ram(ipa, size):
                if name == "dma" or entry & VALID == 0:
                    self.problems.append(f"P8: the {name} tree has an entry for {ipa:#x}, no RAM")
                elif not is_leaf(entry, level) or entry & ~TABLE_OR_PAGE != ipa | ATTR_DEVICE_RW:
                    self.problems.append(f"P3: the host's device entry for {ipa:#x} is {entry:#x}")
                continue
            first = (ipa - memory.ram_base) >> PAGE_SHIFT
            entries[first : first + (size >> PAGE_SHIFT)] = entry
            page_bit = TABLE_OR_PAGE if level == LAST_LEVEL else 0
            if entry & VALID and entry != ipa | attributes | page_bit:
                self.problems.append(f"P3: the {name} tree's entry for {ipa:#x} is {entry:#x}")
        return entries

    def _guest_pages(self, vm: GuestMemory) -> Iterator[GuestPage]:
        memory = self.mem.memory
        for ipa, level, entry in iter_leaves(memory, context(vm.stage2)):
            where = f"VM {vm.handle:#x} at IPA {ipa:#x}"
            pa, size = entry & ADDRESS_MASK, level_size(level)
            if entry in (ANNOTATION_POISONED, ANNOTATION_MMIO) and level == LAST_LEVEL:
                continue
            if not is_leaf(entry, level):
                self.problems.append(f"P2: {where} has the strange entry {entry:#x}")
            elif not memory.is_ram(pa, size):
                self.problems.append(f"P1: {where} maps PA {pa:#x}, no RAM")
            else:
                state = PageState((entry & SW_STATE_MASK) >> SW_STATE_SHIFT)
                first = (pa - memory.ram_base) >> PAGE_SHIFT
                for offset in range(size >> PAGE_SHIFT):
                    gfn = (ipa >> PAGE_SHIFT) + offset
                    yield GuestPage(vm.handle, gfn, first + offset, state, entry)


def context(stage2: Stage2) -> Stage2Context:
    """The registers that select a tree, as a bus master has them."""
    return Stage2Context(stage2.vttbr, stage2.vtcr)


def check(mem: MemProtect, vms: Iterable[GuestMemory], secure: Iterable[int] = ()) -> list[str]:
    """What is wrong with memory, in words, each with the property that it breaks.

    `vms` must be all VMs whose stage-2 exists, `secure` the PFNs that the host shares with the
    secure world. Takes EL2's lock; meant for tests, costs some 1 us a leaf.
    """
    with mem.lock:
        view = View(mem, vms, secure)
        problems = view.problems[:MAX_PROBLEMS]
        for name, rule in RULES.items():
            problems += [f"{name}: {text}" for text in islice(rule(view), MAX_PROBLEMS)]
        return problems


def single_owner(view: View) -> Iterator[str]:
    """P1: a page has exactly one owner among the host, EL2 and the protected guests."""
    owners = np.isin(view.states, (HOST_OWNED, HOST_SHARED_WITH_HYP, HOST_SHARED))
    count = owners.astype(np.int64) + (view.states == HYP_OWNED)
    for guest in view.guest_pages:
        if guest.state in (PageState.OWNED, PageState.SHARED_OWNED):
            count[guest.page] += 1
    for page in view.pages(count != 1):
        yield f"PA {view.pa(page):#x} has {count[page]} owners"


def borrowed_from_lender(view: View) -> Iterator[str]:
    """P2: who borrows has a lender, and both call it so."""
    expected = {
        PageState.OWNED: GUEST_OWNED,
        PageState.SHARED_OWNED: GUEST_SHARED_WITH_HOST,
        PageState.SHARED_BORROWED: HOST_SHARED,
    }
    shared = view.states == GUEST_SHARED_WITH_HOST
    for guest in view.guest_pages:
        if view.states[guest.page] != expected.get(guest.state):
            yield (
                f"VM {guest.handle:#x} has gfn {guest.gfn:#x} as {guest.state.name}, but the "
                f"record of PA {view.pa(guest.page):#x} says {view.states[guest.page]:#x}"
            )
        shared[guest.page] &= guest.state != PageState.SHARED_OWNED
    for page in view.pages(shared):
        yield f"the host borrows PA {view.pa(page):#x} of nobody"
    known = (
        HOST_OWNED, HYP_OWNED, HOST_SHARED_WITH_HYP, HOST_SHARED, GUEST_OWNED,
        GUEST_SHARED_WITH_HOST,
    )  # fmt: skip
    for page in view.pages(~np.isin(view.states, known)):
        yield f"PA {view.pa(page):#x} has the impossible states {view.states[page]:#x}"


def host_tree(view: View) -> Iterator[str]:
    """P3: the host's stage-2 maps no page that the host may not access, and what the host lost is
    annotated; what it may access is mapped or will be at its first fault."""
    if view.host is None:
        return
    lost = np.isin(view.states, (HYP_OWNED, GUEST_OWNED))
    valid = view.host & np.uint64(VALID) != 0
    annotated = ~valid & (view.host != 0)
    for page in view.pages(lost & ~annotated):
        yield f"PA {view.pa(page):#x} is lost to the host, but its entry is {view.host[page]:#x}"
    for page in view.pages(~lost & annotated):
        yield f"PA {view.pa(page):#x} is the host's to use, but its entry is {view.host[page]:#x}"


def owners_named(view: View) -> Iterator[str]:
    """P4: an annotation names the owner, and a guest's leaf at that frame maps the page."""
    if view.host is None:
        return
    expected = np.zeros(view.npages, np.uint64)
    expected[view.states == HYP_OWNED] = ANNOTATION_HYP
    for guest in view.guest_pages:
        if guest.state == PageState.OWNED:
            expected[guest.page] = guest_annotation(guest.handle, guest.gfn)
    actual = np.where(view.host & np.uint64(VALID) != 0, np.uint64(0), view.host)
    for page in view.pages(actual != expected):
        yield (
            f"PA {view.pa(page):#x} is annotated {actual[page]:#x} and should be "
            f"{expected[page]:#x}"
        )


def tables(view: View) -> Iterator[str]:
    """P5: a table is EL2's page, is used once, is not empty, and its refcount is 1 plus its
    entries; a page in a memcache is EL2's, in one only, and has refcount 0."""
    memory = view.mem.memory
    used: dict[int, str] = {}

    def use(pa: int, what: str) -> Iterator[str]:
        if pa in used:
            yield f"PA {pa:#x} is {what} and {used[pa]}"
        used[pa] = what
        if view.states[(pa - memory.ram_base) >> PAGE_SHIFT] != HYP_OWNED:
            yield f"PA {pa:#x} is {what}, but not EL2's page"

    for name, stage2 in view.trees.items():
        root_end = stage2.root + stage2.root_tables * PAGE_SIZE
        for pa in iter_tables(memory, context(stage2)):
            yield from use(pa, f"a table of {name}")
            entries = int(np.count_nonzero(memory.table(pa)))
            refcount = int(view.mem.vmemmap.refcounts[(pa - memory.ram_base) >> PAGE_SHIFT])
            if refcount != 1 + entries:
                yield f"table {pa:#x} of {name} has {entries} entries, refcount {refcount}"
            if not entries and not stage2.root <= pa < root_end:
                yield f"table {pa:#x} of {name} is empty"
    caches = {f"in the memcache of VM {vm.handle:#x}": vm.memcache for vm in view.vms}
    for what, cache in {"in EL2's pool": view.mem.pool, **caches}.items():
        for pa in cache.pages():
            yield from use(pa, what)
            if view.mem.vmemmap.refcounts[(pa - memory.ram_base) >> PAGE_SHIFT]:
                yield f"PA {pa:#x} is {what} and has a refcount"
            if memory.table(pa)[1:].any():
                yield f"PA {pa:#x} is {what} and not zero"


def share_counts(view: View) -> Iterator[str]:
    """P6: a page's share count is the number of leaves of non-protected VMs that map it, and it is
    lent if and only if there is one."""
    borrowers = [page.page for page in view.guest_pages if page.state == PageState.SHARED_BORROWED]
    expected = np.bincount(np.array(borrowers, np.int64), minlength=view.npages)
    counts = view.mem.vmemmap.share_counts
    for page in view.pages(counts != expected):
        yield f"PA {view.pa(page):#x} has share count {counts[page]}, and {expected[page]} leaves"
    lent = counts != 0
    lent[view.secure] = True
    for page in view.pages((view.states == HOST_SHARED) != lent):
        yield f"PA {view.pa(page):#x} has share count {counts[page]}, against its state"


def dma_tree(view: View) -> Iterator[str]:
    """P8: devices reach exactly the RAM that the host may access."""
    if view.dma is None:
        return
    lost = np.isin(view.states, (HYP_OWNED, GUEST_OWNED))
    for page in view.pages(lost != (view.dma == 0)):
        yield f"PA {view.pa(page):#x} has DMA entry {view.dma[page]:#x}"


def bus_tlbs(view: View) -> Iterator[str]:
    """P9: no bus keeps a translation that its tables do not give any more."""
    if not view.mem.protected:
        return
    host = view.mem.host
    for bus, stage2 in ((host.host_bus, host.stage2), (host.dma_bus, host.dma)):
        if not isinstance(bus, Bus) or bus.context is None:
            continue
        for cached in bus.tlb_entries():
            try:
                for ipa in range(cached.ipa, cached.ipa + cached.size, PAGE_SIZE):
                    found = walk(view.mem.memory, context(stage2), ipa, cached.access)
                    if found.pa - ipa != cached.pa - cached.ipa:
                        yield f"the {bus.name} TLB leads {ipa:#x} astray"
                        break
                    if level_size(found.level) >= cached.size:
                        break
            except Stage2Fault as fault:
                yield f"the {bus.name} TLB still has {fault.ipa:#x}"


def own_regions(view: View) -> Iterator[str]:
    """P5: the carve-out and the firmware region are EL2's for ever."""
    memory = view.mem.memory
    for region in (view.mem.carveout, view.mem.firmware):
        if region is not None:
            first = (region[0] - memory.ram_base) >> PAGE_SHIFT
            states = view.states[first : first + (region[1] >> PAGE_SHIFT)]
            for offset in np.flatnonzero(states != HYP_OWNED).tolist():
                yield f"PA {view.pa(first + offset):#x} of EL2's own memory is not EL2's"


def pins(view: View) -> Iterator[str]:
    """Refcounts are for pages of EL2's and for pins of pages shared with it, nothing else."""
    may = np.isin(view.states, (HYP_OWNED, HOST_SHARED_WITH_HYP))
    for page in view.pages((view.mem.vmemmap.refcounts != 0) & ~may):
        yield f"PA {view.pa(page):#x} has a refcount and is neither EL2's nor shared with it"


RULES: dict[str, Callable[[View], Iterator[str]]] = {
    "P1": single_owner,
    "P2": borrowed_from_lender,
    "P3": host_tree,
    "P4": owners_named,
    "P5": tables,
    "P5 (own memory)": own_regions,
    "P6": share_counts,
    "P8": dma_tree,
    "P9": bus_tlbs,
    "refcounts": pins,
}


class PrivacyWatch:
    """P7: a page that leaves a guest's exclusive ownership, other than by the guest's own sharing,
    is zero before the host can read it. Look once, let a transition happen, look again."""

    def __init__(self) -> None:
        self._private: npt.NDArray[np.bool_] | None = None

    def look(self, mem: MemProtect) -> list[str]:
        """What the pages that were private at the last look give away now."""
        with mem.lock:
            states = mem.vmemmap.states
            problems = []
            if self._private is not None:
                freed = self._private & np.isin(states, (HOST_OWNED, HOST_SHARED_WITH_HYP))
                for page in np.flatnonzero(freed).tolist():
                    pa = mem.memory.ram_base + (page << PAGE_SHIFT)
                    if mem.memory.table(pa).any():
                        problems.append(f"P7: PA {pa:#x} was private and is not zero")
            self._private = states == GUEST_OWNED
            return problems


class Snapshot:
    """P10: everything that EL2 keeps of memory, to be compared with later.

    The carve-out, every guest table and memcache page byte for byte, and what the buses cache.
    """

    def __init__(self, mem: MemProtect, vms: Iterable[GuestMemory]) -> None:
        with mem.lock:
            memory = mem.memory
            self._parts: dict[str, object] = {"carve-out": memory.read(*mem.carveout)}
            self._parts["pool"] = mem.pool.available
            for vm in vms:
                name = f"VM {vm.handle:#x}"
                self._parts[f"{name}'s memcache"] = vm.memcache.pages()
                for pa in [*iter_tables(memory, context(vm.stage2)), *vm.memcache.pages()]:
                    self._parts[f"{name}'s page {pa:#x}"] = memory.read(pa, PAGE_SIZE)
            for bus in (mem.host.host_bus, mem.host.dma_bus):
                if isinstance(bus, Bus):
                    self._parts[f"the {bus.name} TLB"] = sorted(
                        bus.tlb_entries(), key=lambda entry: (entry.ipa, entry.access.value)
                    )

    def differences(self, later: Snapshot) -> list[str]:
        """Names of the parts that differ."""
        names = sorted(self._parts.keys() | later._parts.keys())
        return [name for name in names if self._parts.get(name) != later._parts.get(name)]
