# SPDX-License-Identifier: GPL-2.0-or-later
"""Host to guests: donated to protected ones, lent to others."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from fakes.memory_rig import DEVICE, HANDLE, Rig, RigVm
from pkvm.arm64.stage2 import ATTR_NORMAL_RWX, TABLE_OR_PAGE, guest_annotation
from pkvm.events import Tlbi, Transition
from pkvm.hyp.abi import PROT_R, PROT_RWX, PROT_W, PROT_X
from pkvm.hyp.errors import Errno
from pkvm.machine.stage2 import Stage2Fault

GFN = 0x80001
GUEST = ("NOPAGE", "NOPAGE")
LENT = ("SHARED_OWNED", "NOPAGE")
OWNED = ("OWNED", "NOPAGE")
PAGE_RWX = ATTR_NORMAL_RWX | TABLE_OR_PAGE


def table(*entries: tuple[int, int, int]) -> npt.NDArray[np.uint64]:
    return np.array(entries, np.uint64).reshape(-1, 3)


def test_first_touch(rig: Rig, vm: RigVm) -> None:
    """Facts C1, and C2: a second donation of the same is refused."""
    pfn = rig.first_pfn + 2
    rig.host_bus.write(pfn << 12, b"kernel image")
    rig.mem.host_donate_guest(vm, pfn, GFN, 1)
    assert rig.state(pfn) == GUEST
    assert rig.mem.host.stage2.leaf(pfn << 12) == (guest_annotation(HANDLE, GFN), 3)
    assert vm.stage2.leaf(GFN << 12) == (pfn << 12 | PAGE_RWX, 3)
    assert rig.memory.read(pfn << 12, 12) == b"kernel image"
    assert vm.memcache.available == 6
    for bus in (rig.host_bus, rig.dma_bus):
        with pytest.raises(Stage2Fault):
            bus.read(pfn << 12, 1)
    with rig.refused(Errno.EPERM, "host_state"):
        rig.mem.host_donate_guest(vm, pfn, GFN, 1)
    with rig.refused(Errno.EPERM, "host_state"):
        rig.mem.host_donate_guest(vm, pfn, GFN + 1, 1)
    with rig.refused(Errno.EPERM, "guest_state"):
        rig.mem.host_donate_guest(vm, pfn + 1, GFN, 1)


def test_order_of_the_deed(rig: Rig, vm: RigVm) -> None:
    pa = rig.memory.ram_base + 9 * 4096
    rig.mem.host_donate_hyp((pa >> 12) + 1, 1)
    rig.host_bus.read(pa, 1)
    rig.recorder.events.clear()
    rig.mem.host_donate_guest(vm, pa >> 12, GFN, 1)
    assert rig.recorder.events == [
        Tlbi(0, pa),
        Tlbi(0, pa, "smmu"),
        Transition("host_donate_guest", pa, 1, HANDLE, GFN << 12),
    ]


def test_no_table_pages(rig: Rig) -> None:
    """Facts C3: ENOMEM changes nothing, and says how many pages would do."""
    vm = rig.vm(tables=0)
    pfn = rig.first_pfn
    with rig.refused(Errno.ENOMEM, "memcache") as refusal:
        rig.mem.host_donate_guest(vm, pfn, GFN, 1)
    assert refusal.refusal is not None
    assert refusal.refusal.pages_needed == 2
    rig.topup(vm, 1)
    with rig.refused(Errno.ENOMEM, "memcache") as refusal:
        rig.mem.host_donate_guest(vm, pfn, GFN, 700)
    assert refusal.refusal is not None
    assert refusal.refusal.pages_needed == 2
    rig.topup(vm, 2)
    rig.mem.host_donate_guest(vm, pfn, GFN, 700)
    assert vm.memcache.available == 0


def test_a_block_where_both_numbers_are_aligned(rig: Rig, vm: RigVm) -> None:
    pfn, gfn = rig.first_pfn + 511, 0x401FF
    rig.mem.host_donate_guest(vm, pfn, gfn, 1 + 512 + 3)
    assert vm.stage2.leaf(gfn << 12) == (pfn << 12 | PAGE_RWX, 3)
    assert vm.stage2.leaf((gfn + 1) << 12) == ((pfn + 1) << 12 | ATTR_NORMAL_RWX, 2)
    assert vm.stage2.leaf((gfn + 513) << 12)[1] == 3
    assert rig.mem.host.stage2.leaf((pfn + 40) << 12)[0] == guest_annotation(HANDLE, gfn + 40)


def test_a_gigabyte_block() -> None:
    rig = Rig(2 << 30)
    vm = rig.vm(tables=2)
    rig.mem.host_donate_guest(vm, rig.first_pfn, 0x40000, 1 << 18)
    assert vm.stage2.leaf(0x4000_0000) == (rig.memory.ram_base | ATTR_NORMAL_RWX, 1)
    assert vm.memcache.available == 2
    with pytest.raises(Stage2Fault):
        rig.host_bus.read(rig.memory.ram_base, 8)


def test_pages_where_they_are_not_aligned_alike(rig: Rig, vm: RigVm) -> None:
    rig.mem.host_donate_guest(vm, rig.first_pfn, 0x40001, 1024)
    for at in (0, 511, 512, 1023):
        entry, level = vm.stage2.leaf((0x40001 + at) << 12)
        assert (entry, level) == ((rig.first_pfn + at) << 12 | PAGE_RWX, 3)
    assert vm.memcache.available == 8 - 1 - 3


@pytest.mark.parametrize(
    ("pfn", "gfn", "nr", "errno"),
    [
        (1 << 52, GFN, 1, Errno.EINVAL),
        ((1 << 64) - 1, GFN, 2, Errno.EINVAL),
        (0x80000, 1 << 28, 1, Errno.EINVAL),
        (0x80000, (1 << 28) - 1, 2, Errno.EINVAL),
        (0x80000, 1 << 60, 1, Errno.EINVAL),
        (0x80000, GFN, 0, Errno.EINVAL),
        (0x80000, GFN, (1 << 64) - 0x7FFFF, Errno.EINVAL),
        (0x80000, GFN, 1 << 27, Errno.EINVAL),
        (DEVICE >> 12, GFN, 1, Errno.EPERM),
        (DEVICE >> 12, GFN, 16, Errno.EPERM),
        (0x7FFFF, GFN, 2, Errno.EINVAL),
    ],
)
def test_abused_numbers(rig: Rig, vm: RigVm, pfn: int, gfn: int, nr: int, errno: Errno) -> None:
    with rig.refused(errno):
        rig.mem.host_donate_guest(vm, pfn, gfn, nr)
    if max(pfn, gfn, nr) < 1 << 64:
        with rig.refused(errno):
            rig.mem.host_donate_guest_list(vm, table((0x80010, 5, 1), (pfn, gfn, nr)))
    if 0 < nr <= 512:
        with rig.refused(errno if nr == 1 else Errno.EINVAL):
            rig.mem.host_share_guest(vm, pfn, gfn, nr, PROT_RWX)


def test_pages_of_el2_and_of_others_are_not_the_hosts_to_give(
    rig: Rig, vm: RigVm, other: RigVm
) -> None:
    theirs = rig.first_pfn + 30
    rig.mem.host_donate_guest(other, theirs, GFN, 1)
    shared = rig.first_pfn + 31
    rig.mem.host_share_hyp(shared)
    lent = rig.first_pfn + 32
    rig.mem.host_share_guest(other, lent, GFN + 1, 1, PROT_R)
    donated = rig.first_pfn + 33
    rig.mem.host_donate_hyp(donated, 1)
    taken = [base >> 12 for base in (rig.carveout[0], rig.firmware[0], vm.stage2.root)]
    taken += vm.memcache.pages()[:1]
    for pfn in [theirs, shared, lent, donated, *[pfn & (1 << 28) - 1 for pfn in taken]]:
        with rig.refused(Errno.EPERM):
            rig.mem.host_donate_guest(vm, pfn, GFN, 1)
        with rig.refused(Errno.EPERM):
            rig.mem.host_donate_guest_list(vm, table((pfn, GFN, 1)))
    with rig.refused(Errno.EPERM, "host_state"):
        rig.mem.host_donate_guest(vm, rig.first_pfn, GFN, 512)


def test_a_list_is_whole_or_nothing(rig: Rig, vm: RigVm) -> None:
    first = rig.first_pfn
    rig.mem.host_donate_guest(vm, first + 99, GFN + 99, 1)
    for bad in ((first + 99, 5, 1), (first + 40, GFN + 98, 2), (first + 98, GFN + 200, 4)):
        with rig.refused(Errno.EPERM):
            rig.mem.host_donate_guest_list(vm, table((first, GFN, 7), bad, (first + 9, 0, 1)))
    rig.mem.host_donate_guest_list(vm, table())
    rig.recorder.events.clear()
    entries = table((first + 9, GFN + 7, 1), (first, GFN, 7), (first + 10, GFN + 8, 3))
    rig.mem.host_donate_guest_list(vm, entries)
    moves = [event for event in rig.recorder.events if isinstance(event, Transition)]
    assert moves == [
        Transition("host_donate_guest_list", first << 12, 7, HANDLE, GFN << 12),
        Transition("host_donate_guest_list", (first + 9) << 12, 4, HANDLE, (GFN + 7) << 12),
    ]
    assert rig.guest_state(vm, GFN + 10) == "OWNED"


@pytest.mark.parametrize(
    "entries",
    [
        ((0, 0, 2), (1, 10, 1)),
        ((0, 0, 2), (5, 1, 1)),
        ((0, 0, 1), (0, 0, 1)),
        ((10, 0, 100), (50, 600, 1)),
        ((0, 600, 100), (200, 650, 100)),
    ],
)
def test_a_list_that_overlaps_itself(
    rig: Rig, vm: RigVm, entries: tuple[tuple[int, int, int], ...]
) -> None:
    numbers = [(rig.first_pfn + pfn, gfn, nr) for pfn, gfn, nr in entries]
    with rig.refused(Errno.EPERM):
        rig.mem.host_donate_guest_list(vm, table(*numbers))
    with rig.refused(Errno.EPERM):
        rig.mem.host_donate_guest_list(vm, table(*reversed(numbers)))


def test_a_list_of_blocks_and_pages_needs_its_tables_exactly(rig: Rig) -> None:
    vm = rig.vm(tables=0)
    first = rig.first_pfn
    entries = table(
        (first + 512, 0x40200, 512),
        (first + 3, 0x40000, 1),
        (first + 9, 0x40009, 2),
        (first + 1024, 0x40400, 512),
    )
    with rig.refused(Errno.ENOMEM) as refusal:
        rig.mem.host_donate_guest_list(vm, entries)
    assert refusal.refusal is not None
    assert refusal.refusal.pages_needed == 2
    rig.topup(vm, 2)
    rig.mem.host_donate_guest_list(vm, entries)
    assert vm.memcache.available == 0
    assert vm.stage2.leaf(0x4020_0000)[1] == vm.stage2.leaf(0x4040_0000)[1] == 2


def test_lend_and_take_back(rig: Rig, vm: RigVm, other: RigVm) -> None:
    pfn = rig.first_pfn + 5
    rig.mem.host_share_guest(vm, pfn, GFN, 1, PROT_RWX)
    assert rig.state(pfn) == LENT
    assert vm.stage2.leaf(GFN << 12) == (pfn << 12 | PAGE_RWX | 1 << 56, 3)
    rig.mem.host_share_guest(other, pfn, 7, 1, PROT_R)
    rig.mem.host_share_guest(vm, pfn, GFN + 1, 1, PROT_RWX)
    assert rig.mem.vmemmap.share_count[5] == 3
    rig.host_bus.write(pfn << 12, b"common")
    rig.sound()
    with rig.refused(Errno.EPERM, "guest_state"):
        rig.mem.host_share_guest(vm, pfn + 1, GFN, 1, PROT_RWX)
    for call in (rig.mem.host_share_hyp, rig.mem.host_unshare_hyp):
        with rig.refused(Errno.EPERM):
            call(pfn)
    with rig.refused(Errno.EPERM):
        rig.mem.host_donate_hyp(pfn, 1)
    flushes = rig.guest_flushes
    rig.recorder.events.clear()
    rig.mem.host_unshare_guest(vm, GFN, 1)
    assert rig.guest_flushes == flushes + 1
    assert rig.recorder.events[0] == Tlbi(1, GFN << 12)
    assert rig.state(pfn) == LENT
    rig.mem.host_unshare_guest(vm, GFN + 1, 1)
    rig.mem.host_unshare_guest(other, 7, 1)
    assert rig.state(pfn) == OWNED
    assert rig.memory.read(pfn << 12, 6) == b"common"
    with rig.refused(Errno.ENOENT):
        rig.mem.host_unshare_guest(vm, GFN, 1)


@pytest.mark.parametrize(
    ("prot", "bits"),
    [
        (PROT_RWX, 0x7FF),
        (PROT_R | PROT_W, 0x7FF | 2 << 53),
        (PROT_R, 0x77F | 2 << 53),
        (PROT_R | PROT_X, 0x77F),
        (0, 0x73F | 2 << 53),
    ],
)
def test_permissions_of_what_is_lent(rig: Rig, vm: RigVm, prot: int, bits: int) -> None:
    rig.mem.host_share_guest(vm, rig.first_pfn, GFN, 1, prot)
    assert vm.stage2.leaf(GFN << 12)[0] == rig.first_pfn << 12 | bits | 1 << 56


def test_lend_a_block(rig: Rig, vm: RigVm, other: RigVm) -> None:
    pfn, gfn = rig.first_pfn + 512, 0x40200
    rig.mem.host_share_guest(other, pfn + 3, 1, 1, PROT_R)
    rig.mem.host_share_guest(vm, pfn, gfn, 512, PROT_RWX)
    assert vm.stage2.leaf(gfn << 12) == (pfn << 12 | ATTR_NORMAL_RWX | 1 << 56, 2)
    assert rig.mem.vmemmap.share_count[512 + 3] == 2
    with rig.refused(Errno.EPERM, "guest_state"):
        rig.mem.host_share_guest(vm, rig.first_pfn, gfn + 9, 1, PROT_R)
    with rig.refused(Errno.E2BIG, "leaf_size"):
        rig.mem.host_unshare_guest(vm, gfn, 1)
    with rig.refused(Errno.ENOENT):
        rig.mem.host_unshare_guest(vm, gfn + 512, 512)
    rig.mem.host_unshare_guest(vm, gfn, 512)
    assert rig.state(pfn) == OWNED
    assert rig.state(pfn + 3) == LENT
    rig.mem.host_share_guest(vm, pfn, gfn, 1, PROT_R)
    with rig.refused(Errno.E2BIG, "leaf_size"):
        rig.mem.host_unshare_guest(vm, gfn, 512)
    with rig.refused(Errno.EPERM, "guest_state"):
        rig.mem.host_share_guest(vm, pfn, gfn, 512, PROT_R)


@pytest.mark.parametrize(
    ("pfn", "gfn", "nr", "prot"),
    [
        (0, 0, 2, PROT_R),
        (0, 0, 0, PROT_R),
        (0, 1, 512, PROT_R),
        (1, 0, 512, PROT_R),
        (0, 0, 1 << 18, PROT_R),
        (0, 0, 1, 8),
        (0, 0, 1, 1 << 63 | PROT_R),
    ],
)
def test_sizes_and_permissions_that_cannot_be_lent(
    rig: Rig, vm: RigVm, pfn: int, gfn: int, nr: int, prot: int
) -> None:
    with rig.refused(Errno.EINVAL):
        rig.mem.host_share_guest(vm, rig.first_pfn + pfn, gfn, nr, prot)
    if prot == PROT_R and not pfn:
        with rig.refused(Errno.EINVAL):
            rig.mem.host_unshare_guest(vm, gfn, nr)


def test_a_page_in_a_block_that_the_host_does_not_own(rig: Rig, vm: RigVm) -> None:
    rig.mem.host_share_hyp(rig.first_pfn + 100)
    with rig.refused(Errno.EPERM, "host_state"):
        rig.mem.host_share_guest(vm, rig.first_pfn, 0, 512, PROT_RWX)


def test_share_counts_do_not_wrap(rig: Rig, vm: RigVm) -> None:
    pfn = rig.first_pfn
    rig.mem.host_share_guest(vm, pfn, 0, 1, PROT_R)
    rig.mem.vmemmap.share_count[0] = 0xFFFF_FFFF
    with rig.refused(Errno.EBUSY, "share_count"):
        rig.mem.host_share_guest(vm, pfn, 1, 1, PROT_R)
    rig.mem.vmemmap.share_count[0] = 1


def test_lending_needs_tables_too(rig: Rig) -> None:
    vm = rig.vm(tables=0)
    for nr, needed in ((1, 2), (512, 1)):
        with rig.refused(Errno.ENOMEM) as refusal:
            rig.mem.host_share_guest(vm, rig.first_pfn, 0, nr, PROT_R)
        assert refusal.refusal is not None
        assert refusal.refusal.pages_needed == needed


def test_a_private_page_is_not_unshared(rig: Rig, vm: RigVm) -> None:
    rig.mem.host_donate_guest(vm, rig.first_pfn, GFN, 1)
    with rig.refused(Errno.EPERM, "guest_state"):
        rig.mem.host_unshare_guest(vm, GFN, 1)
