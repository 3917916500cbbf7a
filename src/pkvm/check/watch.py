# SPDX-License-Identifier: GPL-2.0-or-later
"""The invariants after each transition, of the pages that it was about.

`Watch.look` takes what EL2 announced of a transition and checks P1 to P9 for its
pages alone: their records, their entries in every tree that may have one, the
tables that these entries are in, what the buses cache. It knows what was private
before, so it is P7's watch too. What a transition broke elsewhere only
`invariants.check` sees, to which a transition of many pages is left as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from pkvm.arm64.stage2 import (
    ADDRESS_MASK,
    ANNOTATION_FFA,
    ANNOTATION_HYP,
    ATTR_NORMAL_RWX,
    LAST_LEVEL,
    PAGE_SHIFT,
    PAGE_SIZE,
    SW_STATE_MASK,
    SW_STATE_SHIFT,
    TABLE_ENTRIES,
    TABLE_OR_PAGE,
    VALID,
    PageState,
    guest_annotation,
    is_leaf,
    level_shift,
    level_size,
)
from pkvm.check.invariants import Scratch, check
from pkvm.events import Transition
from pkvm.hyp.identity_domain import ATTR_DMA, IDENTITY_VMID
from pkvm.hyp.mem_protect import GuestMemory, MemProtect
from pkvm.hyp.pgtable import Stage2
from pkvm.hyp.vmemmap import (
    GUEST_OWNED,
    GUEST_SHARED_WITH_HOST,
    HOST_OWNED,
    HOST_PINNED,
    HOST_SHARED,
    HOST_SHARED_WITH_HYP,
    HYP_OWNED,
    SECURE_OWNED,
)
from pkvm.machine.bus import Bus

_LOST = (HYP_OWNED, GUEST_OWNED, SECURE_OWNED)
_GUEST_STATE = {
    GUEST_OWNED: PageState.OWNED,
    GUEST_SHARED_WITH_HOST: PageState.SHARED_OWNED,
    HOST_SHARED: PageState.SHARED_BORROWED,
}
"""What the guest's leaf says of a page, by the page's record."""
_KNOWN = frozenset((*_LOST, HOST_OWNED, HOST_PINNED, HOST_SHARED_WITH_HYP, *_GUEST_STATE))
_COUNTED = (HYP_OWNED, HOST_SHARED_WITH_HYP, HOST_PINNED)
"""States with a refcount."""
_SHIFTS = tuple(level_shift(level) for level in range(LAST_LEVEL + 1))
_INDEX_MASK = TABLE_ENTRIES - 1
_TYPE = 3
FEW = 32
"""Of more pages than this not each is looked at by itself."""


class Watch:
    """Knows which pages were private, and looks at the pages of each transition.

    Made when all is well, from then on it must see every transition. `find_vm` knows the VMs by
    handle, `vms` all of them. Called with EL2's lock held, or when nothing else happens.
    """

    def __init__(
        self,
        mem: MemProtect,
        find_vm: Callable[[int], GuestMemory | None],
        vms: Callable[[], Iterable[GuestMemory]],
    ) -> None:
        self._mem = mem
        self._find_vm = find_vm
        self._vms = vms
        self._scratch = Scratch()
        self._words = mem.memory.words
        self._base = mem.memory.ram_base
        self._grid = mem.memory.u64.reshape(-1, TABLE_ENTRIES)
        self._private = bytearray((mem.vmemmap.states == GUEST_OWNED).tobytes())
        """By page number within RAM: 1 if it was private when last looked at."""
        self.secure: set[int] = set()
        """PFNs that the host gave to the secure world."""
        bus = mem.host.host_bus
        self._bus = bus if isinstance(bus, Bus) and mem.protected else None
        self._smmu = mem.smmu.hardware if mem.smmu is not None and mem.protected else None

    def look(self, event: Transition) -> list[str]:
        """What is wrong with the pages of a transition that has just happened, in words."""
        first = event.pa >> PAGE_SHIFT
        if event.op in ("host_share_ffa", "host_donate_ffa"):
            self.secure.update(range(first, first + event.npages))
        elif event.op in ("host_unshare_ffa", "host_reclaim_ffa"):
            self.secure.difference_update(range(first, first + event.npages))
        if event.npages > FEW:
            return self._look_at_many(event)
        problems: list[str] = []
        vm = self._find_vm(event.vm) if event.vm else None
        for offset in range(0, event.npages << PAGE_SHIFT, PAGE_SIZE):
            self._look(event.pa + offset, vm, event.ipa + offset, problems)
        return problems

    def _look_at_many(self, event: Transition) -> list[str]:
        """Of many pages: everything there is, and whether those that were private are empty."""
        states = self._mem.vmemmap.states
        first = event.pa - self._base >> PAGE_SHIFT
        part = slice(first, first + event.npages)
        now = states[part]
        was_private = np.frombuffer(self._private, np.bool_)[part]
        freed = was_private & ((now == HOST_OWNED) | (now == HOST_SHARED_WITH_HYP))
        left = freed & self._grid[part].any(axis=1) if freed.any() else freed
        problems = [
            f"P7: PA {event.pa + (offset << PAGE_SHIFT):#x} was private and is not zero"
            for offset in np.flatnonzero(left).tolist()
        ]
        self._private[part] = (now == GUEST_OWNED).tobytes()
        return problems + check(self._mem, self._vms(), self.secure, self._scratch)

    def _look(self, pa: int, vm: GuestMemory | None, ipa: int, problems: list[str]) -> None:
        """One page, which the VM has, or had, at byte `ipa`."""
        vmemmap = self._mem.vmemmap
        page = pa - self._base >> PAGE_SHIFT
        state = vmemmap.state[page]
        lost = state in _LOST
        if state not in _KNOWN:
            problems.append(f"P2: PA {pa:#x} has the impossible states {state:#x}")
        if vm is not None:
            self._look_at_guest(pa, state, vm, ipa, problems)
        if self._mem.protected:
            self._look_at_identity(pa, state, lost, vm, ipa, problems)
        if state != HOST_SHARED and vmemmap.share_count[page]:
            problems.append(f"P6: PA {pa:#x} has a share count, against its state")
        if vmemmap.refcount[page] and state not in _COUNTED and not self._is_mapped(state):
            problems.append(f"refcounts: PA {pa:#x} is neither EL2's nor shared with it")
        if self._private[page]:
            if state in (HOST_OWNED, HOST_SHARED_WITH_HYP) and self._grid[page].any():
                problems.append(f"P7: PA {pa:#x} was private and is not zero")
            self._private[page] = state == GUEST_OWNED
        elif state == GUEST_OWNED:
            self._private[page] = 1

    def _is_mapped(self, state: int) -> bool:
        """Whether a page of that state may be mapped by a guest for its device's DMA."""
        return state == GUEST_OWNED and any(one.vm for one in self._mem.domains.values())

    def _look_at_guest(
        self, pa: int, state: int, vm: GuestMemory, ipa: int, problems: list[str]
    ) -> None:
        """P1 and P2: the guest's leaf and the record say the same."""
        index, entry, level = self._walk(vm.stage2, ipa)
        maps = is_leaf(entry, level)
        if maps:
            maps = (entry & ADDRESS_MASK) + (ipa & level_size(level) - 1) == pa
        should = _GUEST_STATE.get(state)
        if maps and (should is None or entry & SW_STATE_MASK != should << SW_STATE_SHIFT):
            problems.append(
                f"P2: VM {vm.handle:#x} has IPA {ipa:#x} with state {entry >> SW_STATE_SHIFT & 3}, "
                f"but the record of PA {pa:#x} says {state:#x}"
            )
        elif not maps and state in (GUEST_OWNED, GUEST_SHARED_WITH_HOST):
            problems.append(f"P1: PA {pa:#x} is VM {vm.handle:#x}'s, which has it not")
        self._look_at_table(index, problems)

    def _look_at_identity(
        self,
        pa: int,
        state: int,
        lost: bool,
        vm: GuestMemory | None,
        ipa: int,
        problems: list[str],
    ) -> None:
        """P3, P4, P8 and P9: what the host and the devices reach."""
        host = self._mem.host
        index, entry, level = self._walk(host.stage2, pa)
        self._look_at_table(index, problems)
        if not lost:
            if entry and entry != _identity(pa, level, ATTR_NORMAL_RWX):
                problems.append(f"P3: the host's entry for {pa:#x} is {entry:#x}")
        elif entry & VALID or not entry:
            problems.append(f"P3: PA {pa:#x} is lost to the host, but its entry is {entry:#x}")
        elif state == HYP_OWNED:
            if entry != ANNOTATION_HYP:
                problems.append(f"P4: PA {pa:#x} is annotated {entry:#x}, but EL2's")
        elif state == SECURE_OWNED:
            if entry != ANNOTATION_FFA:
                problems.append(f"P4: PA {pa:#x} is annotated {entry:#x}, but the secure world's")
        elif vm is not None and entry != guest_annotation(vm.handle, ipa >> PAGE_SHIFT):
            problems.append(f"P4: PA {pa:#x} is annotated {entry:#x}, but VM {vm.handle:#x}'s")
        if lost and self._bus is not None:
            for bus in (self._bus, *self._bus.peers):
                if bus.context is not None and bus.holds(pa):
                    problems.append(f"P9: the {bus.name} TLB still has {pa:#x}")
        if self._smmu is None:
            return
        index, entry, level = self._walk(host.dma, pa)
        self._look_at_table(index, problems)
        if entry != (0 if lost else _identity(pa, level, ATTR_DMA)):
            problems.append(f"P8: PA {pa:#x} has DMA entry {entry:#x}")
        if lost and self._smmu.holds(IDENTITY_VMID, pa):
            problems.append(f"P9: the dma TLB still has {pa:#x}")

    def _look_at_table(self, index: int, problems: list[str]) -> None:
        """P5: the table that the word of that index is in."""
        page = index >> 9
        vmemmap = self._mem.vmemmap
        used = int(np.count_nonzero(self._grid[page]))
        if vmemmap.refcount[page] != used + 1 or vmemmap.state[page] != HYP_OWNED:
            pa = self._base + page * PAGE_SIZE
            problems.append(f"P5: table {pa:#x} has {used} entries, refcount, or not EL2's page")

    def _walk(self, stage2: Stage2, ipa: int) -> tuple[int, int, int]:
        """Where a walk ends: index of the entry in `memory.words`, entry, level."""
        words, base = self._words, self._base
        level = stage2.start_level
        index = (stage2.root - base >> 3) + (ipa >> _SHIFTS[level])
        entry = words[index]
        while entry & _TYPE == _TYPE and level < LAST_LEVEL:
            level += 1
            index = ((entry & ADDRESS_MASK) - base >> 3) + (ipa >> _SHIFTS[level] & _INDEX_MASK)
            entry = words[index]
        return index, entry, level


def _identity(pa: int, level: int, attributes: int) -> int:
    """The entry that maps `pa` to itself at `level`."""
    if level == LAST_LEVEL:
        return pa | attributes | TABLE_OR_PAGE
    return pa & -level_size(level) | attributes
