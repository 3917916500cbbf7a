# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages by owner and state, added up."""

from __future__ import annotations

from fakes.memory_rig import HANDLE, Rig
from pkvm.check.census import census
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
