# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages by owner and state, added up."""

from __future__ import annotations

from fakes.memory_rig import HANDLE, Rig
from pkvm.check.census import census, shared_by_guests
from pkvm.hyp.abi import PROT_R


def test_census_of_a_busy_machine() -> None:
    rig = Rig()
    before = census(rig.mem, rig.vms)
    assert before.total == 8192
    assert before.host["owned"] == rig.host_pages
    assert before.hyp["owned"] == 8192 - rig.host_pages
    assert before.vms == {}
    vm, borrower = rig.vm(HANDLE, tables=8), rig.vm(HANDLE + 1, tables=4)
    first = rig.first_pfn
    rig.mem.host_donate_guest(vm, first, 0x40000, 600)
    rig.mem.guest_share_host(vm, 0x4000_5000, 3)
    rig.mem.host_share_guest(borrower, first + 1000, 1, 1, PROT_R)
    rig.mem.host_share_guest(borrower, first + 1000, 2, 1, PROT_R)
    rig.mem.host_share_guest(borrower, first + 1024, 512, 512, PROT_R)
    rig.mem.host_share_hyp(first + 2000)
    found = census(rig.mem, rig.vms)
    assert found.host["shared_with_hyp"] == 1
    assert found.host["shared_with_guest"] == 513
    assert found.hyp["owned"] == before.hyp["owned"] + 2 * 2 + 8 + 4
    assert found.guest == {"owned": 597, "shared_with_host": 3}
    assert found.vms == {
        HANDLE: {"owned": 597, "shared_with_host": 3, "borrowed_from_host": 0},
        HANDLE + 1: {"owned": 0, "shared_with_host": 0, "borrowed_from_host": 514},
    }
    parts = [*found.host.values(), *found.hyp.values(), *found.guest.values()]
    assert sum(parts) == found.total


def test_pages_that_guests_share() -> None:
    rig = Rig()
    vm, borrower = rig.vm(HANDLE, tables=8), rig.vm(HANDLE + 1, tables=4)
    rig.mem.host_donate_guest(vm, rig.first_pfn, 0x40000, 600)
    rig.mem.host_share_guest(borrower, rig.first_pfn + 1000, 1, 1, PROT_R)
    assert shared_by_guests(rig.mem, rig.vms) == frozenset()
    rig.mem.guest_share_host(vm, 0x4000_5000, 2)
    rig.mem.guest_share_host(vm, 0x4020_1000, 1)
    assert shared_by_guests(rig.mem, rig.vms) == {0x4000_5000, 0x4000_6000, 0x4020_1000}
