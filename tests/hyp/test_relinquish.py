# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests give pages back for good."""

from __future__ import annotations

from fakes.memory_rig import HANDLE, Rig, RigVm
from pkvm.events import Tlbi, Transition
from pkvm.hyp.errors import Errno

GFN = 0x40000
IPA = GFN << 12


def test_a_page_goes_back_empty(rig: Rig, vm: RigVm) -> None:
    """Unmapped, flushed, zeroed, and only then within the host's reach (facts §12, 17)."""
    pa = rig.first_pfn << 12
    rig.mem.host_donate_guest(vm, rig.first_pfn, GFN, 2)
    rig.memory.write(pa, b"secret")
    seen = []
    rig.mem._invalidate_code = lambda pa, nbytes: seen.append(
        (rig.guest_state(vm, GFN), rig.mem.host.stage2.leaf(pa)[0] & 1)
    )
    rig.recorder.events.clear()
    assert rig.mem.guest_relinquish_host(vm, IPA) == pa
    assert seen == [("NOPAGE", 0)]
    assert rig.recorder.events == [
        Tlbi(1, IPA),
        Transition("guest_relinquish_host", pa, 1, HANDLE, IPA),
    ]
    assert rig.host_bus.read(pa, 8) == rig.dma_bus.read(pa, 8) == bytes(8)
    assert rig.state(rig.first_pfn) == ("OWNED", "NOPAGE")
    rig.sound()
    rig.mem.host_donate_guest(vm, rig.first_pfn, GFN, 1)
    rig.sound()


def test_one_page_of_a_block(rig: Rig, vm: RigVm) -> None:
    """Not the whole block (facts §12, 16)."""
    first = rig.first_pfn
    rig.mem.host_donate_guest(vm, first, GFN, 512)
    assert rig.mem.guest_relinquish_host(vm, IPA + 3 * 4096) == (first + 3) << 12
    states = [rig.guest_state(vm, GFN + page) for page in range(512)]
    assert states == ["OWNED"] * 3 + ["NOPAGE"] + ["OWNED"] * 508
    rig.sound()


def test_a_block_without_table_pages(rig: Rig) -> None:
    vm = rig.vm(HANDLE, tables=1)
    rig.mem.host_donate_guest(vm, rig.first_pfn, GFN, 512)
    with rig.refused(Errno.ENOMEM, "memcache") as caught:
        rig.mem.guest_relinquish_host(vm, IPA)
    assert caught.refusal is not None
    assert caught.refusal.pages_needed == 1


def test_nothing_there_is_no_error(rig: Rig, vm: RigVm) -> None:
    before = rig.recorder.events.copy()
    assert rig.mem.guest_relinquish_host(vm, IPA) is None
    assert rig.recorder.events == before


def test_refusals(rig: Rig, vm: RigVm) -> None:
    rig.mem.host_donate_guest(vm, rig.first_pfn, GFN, 1)
    rig.mem.guest_share_host(vm, IPA, 1)
    with rig.refused(Errno.EPERM, "guest_state"):
        rig.mem.guest_relinquish_host(vm, IPA)
    with rig.refused(Errno.EINVAL, "alignment"):
        rig.mem.guest_relinquish_host(vm, IPA + 8)
    for ipa in (1 << 40, 1 << 63, (1 << 64) - 4096):
        with rig.refused(Errno.ERANGE, "ipa_range"):
            rig.mem.guest_relinquish_host(vm, ipa)


def test_a_borrowed_page_is_not_the_guests_to_give(rig: Rig, vm: RigVm) -> None:
    rig.mem.host_share_guest(vm, rig.first_pfn, GFN, 1, 7)
    with rig.refused(Errno.EPERM, "guest_state"):
        rig.mem.guest_relinquish_host(vm, IPA)
