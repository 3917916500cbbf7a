# SPDX-License-Identifier: GPL-2.0-or-later
"""VMs that die at any point of their lives: everything they had comes back (P14).

A host of hypercalls alone makes VMs, half-made ones too, gives them memory, lets
their guests share and give up pages, takes some by force, and kills any of them
at any time, in steps between which it goes on with the others. At the end the
census is what it was at the start.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from fakes.el2_rig import El2
from pkvm.check.census import census
from pkvm.hyp.abi import (
    HOST_CALL_BASE,
    VCPU_AREA_BYTES,
    VM_AREA_BYTES,
    HostCall,
    HostVcpu,
    HostVm,
)
from pkvm.hyp.errors import Refused
from pkvm.hyp.vm import Vm

PAGE = 4096
GFN = 0x40000
MAX_VMS = 3
ROOT_PAGES = 2

index_of_vm = st.integers(0, MAX_VMS - 1)
gfns = st.sampled_from([0, 1, 2, 5, 511, 512, 513, 1024, 1535]).map(lambda at: GFN + at)
sizes = st.sampled_from([1, 1, 2, 7, 512, 600])


@dataclass
class Guest:
    """What the host knows of a VM."""

    handle: int
    protected: bool
    pages: list[int]
    """PFNs of pages shared with EL2: the VM's own, then the vCPUs'."""
    vcpus: int = 0
    dying: bool = False
    has: dict[int, int] = field(default_factory=dict)
    """gfn -> PFN of what was given or lent."""
    gone: set[int] = field(default_factory=set)
    """gfns that the guest has lost again."""
    leaves: dict[int, int] = field(default_factory=dict)
    """Lent: first gfn -> pages."""


class Death(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.el2 = El2()
        self.mem = self.el2.hyp.mem
        self.first = self.el2.machine.memory.ram_base >> 12
        self.start = census(self.mem, [])
        self.guests: list[Guest | None] = [None] * MAX_VMS
        self.npages = (self.el2.firmware_pa >> 12) - self.first

    def teardown(self) -> None:
        for guest in self.guests:
            if guest is not None:
                self.finish(guest)
        assert census(self.mem, self.el2.hyp.vms()) == self.start
        self.el2.sound()
        self.el2.machine.close()

    # The host

    def find(self, npages: int, align: int = 1) -> int:
        """PFN of pages that the host owns."""
        free = self.mem.vmemmap.states[: self.npages] == 0
        for page in range(0, self.npages - npages, align):
            if free[page : page + npages].all():
                return self.first + page
        raise AssertionError("no pages left")

    def call(self, call: HostCall, *args: int) -> int:
        """X1, whatever it is; all must be well then."""
        _, result, *_ = self.el2.hyp.host_call(HOST_CALL_BASE + call, *args)
        self.el2.sound()
        return result

    def shared_page(self, words: dict[int, int]) -> int:
        pfn = self.find(1)
        self.el2.bus.write(pfn << 12, bytes(PAGE))
        for offset, value in words.items():
            self.el2.bus.write_u64((pfn << 12) + offset, value)
        assert self.call(HostCall.HOST_SHARE_HYP, pfn) == 0
        return pfn

    def el2s(self, guest: Guest) -> Vm:
        vm = self.el2.hyp.table.find(guest.handle)
        assert vm is not None
        return vm

    def alive(self, index: int, *, protected: bool | None = None) -> Guest | None:
        guest = self.guests[index]
        if guest is None or guest.dying:
            return None
        return guest if protected in (None, guest.protected) else None

    # Lives

    @initialize(block=st.booleans(), shared=st.booleans())
    def populate(self, block: bool, shared: bool) -> None:
        """Start where something can happen: two VMs with memory."""
        for index, protected in ((0, True), (1, False)):
            self.create(index, protected, None)
            self.add_vcpu(index, False)
            self.topup(index, 6)
            self.give(index, GFN if block else GFN + 1, 512 if block else 7)
        if shared:
            self.guest_acts(0, GFN + 1, 2, 0)

    @rule(
        index=index_of_vm,
        protected=st.booleans(),
        spoilt=st.sampled_from([None, None, None, "pgd", "area"]),
    )
    def create(self, index: int, protected: bool, spoilt: str | None) -> None:
        if self.guests[index] is not None:
            return
        handle = self.call(HostCall.RESERVE_VM)
        words = {HostVm.HANDLE: handle, HostVm.PROTECTED: protected, HostVm.CREATED_VCPUS: 2}
        page = self.shared_page(words)
        root = self.find(ROOT_PAGES, ROOT_PAGES)
        area = self.find(VM_AREA_BYTES // PAGE)
        while root <= area < root + ROOT_PAGES:
            root += ROOT_PAGES
        if spoilt == "pgd":
            root += 1
        elif spoilt == "area":
            area = page
        result = self.call(HostCall.INIT_VM, page << 12, area << 12, root << 12)
        assert (result == 0) == (spoilt is None)
        if spoilt is None:
            self.guests[index] = Guest(handle, protected, [page])
            return
        self.call(HostCall.UNRESERVE_VM, handle)
        assert self.call(HostCall.HOST_UNSHARE_HYP, page) == 0

    @rule(index=index_of_vm, spoilt=st.sampled_from([False, False, True]))
    def add_vcpu(self, index: int, spoilt: bool) -> None:
        guest = self.alive(index)
        if guest is None or guest.vcpus == 2:
            return
        number = 7 if spoilt else guest.vcpus
        page = self.shared_page({HostVcpu.VCPU_ID: number, HostVcpu.VCPU_IDX: number})
        area = self.find(VCPU_AREA_BYTES // PAGE)
        result = self.call(HostCall.INIT_VCPU, guest.handle, page << 12, area << 12)
        assert (result == 0) != spoilt
        if spoilt:
            assert self.call(HostCall.HOST_UNSHARE_HYP, page) == 0
        else:
            guest.pages.append(page)
            guest.vcpus += 1

    @rule(index=index_of_vm, nr=st.integers(1, 6))
    def topup(self, index: int, nr: int) -> None:
        guest = self.alive(index)
        if guest is not None:
            pfn = self.find(nr)
            head = self.el2.link([pfn + at << 12 for at in range(nr)])
            assert self.call(HostCall.TOPUP_MEMCACHE, guest.handle, head, nr) == nr

    @rule(index=index_of_vm, gfn=gfns, nr=sizes)
    def give(self, index: int, gfn: int, nr: int) -> None:
        guest = self.alive(index)
        if guest is None or not guest.vcpus:
            return
        self.call(HostCall.VCPU_LOAD, guest.handle, 0, 0)
        if guest.protected:
            pfn = self.find(nr, 512 if nr >= 512 else 1)
            result = self.call(HostCall.HOST_DONATE_GUEST, pfn, gfn, nr)
        else:
            nr = 512 if nr >= 512 else 1
            gfn &= -nr
            pfn = self.find(nr, nr)
            result = self.call(HostCall.HOST_SHARE_GUEST, pfn, gfn, nr, 7)
        if result == 0:
            self.el2.machine.memory.write_u64(pfn << 12, 0x5EC2E7)
            guest.has.update({gfn + at: pfn + at for at in range(nr)})
            guest.leaves[gfn] = nr
        self.call(HostCall.VCPU_PUT)

    @rule(index=index_of_vm, gfn=gfns, nr=sizes, what=st.integers(0, 2))
    def guest_acts(self, index: int, gfn: int, nr: int, what: int) -> None:
        guest = self.alive(index, protected=True)
        if guest is None:
            return
        vm = self.el2s(guest)
        try:
            if what == 0:
                self.mem.guest_share_host(vm, gfn << 12, nr)
            elif what == 1:
                self.mem.guest_unshare_host(vm, gfn << 12, nr)
            elif self.mem.guest_relinquish_host(vm, gfn << 12) is not None:
                guest.gone.add(gfn)
        except Refused:
            pass
        self.el2.sound()

    @rule(number=st.integers(0, 2000), what=st.integers(0, 3), nr=st.sampled_from([1, 1, 3]))
    def with_what_it_has(self, number: int, what: int, nr: int) -> None:
        """As `guest_acts` and `force`, where the guest has memory."""
        mine = [
            (index, gfn)
            for index, guest in enumerate(self.guests)
            if guest is not None and guest.protected
            for gfn in sorted(guest.has.keys() - guest.gone)
        ]
        if mine:
            index, gfn = mine[number % len(mine)]
            if what == 3:
                self.force(index, gfn)
            else:
                self.guest_acts(index, gfn, nr, what)

    @rule(index=index_of_vm, gfn=gfns)
    def force(self, index: int, gfn: int) -> None:
        """Even while it dies."""
        guest = self.guests[index]
        if guest is not None and guest.protected and gfn in guest.has and gfn not in guest.gone:
            pa = guest.has[gfn] << 12
            if self.call(HostCall.FORCE_RECLAIM_GUEST_PAGE, pa) == 0:
                guest.gone.add(gfn)

    # Deaths

    @rule(index=index_of_vm)
    def start_dying(self, index: int) -> None:
        guest = self.alive(index)
        if guest is not None:
            assert self.call(HostCall.START_TEARDOWN_VM, guest.handle) == 0
            guest.dying = True

    @rule(index=index_of_vm, gfn=gfns, nr=sizes)
    def die_a_little(self, index: int, gfn: int, nr: int) -> None:
        self.start_dying(index)
        guest = self.guests[index]
        if guest is None:
            return
        if self.mem.has_pages(self.el2s(guest)):
            assert self.call(HostCall.FINALIZE_TEARDOWN_VM, guest.handle) == -errno.EBUSY
        if not guest.protected:
            if guest.leaves:
                self.unlend(guest, min(guest.leaves))
            return
        if nr == 1:
            self.call(HostCall.RECLAIM_DYING_GUEST_PAGE, guest.handle, gfn)
        else:
            self.call(HostCall.RECLAIM_DYING_GUEST_RANGE, guest.handle, gfn, nr)

    @rule(index=index_of_vm)
    def die(self, index: int) -> None:
        guest = self.guests[index]
        if guest is not None:
            self.finish(guest)
            self.guests[index] = None

    def unlend(self, guest: Guest, gfn: int) -> None:
        nr = guest.leaves.pop(gfn)
        assert self.call(HostCall.HOST_UNSHARE_GUEST, guest.handle, gfn, nr) == 0

    def finish(self, guest: Guest) -> None:
        if not guest.dying:
            assert self.call(HostCall.START_TEARDOWN_VM, guest.handle) == 0
        if guest.protected:
            assert self.call(HostCall.RECLAIM_DYING_GUEST_RANGE, guest.handle, 0, 1 << 28) >= 0
        else:
            for gfn in sorted(guest.leaves):
                self.unlend(guest, gfn)
        assert self.call(HostCall.FINALIZE_TEARDOWN_VM, guest.handle) == 0
        page = guest.pages[0] << 12
        head = self.el2.bus.read_u64(page + HostVm.TEARDOWN_HEAD)
        for _ in range(self.el2.bus.read_u64(page + HostVm.TEARDOWN_NR)):
            following = self.el2.bus.read_u64(head)
            assert self.el2.bus.read(head + 8, PAGE - 8) == bytes(PAGE - 8)
            head = following
        assert head == 0
        for pfn in guest.pages:
            assert self.call(HostCall.HOST_UNSHARE_HYP, pfn) == 0
        assert self.el2.hyp.table.find(guest.handle) is None


TestDeath = Death.TestCase
TestDeath.settings = settings(
    max_examples=20,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
