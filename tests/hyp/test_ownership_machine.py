# SPDX-License-Identifier: GPL-2.0-or-later
"""Every transition in any order, against a model of two dictionaries; invariants after each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fakes.memory_rig import HANDLE, Rig, RigVm
from pkvm.check.census import census
from pkvm.check.invariants import Snapshot
from pkvm.hyp.errors import Errno, Refused
from pkvm.machine.bus import Master
from pkvm.machine.stage2 import Stage2Fault

PAGES = 1024
"""The first pages of RAM are the ones played with: two 2 MiB regions."""
GFN = 0x40000
PROTECTED, PLAIN = 0, 2
"""Indices of VMs: 0 and 1 are protected, 2 and 3 are not."""

hot = st.sampled_from([0, 1, 2, 3, 8, 9, 510, 511, 512, 513, 514, 520, 1022, 1023])
offsets = hot | hot | st.integers(0, PAGES - 1)
sizes = st.sampled_from([1, 1, 1, 2, 3, 64, 256, 300, 511, 512, 513, 700, 1024])
protected_vms = st.integers(0, 1)
plain_vms = st.integers(2, 3)


class Ownership(RuleBasedStateMachine):
    """`owner[page]`: "host", "hyp", "shared_hyp", "shared_ffa", "lent_ffa" (the secure world's
    alone), or (vm index, gfn) of a protected guest; `lent[page]`: the set of (vm index, gfn) of
    non-protected guests."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig()
        self.mem = self.rig.mem
        self.vms = [self.rig.vm(HANDLE + index, tables=6) for index in range(4)]
        self.first = self.rig.first_pfn
        self.owner: dict[int, str | tuple[int, int]] = dict.fromkeys(range(PAGES), "host")
        self.lent: dict[int, set[tuple[int, int]]] = {page: set() for page in range(PAGES)}
        self.leaf: dict[tuple[int, int], int] = {}
        self.shared: set[int] = set()
        self.poison: set[tuple[int, int]] = set()
        self.pins = dict.fromkeys(range(PAGES), 0)
        self.secret: dict[int, int] = {}
        self.stamp = 0
        self.rig.sound()

    @initialize(block=st.booleans(), plain=st.booleans(), hyp=st.booleans())
    def populate(self, block: bool, plain: bool, hyp: bool) -> None:
        """Start where something can happen: VM 0 has a block or pages, VM 1 pages."""
        if block:
            self.donate_guest(0, 0, 512, 512)
        else:
            self.donate_guest(0, 0, 1, 20)
        self.donate_guest(1, 512, 510, 8)
        self.guest_share(1, 511, 2)
        if plain:
            self.share_guest(2, 520, 0, 1)
            self.share_guest(3, 520, 1, 1)
        if hyp:
            self.donate_hyp(1020, 4)
            self.share_hyp(1000)

    # What the model says

    def gfns_free(self, vm: int, gfn: int, nr: int) -> bool:
        taken = self.leaf.keys() | self.poison
        return all((vm, at) not in taken for at in range(gfn, gfn + nr))

    def host_owns(self, page: int, nr: int) -> bool:
        pages = range(page, page + nr)
        return page + nr <= PAGES and all(
            self.owner[at] == "host" and not self.lent[at] for at in pages
        )

    def attempt(self, expected: bool, call: Callable[..., object], *args: object) -> object:
        """Call EL2. It must agree with the model but for a lack of table pages, and a refusal
        must have changed nothing. Returns the result, or None if refused."""
        before = Snapshot(self.mem, self.rig.vms)
        refusal = None
        result: object = None
        try:
            result = call(*args)
        except Refused as refused:
            refusal = refused
        if refusal is None:
            assert expected, f"allowed: {call} {args}"
            return True if result is None else result
        assert before.differences(Snapshot(self.mem, self.rig.vms)) == []
        if refusal.errno == Errno.ENOMEM:
            assert refusal.pages_needed > 0
        else:
            assert not expected, f"refused: {refusal}"
        return None

    def map(self, vm: int, page: int, gfn: int, nr: int) -> None:
        for offset in range(nr):
            self.owner[page + offset] = (vm, gfn + offset)
            self.leaf[vm, gfn + offset] = page + offset
            self.stamp += 1
            self.secret[page + offset] = self.stamp
            self.rig.memory.write_u64((self.first + page + offset) << 12, self.stamp)

    # Rules

    @rule(page=offsets)
    def share_hyp(self, page: int) -> None:
        if self.attempt(self.host_owns(page, 1), self.mem.host_share_hyp, self.first + page):
            self.owner[page] = "shared_hyp"

    @rule(page=offsets)
    def unshare_hyp(self, page: int) -> None:
        expected = self.owner[page] == "shared_hyp" and not self.pins[page]
        if self.attempt(expected, self.mem.host_unshare_hyp, self.first + page):
            self.owner[page] = "host"

    @rule(page=offsets)
    def pin(self, page: int) -> None:
        pa = (self.first + page << 12) + 8
        if self.attempt(self.owner[page] == "shared_hyp", self.mem.pin_shared, pa):
            self.pins[page] += 1

    @rule(page=offsets)
    def unpin(self, page: int) -> None:
        if self.pins[page]:
            self.mem.unpin_shared(self.first + page << 12)
            self.pins[page] -= 1

    @rule(page=offsets, nr=sizes)
    def donate_hyp(self, page: int, nr: int) -> None:
        if page + nr <= PAGES:
            expected = self.host_owns(page, nr)
            if self.attempt(expected, self.mem.host_donate_hyp, self.first + page, nr):
                self.owner.update(dict.fromkeys(range(page, page + nr), "hyp"))

    @rule(page=offsets, nr=sizes)
    def return_from_hyp(self, page: int, nr: int) -> None:
        if page + nr <= PAGES:
            expected = all(self.owner[at] == "hyp" for at in range(page, page + nr))
            if self.attempt(expected, self.mem.hyp_donate_host, self.first + page, nr):
                self.owner.update(dict.fromkeys(range(page, page + nr), "host"))

    @rule(vm=protected_vms, page=offsets, offset=offsets, nr=sizes)
    def donate_guest(self, vm: int, page: int, offset: int, nr: int) -> None:
        if page + nr <= PAGES:
            gfn = GFN + offset
            expected = self.host_owns(page, nr) and self.gfns_free(vm, gfn, nr)
            call = self.mem.host_donate_guest
            if self.attempt(expected, call, self.vms[vm], self.first + page, gfn, nr):
                self.map(vm, page, gfn, nr)

    @rule(vm=protected_vms, region=st.integers(0, 1), slot=st.integers(0, 2))
    def donate_block(self, vm: int, region: int, slot: int) -> None:
        self.donate_guest(vm, region * 512, slot * 512, 512)

    @rule(
        vm=protected_vms,
        entries=st.lists(st.tuples(offsets, offsets, st.sampled_from([1, 2, 40])), max_size=5),
    )
    def donate_list(self, vm: int, entries: list[tuple[int, int, int]]) -> None:
        entries = [entry for entry in entries if entry[0] + entry[2] <= PAGES]
        pages = [page + at for page, _, nr in entries for at in range(nr)]
        gfns = [GFN + gfn + at for _, gfn, nr in entries for at in range(nr)]
        expected = (
            len(set(pages)) == len(pages)
            and len(set(gfns)) == len(gfns)
            and all(self.host_owns(page, 1) for page in pages)
            and all(self.gfns_free(vm, gfn, 1) for gfn in gfns)
        )
        table = np.array(
            [(self.first + page, GFN + gfn, nr) for page, gfn, nr in entries], np.uint64
        ).reshape(-1, 3)
        if self.attempt(expected, self.mem.host_donate_guest_list, self.vms[vm], table):
            for page, gfn in zip(pages, gfns, strict=True):
                self.map(vm, page, gfn, 1)

    @rule(vm=plain_vms, page=offsets, offset=offsets, nr=st.sampled_from([1, 1, 512]))
    def share_guest(self, vm: int, page: int, offset: int, nr: int) -> None:
        if nr == 512:
            page, offset = page & 512, offset & 512
        pages = range(page, page + nr)
        expected = self.gfns_free(vm, GFN + offset, nr) and all(
            self.owner[at] == "host" for at in pages
        )
        call = self.mem.host_share_guest
        if self.attempt(expected, call, self.vms[vm], self.first + page, GFN + offset, nr, 7):
            for at in range(nr):
                self.lent[page + at].add((vm, GFN + offset + at))
                self.leaf[vm, GFN + offset + at] = page + at

    @rule(vm=plain_vms, offset=offsets, nr=st.sampled_from([1, 1, 512]))
    def unshare_guest(self, vm: int, offset: int, nr: int) -> None:
        if nr == 512:
            offset &= ~511
        gfn = GFN + offset
        entry, level = self.vms[vm].stage2.leaf(gfn << 12)
        expected = bool(entry) and (level == 3) == (nr == 1)
        if self.attempt(expected, self.mem.host_unshare_guest, self.vms[vm], gfn, nr):
            for at in range(gfn, gfn + nr):
                self.lent[self.leaf.pop((vm, at))].remove((vm, at))

    def guest_range(self, vm: int, offset: int, nr: int, *, shared: bool) -> bool:
        gfns = range(GFN + offset, GFN + offset + min(nr, 256))
        return all(
            (vm, gfn) in self.leaf and (self.leaf[vm, gfn] in self.shared) == shared for gfn in gfns
        )

    @rule(vm=protected_vms, offset=offsets, nr=sizes)
    def guest_share(self, vm: int, offset: int, nr: int) -> None:
        expected = self.guest_range(vm, offset, nr, shared=False)
        call = self.mem.guest_share_host
        done = self.attempt(expected, call, self.vms[vm], (GFN + offset) << 12, nr)
        if done:
            assert done == min(nr, 256)
            self.shared |= {self.leaf[vm, GFN + offset + at] for at in range(min(nr, 256))}

    @rule(vm=protected_vms, offset=offsets, nr=sizes)
    def guest_unshare(self, vm: int, offset: int, nr: int) -> None:
        expected = self.guest_range(vm, offset, nr, shared=True)
        call = self.mem.guest_unshare_host
        done = self.attempt(expected, call, self.vms[vm], (GFN + offset) << 12, nr)
        if done:
            assert done == min(nr, 256)
            self.shared -= {self.leaf[vm, GFN + offset + at] for at in range(min(nr, 256))}

    @rule(share=st.booleans(), index=st.integers(0, 2000), nr=st.sampled_from([1, 1, 2, 5, 300]))
    def guest_uses_what_it_has(self, share: bool, index: int, nr: int) -> None:
        mine = sorted(
            at for at, page in self.leaf.items() if at[0] < PLAIN and (page in self.shared) != share
        )
        if mine:
            vm, gfn = mine[index % len(mine)]
            (self.guest_share if share else self.guest_unshare)(vm, gfn - GFN, nr)

    @rule(index=st.integers(0, 2000))
    def end_what_is_lent(self, index: int) -> None:
        lent = sorted(at for at in self.leaf if at[0] >= PLAIN)
        if lent:
            vm, gfn = lent[index % len(lent)]
            level = self.vms[vm].stage2.leaf(gfn << 12)[1]
            self.unshare_guest(vm, gfn - GFN, 1 if level == 3 else 512)

    @rule(index=st.integers(0, 2000), nr=st.sampled_from([1, 1, 2]))
    def return_what_hyp_has(self, index: int, nr: int) -> None:
        mine = sorted(page for page, owner in self.owner.items() if owner == "hyp")
        if mine:
            self.return_from_hyp(mine[index % len(mine)], nr)

    @rule(index=st.integers(0, 2000))
    def pin_what_is_shared(self, index: int) -> None:
        mine = sorted(page for page, owner in self.owner.items() if owner == "shared_hyp")
        if mine:
            self.pin(mine[index % len(mine)])
            self.unshare_hyp(mine[index % len(mine)])

    @rule(vm=protected_vms, offset=offsets, nr=sizes)
    def reclaim(self, vm: int, offset: int, nr: int) -> None:
        gfns = [at for at in range(GFN + offset, GFN + offset + nr) if (vm, at) in self.leaf]
        call = self.mem.reclaim_dying_guest_range
        done = self.attempt(True, call, self.vms[vm], GFN + offset, nr)
        if done is not None:
            assert done == len(gfns) or (done is True and not gfns)
            for gfn in gfns:
                page = self.leaf.pop((vm, gfn))
                self.owner[page] = "host"
                if page not in self.shared:
                    self.secret.pop(page)
                self.shared.discard(page)

    def taken_back(self, vm: int, gfn: int) -> None:
        """A private page became the host's, zeroed."""
        page = self.leaf.pop((vm, gfn))
        self.owner[page] = "host"
        self.secret.pop(page)
        assert self.rig.host_bus.read((self.first + page) << 12, 4096) == bytes(4096)

    @rule(vm=protected_vms, offset=offsets)
    def relinquish(self, vm: int, offset: int) -> None:
        gfn = GFN + offset
        page = self.leaf.get((vm, gfn))
        expected = page not in self.shared and (vm, gfn) not in self.poison
        call = self.mem.guest_relinquish_host
        if self.attempt(expected, call, self.vms[vm], gfn << 12) and page is not None:
            self.taken_back(vm, gfn)

    @rule(page=offsets)
    def force_reclaim(self, page: int) -> None:
        owner = self.owner[page]
        expected = isinstance(owner, tuple) and page not in self.shared
        call = self.mem.host_force_reclaim_page_guest
        if self.attempt(expected, call, self.first + page << 12, self.rig.find_vm):
            assert isinstance(owner, tuple)
            self.poison.add(owner)
            self.taken_back(*owner)

    @rule(index=st.integers(0, 2000), by_force=st.booleans())
    def lose_what_is_private(self, index: int, by_force: bool) -> None:
        mine = sorted(
            at for at, page in self.leaf.items() if at[0] < PLAIN and page not in self.shared
        )
        if mine:
            vm, gfn = mine[index % len(mine)]
            if by_force:
                self.force_reclaim(self.leaf[vm, gfn])
            else:
                self.relinquish(vm, gfn - GFN)

    @rule(page=offsets, nr=sizes, share=st.booleans(), lend=st.booleans())
    def secure_world(self, page: int, nr: int, share: bool, lend: bool) -> None:
        pages = range(page, page + nr)
        if page + nr > PAGES:
            return
        given = "lent_ffa" if lend else "shared_ffa"
        if share:
            expected = self.host_owns(page, nr)
            call = self.mem.host_donate_ffa if lend else self.mem.host_share_ffa
        else:
            expected = all(self.owner[at] == given for at in pages)
            call = self.mem.host_reclaim_ffa if lend else self.mem.host_unshare_ffa
        if expected:
            self.owner.update(dict.fromkeys(pages, given if share else "host"))
            self.rig.secure = {
                self.first + at
                for at, owner in self.owner.items()
                if owner in ("shared_ffa", "lent_ffa")
            }
        self.attempt(expected, call, self.first + page, nr)

    @rule(index=st.integers(0, 2000), nr=st.sampled_from([1, 1, 2, 64]), lend=st.booleans())
    def secure_world_returns(self, index: int, nr: int, lend: bool) -> None:
        given = "lent_ffa" if lend else "shared_ffa"
        mine = sorted(page for page, owner in self.owner.items() if owner == given)
        if mine:
            self.secure_world(mine[index % len(mine)], nr, share=False, lend=lend)

    @rule(vm=plain_vms, offset=offsets, nr=st.sampled_from([1, 512]), what=st.integers(0, 2))
    def attributes(self, vm: int, offset: int, nr: int, what: int) -> None:
        """Nobody's ownership changes, and no refusal but for numbers and what is not there."""
        guest, gfn = self.vms[vm], GFN + (offset & -nr)
        if what == 0:
            self.mem.host_wrprotect_guest(guest, gfn, nr)
        elif what == 1:
            self.mem.host_test_clear_young_guest(guest, gfn, nr, make_old=True)
        else:
            there = (vm, gfn) in self.leaf
            self.attempt(there, self.mem.host_relax_perms_guest, guest, gfn, 7)
            self.attempt(there, self.mem.host_mkyoung_guest, guest, gfn)

    @rule(vm=st.integers(0, 3), offset=offsets)
    def split(self, vm: int, offset: int) -> None:
        gfn = GFN + (offset & ~511)
        entry, level = self.vms[vm].stage2.leaf(gfn << 12)
        self.attempt(bool(entry) and level == 2, self.mem.host_split_guest, self.vms[vm], gfn, 512)

    @rule(vm=st.integers(0, 3), nr=st.integers(1, 4))
    def topup(self, vm: int, nr: int) -> None:
        pages = [page for page in range(PAGES, self.rig.host_pages) if self.fresh(page)][:nr]
        if len(pages) == nr:
            head = self.rig.link([self.first + page << 12 for page in pages])
            assert self.vms[vm].memcache.topup(head, nr) == nr

    def fresh(self, page: int) -> bool:
        return self.mem.vmemmap.state[page] == 0

    @rule(vm=st.integers(0, 3))
    def renew(self, vm: int) -> None:
        """A VM with nothing mapped ends and another takes its place."""
        if not any(at[0] == vm for at in self.leaf):
            old = self.vms[vm]
            head, nr = self.rig.end(old)
            for _ in range(nr):
                head = self.rig.host_bus.read_u64(head)
            assert head == 0
            self.vms[vm] = self.rig.vm(HANDLE + vm, tables=0)
            self.poison = {at for at in self.poison if at[0] != vm}

    @rule(page=offsets)
    def touch(self, page: int) -> None:
        """The host loads and stores, the device too; both agree with the model."""
        pa = (self.first + page) << 12
        may = isinstance(self.owner[page], str) and self.owner[page] not in ("hyp", "lent_ffa")
        may |= page in self.shared
        for bus in (self.rig.host_bus, self.rig.dma_bus):
            assert self.reaches(bus, pa) == may
        if may and page in self.secret:
            assert self.rig.host_bus.read_u64(pa) == self.secret[page]

    def reaches(self, bus: Master, pa: int) -> bool:
        try:
            bus.write_u64(pa + 8, bus.read_u64(pa + 8))
        except Stage2Fault:
            return False
        return True

    @invariant()
    def everything_holds(self) -> None:
        self.rig.sound()
        counted = census(self.mem, self.rig.vms)
        assert (
            sum(counted.host.values())
            + sum(counted.hyp.values())
            + sum(counted.guest.values())
            + counted.secure
            == counted.total
        )
        mine: list[RigVm] = self.vms
        for index in range(PLAIN):
            owned = [at for at in self.leaf if at[0] == index]
            counts = counted.vms[mine[index].handle]
            assert counts["owned"] + counts["shared_with_host"] == len(owned)


TestOwnership = Ownership.TestCase
TestOwnership.settings = settings(
    max_examples=25,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
