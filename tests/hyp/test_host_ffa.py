# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages that the host shares with the secure world."""

from __future__ import annotations

import pytest

from fakes.memory_rig import DEVICE, Rig, RigVm
from pkvm.check.invariants import check
from pkvm.events import Transition
from pkvm.hyp.errors import Errno


def test_share_and_back(rig: Rig) -> None:
    pfn = rig.first_pfn + 3
    rig.recorder.events.clear()
    rig.mem.host_share_ffa(pfn, 2)
    assert [rig.state(pfn + at) for at in (0, 1)] == [("SHARED_OWNED", "NOPAGE")] * 2
    rig.secure |= {pfn, pfn + 1}
    rig.sound()
    rig.host_bus.write(pfn << 12, b"still the host's")
    with rig.refused(Errno.EPERM, "host_state"):
        rig.mem.host_share_ffa(pfn + 1, 1)
    with rig.refused(Errno.EPERM, "host_state"):
        rig.mem.host_unshare_ffa(pfn, 3)
    rig.secure.clear()
    rig.mem.host_unshare_ffa(pfn, 2)
    rig.sound()
    assert [event for event in rig.recorder.events if isinstance(event, Transition)] == [
        Transition("host_share_ffa", pfn << 12, 2),
        Transition("host_unshare_ffa", pfn << 12, 2),
    ]


def test_what_a_guest_borrows_is_not_unshared(rig: Rig, vm: RigVm) -> None:
    """To the host's state alone the two look alike."""
    pfn = rig.first_pfn
    rig.mem.host_share_guest(vm, pfn, 7, 1, 7)
    with rig.refused(Errno.EPERM, "share_count"):
        rig.mem.host_unshare_ffa(pfn, 1)


def test_what_the_secure_world_has_goes_nowhere(rig: Rig, vm: RigVm) -> None:
    """Facts C15."""
    pfn = rig.first_pfn
    rig.mem.host_share_ffa(pfn, 1)
    rig.secure.add(pfn)
    with rig.refused(Errno.EPERM, "host_state"):
        rig.mem.host_donate_guest(vm, pfn, 7, 1)
    with rig.refused(Errno.EPERM, "host_state"):
        rig.mem.host_share_guest(vm, pfn, 7, 1, 7)
    with rig.refused(Errno.EPERM, "host_state"):
        rig.mem.host_donate_hyp(pfn, 1)


def test_a_guests_page_is_not_the_hosts_to_share(rig: Rig, vm: RigVm) -> None:
    """Facts C15: the confused deputy."""
    rig.mem.host_donate_guest(vm, rig.first_pfn, 7, 2)
    rig.mem.guest_share_host(vm, 8 << 12, 1)
    for page in range(2):
        with rig.refused(Errno.EPERM, "host_state"):
            rig.mem.host_share_ffa(rig.first_pfn + page, 1)


@pytest.mark.parametrize(
    ("pfn", "nr", "number"),
    [
        (DEVICE >> 12, 1, Errno.EPERM),
        (1 << 52, 1, Errno.EINVAL),
        (0x80000, 1 << 63, Errno.EINVAL),
        (0x80000, 0, Errno.EINVAL),
        (0x7FFFF, 2, Errno.EINVAL),
    ],
)
def test_numbers(rig: Rig, pfn: int, nr: int, number: Errno) -> None:
    for call in (rig.mem.host_share_ffa, rig.mem.host_unshare_ffa):
        with rig.refused(number):
            call(pfn, nr)


def test_the_checker_wants_to_know_of_them() -> None:
    """A page that looks shared and that nobody has on their list is one that was forgotten."""
    rig = Rig()
    rig.mem.host_share_ffa(rig.first_pfn, 1)
    assert check(rig.mem, rig.vms)
    assert check(rig.mem, rig.vms, {rig.first_pfn}) == []
    rig.mem.host_unshare_ffa(rig.first_pfn, 1)
    assert check(rig.mem, rig.vms, {rig.first_pfn})


def test_many_pages_at_once(rig: Rig) -> None:
    """So many that all invariants are looked at after the transition."""
    pfn = rig.first_pfn + 20
    rig.mem.host_share_ffa(pfn, 64)
    rig.secure |= set(range(pfn, pfn + 64))
    rig.sound()
    rig.mem.host_unshare_ffa(pfn, 64)
    rig.secure.clear()
    rig.sound()
