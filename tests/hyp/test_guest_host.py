# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests share their pages with the host and take them back."""

from __future__ import annotations

import pytest

from fakes.memory_rig import HANDLE, Rig, RigVm
from pkvm.arm64.stage2 import guest_annotation
from pkvm.events import Tlbi, Transition
from pkvm.hyp.abi import PROT_RWX
from pkvm.hyp.errors import Errno
from pkvm.machine.stage2 import Stage2Fault

GFN = 0x40000
IPA = GFN << 12
GUEST = ("NOPAGE", "NOPAGE")
SHARED = ("SHARED_BORROWED", "NOPAGE")


def readable(rig: Rig, pfn: int) -> bool:
    found = []
    for bus in (rig.host_bus, rig.dma_bus):
        try:
            bus.read(pfn << 12, 1)
            found.append(True)
        except Stage2Fault:
            found.append(False)
    assert found[0] == found[1]
    return found[0]


def test_share_one_page_and_take_it_back(rig: Rig, vm: RigVm) -> None:
    """Facts C5 and C7."""
    pfn = rig.first_pfn + 4
    rig.mem.host_donate_guest(vm, pfn, GFN, 1)
    rig.memory.write(pfn << 12, b"greeting")
    assert rig.mem.guest_share_host(vm, IPA, 1) == 1
    assert (rig.state(pfn), rig.guest_state(vm, GFN)) == (SHARED, "SHARED_OWNED")
    assert rig.host_bus.read(pfn << 12, 8) == rig.dma_bus.read(pfn << 12, 8) == b"greeting"
    with rig.refused(Errno.EPERM, "guest_state"):
        rig.mem.guest_share_host(vm, IPA, 1)
    rig.host_bus.write(pfn << 12, b"an answer")
    rig.recorder.events.clear()
    assert rig.mem.guest_unshare_host(vm, IPA, 1) == 1
    assert rig.recorder.events == [
        Tlbi(0, pfn << 12),
        Tlbi(0, pfn << 12, "smmu"),
        Transition("guest_unshare_host", pfn << 12, 1, HANDLE, IPA),
    ]
    assert (rig.state(pfn), rig.guest_state(vm, GFN)) == (GUEST, "OWNED")
    assert rig.mem.host.stage2.leaf(pfn << 12)[0] == guest_annotation(HANDLE, GFN)
    assert not readable(rig, pfn)
    assert rig.memory.read(pfn << 12, 9) == b"an answer"
    with rig.refused(Errno.EPERM, "guest_state"):
        rig.mem.guest_unshare_host(vm, IPA, 1)


def test_one_page_of_a_block(rig: Rig, vm: RigVm) -> None:
    """The block is split; the other 511 pages stay private (facts §12, 25)."""
    first = rig.first_pfn
    rig.mem.host_donate_guest(vm, first, GFN, 512)
    rig.mem.guest_share_host(vm, IPA + 7 * 4096, 1)
    flushes = rig.guest_flushes
    assert flushes > 0, "the block was broken with a TLBI"
    for page in range(512):
        wanted = ("SHARED_OWNED", SHARED) if page == 7 else ("OWNED", GUEST)
        assert (rig.guest_state(vm, GFN + page), rig.state(first + page)) == wanted
        assert readable(rig, first + page) == (page == 7)
    rig.mem.guest_unshare_host(vm, IPA + 7 * 4096, 1)
    assert rig.guest_flushes == flushes, "software bits need none"
    assert not readable(rig, first + 7)


def test_a_split_is_paid_for_first(rig: Rig) -> None:
    vm = rig.vm(tables=1)
    rig.mem.host_donate_guest(vm, rig.first_pfn, GFN, 512)
    with rig.refused(Errno.ENOMEM, "memcache") as refusal:
        rig.mem.guest_share_host(vm, IPA, 1)
    assert refusal.refusal is not None
    assert refusal.refusal.pages_needed == 1
    rig.topup(vm, 1)
    assert rig.mem.guest_share_host(vm, IPA, 1) == 1


def test_a_gigabyte_block_is_split_twice() -> None:
    rig = Rig(2 << 30)
    vm = rig.vm(tables=2)
    rig.mem.host_donate_guest(vm, rig.first_pfn, GFN, 1 << 18)
    with rig.refused(Errno.ENOMEM) as refusal:
        rig.mem.guest_share_host(vm, IPA + 511 * 4096, 2)
    assert refusal.refusal is not None
    assert refusal.refusal.pages_needed == 1
    rig.topup(vm, 1)
    assert rig.mem.guest_share_host(vm, IPA + 511 * 4096, 2) == 2
    assert vm.stage2.leaf(IPA + (1 << 29))[1] == 2
    assert [rig.guest_state(vm, GFN + at) for at in (510, 511, 512, 513)] == [
        "OWNED",
        "SHARED_OWNED",
        "SHARED_OWNED",
        "OWNED",
    ]


def test_a_range_is_done_256_pages_at_a_time(rig: Rig, vm: RigVm) -> None:
    rig.mem.host_donate_guest(vm, rig.first_pfn, GFN, 1024)
    done = 0
    while done < 700:
        step = rig.mem.guest_share_host(vm, IPA + done * 4096, 700 - done)
        assert step == min(256, 700 - done)
        done += step
        rig.sound()
    assert rig.guest_state(vm, GFN + 699) == "SHARED_OWNED"
    assert rig.guest_state(vm, GFN + 700) == "OWNED"
    assert vm.stage2.leaf(IPA + 512 * 4096)[1] == 3
    with rig.refused(Errno.EPERM, "guest_state") as refusal:
        rig.mem.guest_share_host(vm, IPA + 700 * 4096 - 4096, 5)
    assert refusal.refusal is not None
    assert refusal.refusal.ipa == IPA + 699 * 4096
    assert rig.mem.guest_unshare_host(vm, IPA + 100 * 4096, 300) == 256
    assert rig.guest_state(vm, GFN + 355) == "OWNED"
    assert rig.guest_state(vm, GFN + 356) == "SHARED_OWNED"


def test_a_range_across_pages_and_blocks_that_lie_anywhere(rig: Rig, vm: RigVm) -> None:
    first = rig.first_pfn
    rig.mem.host_donate_guest(vm, first + 600, GFN + 500, 12)
    rig.mem.host_donate_guest(vm, first, GFN + 512, 512)
    rig.mem.host_donate_guest(vm, first + 590, GFN + 1024, 3)
    rig.recorder.events.clear()
    assert rig.mem.guest_share_host(vm, (GFN + 505) << 12, 20) == 20
    assert [event for event in rig.recorder.events if isinstance(event, Transition)] == [
        Transition("guest_share_host", (first + 605) << 12, 7, HANDLE, (GFN + 505) << 12),
        Transition("guest_share_host", first << 12, 13, HANDLE, (GFN + 512) << 12),
    ]
    assert rig.mem.guest_share_host(vm, (GFN + 1000) << 12, 27) == 27
    rig.sound()
    assert readable(rig, first + 592)
    assert rig.mem.guest_unshare_host(vm, (GFN + 1023) << 12, 2) == 2
    assert not readable(rig, first + 590)
    assert readable(rig, first + 592)


@pytest.mark.parametrize(
    ("ipa", "nr", "errno"),
    [
        (IPA + 1, 1, Errno.EINVAL),
        (IPA + 0x800, 1, Errno.EINVAL),
        (IPA, 0, Errno.EINVAL),
        (IPA, 1 << 63, Errno.EINVAL),
        (IPA, (1 << 64) - 1, Errno.EINVAL),
        (IPA, 1 << 52, Errno.EINVAL),
        ((1 << 64) - 4096, 2, Errno.EINVAL),
        ((1 << 64) - 4096, 1, Errno.ERANGE),
        (1 << 40, 1, Errno.ERANGE),
        ((1 << 40) - 4096, 2, Errno.ERANGE),
        (IPA, 1 << 29, Errno.ERANGE),
        ((1 << 40) - 4096, 1, Errno.EFAULT),
        (0x0900_0000, 1, Errno.EFAULT),
        (IPA + 4 * 4096, 1, Errno.EFAULT),
    ],
)
def test_abused_numbers(rig: Rig, vm: RigVm, ipa: int, nr: int, errno: Errno) -> None:
    rig.mem.host_donate_guest(vm, rig.first_pfn, GFN, 4)
    rig.mem.guest_share_host(vm, IPA, 2)
    for call in (rig.mem.guest_share_host, rig.mem.guest_unshare_host):
        with rig.refused(errno):
            call(vm, ipa, nr)


def test_an_untouched_page_is_named(rig: Rig, vm: RigVm) -> None:
    """Facts C6: the door tells the host which page to map."""
    rig.mem.host_donate_guest(vm, rig.first_pfn, GFN, 3)
    for start, nr in ((3, 1), (2, 2), (0, 200)):
        with rig.refused(Errno.EFAULT, "guest_state") as refusal:
            rig.mem.guest_share_host(vm, IPA + start * 4096, nr)
        assert refusal.refusal is not None
        assert (refusal.refusal.ipa, refusal.refusal.vm) == (IPA + 3 * 4096, HANDLE)


def test_a_borrowed_page_is_not_the_guests_to_share(rig: Rig, vm: RigVm) -> None:
    rig.mem.host_share_guest(vm, rig.first_pfn, GFN, 1, PROT_RWX)
    for call in (rig.mem.guest_share_host, rig.mem.guest_unshare_host):
        with rig.refused(Errno.EPERM, "guest_state"):
            call(vm, IPA, 1)


def test_host_may_not_touch_the_state_of_a_shared_page(rig: Rig, vm: RigVm) -> None:
    pfn = rig.first_pfn
    rig.mem.host_donate_guest(vm, pfn, GFN, 1)
    for share in (False, True):
        if share:
            rig.mem.guest_share_host(vm, IPA, 1)
        for call in (rig.mem.host_share_hyp, rig.mem.host_unshare_hyp):
            with rig.refused(Errno.EPERM):
                call(pfn)
        for transfer in (rig.mem.host_donate_hyp, rig.mem.hyp_donate_host):
            with rig.refused(Errno.EPERM):
                transfer(pfn, 1)
        with rig.refused(Errno.EPERM):
            rig.mem.host_donate_guest(vm, pfn, GFN + 1, 1)
        with rig.refused(Errno.EPERM):
            rig.mem.host_share_guest(vm, pfn, GFN + 1, 1, PROT_RWX)


def test_without_protection() -> None:
    rig = Rig(protected=False)
    vm = rig.vm()
    rig.mem.host_donate_guest(vm, rig.first_pfn, GFN, 1024)
    assert rig.mem.guest_share_host(vm, IPA, 1) == 1
    assert rig.mem.guest_share_host(vm, IPA + 4096, 300) == 256
    assert rig.mem.guest_unshare_host(vm, IPA, 257) == 256
    rig.sound()
