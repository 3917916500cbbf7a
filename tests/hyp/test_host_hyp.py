# SPDX-License-Identifier: GPL-2.0-or-later
"""Host and EL2: before and after of each transition, every refusal, and what the host reaches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fakes.memory_rig import DEVICE, MIB, Rig
from pkvm.arm64.stage2 import ANNOTATION_HYP
from pkvm.events import Tlbi, Transition
from pkvm.hyp.errors import Errno, HypBug, Refused
from pkvm.machine.stage2 import Stage2Fault

OWNED = ("OWNED", "NOPAGE")
SHARED = ("SHARED_OWNED", "SHARED_BORROWED")
HYP = ("NOPAGE", "OWNED")


def test_share_and_unshare(rig: Rig) -> None:
    pfn = rig.first_pfn + 7
    rig.mem.host_share_hyp(pfn)
    assert rig.state(pfn) == SHARED
    rig.host_bus.write(pfn << 12, b"still mine")
    with rig.refused(Errno.EPERM, "host_state"):
        rig.mem.host_share_hyp(pfn)
    with rig.refused(Errno.EPERM, "host_state"):
        rig.mem.host_donate_hyp(pfn, 1)
    rig.mem.host_unshare_hyp(pfn)
    assert rig.state(pfn) == OWNED
    with rig.refused(Errno.EPERM, "host_state"):
        rig.mem.host_unshare_hyp(pfn)


def test_pins_hold_a_shared_page(rig: Rig) -> None:
    pfn = rig.first_pfn + 7
    with rig.refused(Errno.EPERM, "host_state"):
        rig.mem.pin_shared(pfn << 12)
    rig.mem.host_share_hyp(pfn)
    rig.mem.pin_shared((pfn << 12) + 0xFF8)
    rig.mem.pin_shared(pfn << 12)
    rig.mem.unpin_shared(pfn << 12)
    with rig.refused(Errno.EBUSY, "refcount"):
        rig.mem.host_unshare_hyp(pfn)
    rig.mem.unpin_shared(pfn << 12)
    with pytest.raises(HypBug):
        rig.mem.unpin_shared(pfn << 12)
    rig.mem.host_unshare_hyp(pfn)


def test_pins_do_not_wrap(rig: Rig) -> None:
    pfn = rig.first_pfn
    rig.mem.host_share_hyp(pfn)
    rig.mem.vmemmap.refcount[0] = 0xFFFF
    with rig.refused(Errno.EBUSY, "refcount"):
        rig.mem.pin_shared(pfn << 12)


@pytest.mark.parametrize(("page", "nr"), [(5, 1), (5, 3), (0, 512), (500, 600), (0, 2048)])
def test_donate_and_return(rig: Rig, page: int, nr: int) -> None:
    pfn = rig.first_pfn + page
    edges = sorted({pfn, pfn + nr - 1})
    for at in edges:
        rig.host_bus.write(at << 12, b"content")
    rig.mem.host_donate_hyp(pfn, nr)
    for at in edges:
        assert rig.state(at) == HYP
        assert rig.mem.host.stage2.leaf(at << 12) == (ANNOTATION_HYP, 3)
        assert rig.memory.read(at << 12, 7) == b"content"
        for bus in (rig.host_bus, rig.dma_bus):
            with pytest.raises(Stage2Fault):
                bus.read(at << 12, 1)
    for at in (pfn - 1, pfn + nr):
        if at >= rig.first_pfn:
            assert rig.state(at) == OWNED
            rig.host_bus.read(at << 12, 4096)
            rig.dma_bus.read(at << 12, 4096)
    rig.sound()
    assert (pfn << 12, nr << 12) in rig.code_forgotten
    with rig.refused(Errno.EPERM, "host_state"):
        rig.mem.host_donate_hyp(pfn, nr)
    rig.mem.hyp_donate_host(pfn, nr)
    for at in edges:
        assert rig.state(at) == OWNED
        assert rig.host_bus.read(at << 12, 7) == rig.dma_bus.read(at << 12, 7) == b"content"
    with rig.refused(Errno.EPERM, "host_state"):
        rig.mem.hyp_donate_host(pfn, nr)


def test_a_donation_is_whole_or_nothing(rig: Rig) -> None:
    rig.mem.host_share_hyp(rig.first_pfn + 600)
    with rig.refused(Errno.EPERM, "host_state") as refusal:
        rig.mem.host_donate_hyp(rig.first_pfn + 100, 800)
    assert refusal.refusal is not None
    assert refusal.refusal.pa == (rig.first_pfn + 600) << 12
    assert "SHARED_OWNED" in refusal.refusal.why


def test_a_table_is_not_given_away(rig: Rig) -> None:
    root = rig.mem.host.stage2.root
    with rig.refused(Errno.EBUSY, "refcount"):
        rig.mem.hyp_donate_host(root >> 12, 2)
    with pytest.raises(HypBug, match="uses"):
        rig.mem.hyp_donate_host_list(np.array([root >> 12]))
    with pytest.raises(HypBug, match="own"):
        rig.mem.hyp_donate_host_list(np.array([rig.first_pfn]))


CALLS: dict[str, Callable[[Rig, int], object]] = {
    "host_share_hyp": lambda rig, pfn: rig.mem.host_share_hyp(pfn),
    "host_unshare_hyp": lambda rig, pfn: rig.mem.host_unshare_hyp(pfn),
    "host_donate_hyp": lambda rig, pfn: rig.mem.host_donate_hyp(pfn, 1),
    "host_donate_hyp(3)": lambda rig, pfn: rig.mem.host_donate_hyp(pfn, 3),
    "hyp_donate_host": lambda rig, pfn: rig.mem.hyp_donate_host(pfn, 1),
    "pin_shared": lambda rig, pfn: rig.mem.pin_shared(pfn << 12),
}


@pytest.mark.parametrize("name", CALLS)
def test_numbers_that_cannot_be(rig: Rig, name: str) -> None:
    for pfn in (1 << 28, 1 << 52, (1 << 64) - 1, -1, -rig.first_pfn):
        with rig.refused(Errno.EINVAL, "pfn_range"):
            CALLS[name](rig, pfn)


@pytest.mark.parametrize("name", CALLS)
def test_only_ram_changes_owner(rig: Rig, name: str) -> None:
    for pfn in (0, DEVICE >> 12, rig.first_pfn - 3, rig.memory.ram_end >> 12, (1 << 28) - 3):
        with rig.refused(Errno.EPERM, "ram_range"):
            CALLS[name](rig, pfn)


@pytest.mark.parametrize("name", set(CALLS) - {"hyp_donate_host"})
def test_own_memory_of_el2_is_not_the_hosts(rig: Rig, name: str) -> None:
    for base, nbytes in (rig.carveout, rig.firmware):
        for pa in (base, base + nbytes - 3 * 4096):
            with rig.refused(Errno.EPERM):
                CALLS[name](rig, pa >> 12)


@pytest.mark.parametrize("nr", [0, -1, 1 << 28, (1 << 64) - 1, 1 << 64, (1 << 52) + 1])
@pytest.mark.parametrize("call", ["host_donate_hyp", "hyp_donate_host"])
def test_counts_that_cannot_be(rig: Rig, call: str, nr: int) -> None:
    with rig.refused(Errno.EINVAL, "pfn_range"):
        getattr(rig.mem, call)(rig.first_pfn, nr)


def test_a_range_half_in_ram(rig: Rig) -> None:
    for pfn, nr in ((rig.first_pfn - 1, 2), ((rig.memory.ram_end >> 12) - 1, 2), (0, 1 << 27)):
        with rig.refused(Errno.EINVAL, "ram_range"):
            rig.mem.host_donate_hyp(pfn, nr)


def test_events_in_the_order_of_the_deed(rig: Rig) -> None:
    """Host TLBI, then the devices', then the transition: facts §10."""
    pa = rig.memory.ram_base + 9 * 4096
    rig.mem.host_donate_hyp((pa >> 12) + 1, 1)
    rig.host_bus.read(pa, 1)
    rig.recorder.events.clear()
    rig.mem.host_donate_hyp(pa >> 12, 1)
    assert rig.recorder.events == [
        Tlbi(0, pa),
        Tlbi(0, pa, "smmu"),
        Transition("host_donate_hyp", pa, 1),
    ]
    rig.recorder.events.clear()
    rig.mem.hyp_donate_host(pa >> 12, 1)
    assert rig.recorder.events == [Transition("hyp_donate_host", pa, 1)], "nothing was cached"


def test_refusals_record_nothing(rig: Rig) -> None:
    rig.recorder.events.clear()
    with pytest.raises(Refused):
        rig.mem.host_donate_hyp(rig.carveout[0] >> 12, 1)
    assert rig.recorder.events == []


def test_without_protection_states_change_and_reach_does_not() -> None:
    rig = Rig(protected=False)
    pfn = rig.first_pfn
    rig.mem.host_donate_hyp(pfn, 1)
    rig.mem.host_donate_hyp(pfn + 1, 600)
    assert rig.state(pfn) == rig.state(pfn + 600) == HYP
    rig.host_bus.write(pfn << 12, b"reached")
    assert rig.dma_bus.read(pfn << 12, 7) == b"reached"
    rig.sound()
    rig.mem.hyp_donate_host(pfn, 601)
    rig.sound()
    assert rig.host_bus.context is None
    assert rig.memory.ram_bytes == 32 * MIB
