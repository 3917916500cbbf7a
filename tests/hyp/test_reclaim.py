# SPDX-License-Identifier: GPL-2.0-or-later
"""The end of a protected VM's memory, and of its tables."""

from __future__ import annotations

import pytest

from fakes.memory_rig import HANDLE, Rig, RigVm
from pkvm.check.census import census
from pkvm.events import Tlbi, Transition
from pkvm.hyp.abi import PROT_R
from pkvm.hyp.errors import Errno
from pkvm.machine.stage2 import Stage2Fault

GFN = 0x40000
IPA = GFN << 12
OWNED = ("OWNED", "NOPAGE")


def test_private_pages_are_zeroed_and_shared_ones_are_not(rig: Rig, vm: RigVm) -> None:
    """Facts C8."""
    first = rig.first_pfn
    rig.mem.host_donate_guest(vm, first, GFN, 3)
    rig.mem.guest_share_host(vm, IPA + 4096, 1)
    for page in range(3):
        rig.memory.write((first + page) << 12, b"content")
    assert rig.mem.reclaim_dying_guest_range(vm, GFN, 3) == 3
    assert [rig.host_bus.read((first + page) << 12, 7) for page in range(3)] == [
        bytes(7),
        b"content",
        bytes(7),
    ]
    assert [rig.state(first + page) for page in range(3)] == [OWNED] * 3
    assert (first << 12, 4096) in rig.code_forgotten
    assert ((first + 1) << 12, 4096) not in rig.code_forgotten
    assert rig.mem.reclaim_dying_guest_range(vm, GFN, 3) == 0


def test_order_of_the_deed(rig: Rig, vm: RigVm) -> None:
    """Unmapped, flushed, zeroed, and only then within the host's reach (facts §12, 17 and 39)."""
    pa = rig.first_pfn << 12
    rig.mem.host_donate_guest(vm, pa >> 12, GFN, 1)
    rig.memory.write(pa, b"secret")
    seen = []
    rig.mem._invalidate_code = lambda pa, nbytes: seen.append(  # the moment of the zeroing
        (rig.guest_state(vm, GFN), rig.guest_flushes, rig.mem.host.stage2.leaf(pa)[0] & 1)
    )
    flushes = rig.guest_flushes
    rig.recorder.events.clear()
    rig.mem.reclaim_dying_guest_range(vm, GFN, 1)
    assert seen == [("NOPAGE", flushes + 1, 0)]
    assert rig.recorder.events == [
        Tlbi(1, IPA),
        Transition("reclaim_dying_guest_range", pa, 1, HANDLE, IPA),
    ]


@pytest.mark.parametrize("shared", [0, 3, 300])
@pytest.mark.parametrize("gfn", [GFN, GFN + 1])
def test_everything_at_once(rig: Rig, vm: RigVm, gfn: int, shared: int) -> None:
    """Blocks and pages, in one call over the whole IPA space."""
    before = census(rig.mem, rig.vms)
    first = rig.first_pfn
    rig.mem.host_donate_guest(vm, first, gfn, 1030)
    if shared:
        done = rig.mem.guest_share_host(vm, gfn + 200 << 12, shared)
        rig.mem.guest_share_host(vm, gfn + 200 + done << 12, max(1, shared - done))
    for page in range(0, 1030, 10):
        rig.memory.write((first + page) << 12, b"content")
    assert rig.mem.reclaim_dying_guest_range(vm, 0, 1 << 28) == 1030
    rig.sound()
    last_shared = 200 + max(shared, 257 if shared == 256 else shared)
    for page in range(0, 1030, 10):
        found = rig.host_bus.read((first + page) << 12, 7)
        assert found == (b"content" if 200 <= page < last_shared else bytes(7)) or page == 1000
    after = census(rig.mem, rig.vms)
    assert after == before, "no page is lost"


def test_part_of_a_block(rig: Rig) -> None:
    vm = rig.vm(tables=1)
    rig.mem.host_donate_guest(vm, rig.first_pfn, GFN, 512)
    for gfn, nr in ((GFN + 5, 1), (GFN, 5), (GFN + 5, 507)):
        with rig.refused(Errno.ENOMEM, "memcache") as refusal:
            rig.mem.reclaim_dying_guest_range(vm, gfn, nr)
        assert refusal.refusal is not None
        assert refusal.refusal.pages_needed == 1
    rig.topup(vm, 1)
    assert rig.mem.reclaim_dying_guest_range(vm, GFN + 5, 2) == 2
    assert rig.guest_state(vm, GFN + 4) == "OWNED"
    assert rig.guest_state(vm, GFN + 5) == "NOPAGE"
    assert rig.mem.reclaim_dying_guest_range(vm, GFN, 512) == 510


@pytest.mark.parametrize(
    ("gfn", "nr"), [(1 << 28, 1), (GFN, 0), (GFN, 1 << 28), (1, (1 << 64) - 1), (-1, 1)]
)
def test_numbers_that_cannot_be(rig: Rig, vm: RigVm, gfn: int, nr: int) -> None:
    with rig.refused(Errno.EINVAL, "gfn_range"):
        rig.mem.reclaim_dying_guest_range(vm, gfn, nr)


def test_a_borrowed_page_is_not_reclaimed(rig: Rig, vm: RigVm) -> None:
    rig.mem.host_share_guest(vm, rig.first_pfn, GFN, 1, PROT_R)
    rig.mem.host_donate_guest(vm, rig.first_pfn + 1, GFN + 1, 1)
    for nr in (1, 2):
        with rig.refused(Errno.EPERM, "guest_state"):
            rig.mem.reclaim_dying_guest_range(vm, GFN, nr)


def test_the_vms_tables_come_back_zeroed(rig: Rig) -> None:
    before = census(rig.mem, rig.vms)
    vm = rig.vm(tables=5)
    root = vm.stage2.root
    rig.mem.host_donate_guest(vm, rig.first_pfn, GFN + 1, 600)
    rig.mem.reclaim_dying_guest_range(vm, 0, 1 << 28)
    head, nr = rig.end(vm)
    assert nr == 5 + 2
    pages = []
    while head:
        pages.append(head)
        assert rig.host_bus.read(head + 8, 4088) == bytes(4088)
        head = rig.host_bus.read_u64(head)
    assert len(set(pages)) == nr
    assert {root, root + 4096} <= set(pages)
    assert census(rig.mem, rig.vms) == before


def test_what_was_not_reclaimed_is_lost_but_never_exposed(rig: Rig) -> None:
    vm = rig.vm()
    rig.mem.host_donate_guest(vm, rig.first_pfn, GFN, 1)
    rig.end(vm)
    with pytest.raises(Stage2Fault):
        rig.host_bus.read(rig.first_pfn << 12, 8)
    with pytest.raises(Stage2Fault):
        rig.dma_bus.read(rig.first_pfn << 12, 8)
    # The page stays nobody's; take it out of what the fixture checks at the end.
    rig.mem.vmemmap.state[0] = 0x33
    rig.mem.host.stage2.put(rig.first_pfn << 12, 0x2000000000000002)


def test_a_gigabyte() -> None:
    rig = Rig(2 << 30)
    vm = rig.vm(tables=2)
    rig.mem.host_donate_guest(vm, rig.first_pfn, GFN, (1 << 18) - 512)
    rig.memory.write((rig.first_pfn + 1000) << 12, b"secret")
    assert rig.mem.reclaim_dying_guest_range(vm, GFN, 1 << 18) == (1 << 18) - 512
    assert rig.host_bus.read((rig.first_pfn + 1000) << 12, 6) == bytes(6)
