# SPDX-License-Identifier: GPL-2.0-or-later
"""A host that goes for a guest's page by DMA: stopped by EL2, and let through by each EL2 that
lacks the guard in question. A way that is shut only because the test is wrong would stay shut."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from fakes.el2_rig import El2, Guest
from pkvm.arm64.smmu import Reg
from pkvm.check.mutants import dma, weakened
from pkvm.hyp.abi import HostCall
from pkvm.machine.machine import DMA_STREAM, SMMU_BASE
from pkvm.machine.memory import BusError
from pkvm.machine.smmu_streams import StreamMaster
from pkvm.machine.stage2 import Stage2Fault

PAGE = 4096
DOMAIN, IOVA = 1, 0x5000
READ = 1
SECRET = b"nobody but the guest"
GFN = 0x4_8000


class Target:
    """A guest, and a page that becomes its own with a secret in it."""

    def __init__(self, *, watched: bool = True) -> None:
        self.el2 = El2()
        if not watched:
            self.el2.recorder.watch = None
        self.guest = Guest(self.el2, [], ram_pages=4)
        self.page = self.el2.pages()
        self.device = self.el2.device()

    def donate(self) -> int:
        """Give the page away; EL2's answer. Then the guest writes to it."""
        self.guest.load()
        result = self.el2.x1(HostCall.HOST_DONATE_GUEST, self.page >> 12, GFN, 1)
        self.el2.call(HostCall.VCPU_PUT)
        if result == 0:
            self.el2.machine.memory.write(self.page, SECRET)
        return result

    def domain(self) -> None:
        """A paged domain, and the device in it."""
        el2 = self.el2
        el2.call(HostCall.IOMMU_ALLOC_DOMAIN, DOMAIN, el2.pages(2, align=2 * PAGE))
        el2.call(HostCall.IOMMU_TOPUP, DOMAIN, el2.link([el2.pages() for _ in range(4)]), 4)
        el2.call(HostCall.IOMMU_ATTACH, DOMAIN, DMA_STREAM)

    def reads(self, device: StreamMaster, address: int) -> bool:
        """Whether the device sees the secret there."""
        try:
            return device.read(address, len(SECRET)) == SECRET
        except (Stage2Fault, BusError):
            return False


def by_its_address(target: Target) -> bool:
    assert target.donate() == 0
    return target.reads(target.device, target.page)


def by_what_is_cached(target: Target) -> bool:
    target.device.read(target.page, 8)
    assert target.donate() == 0
    return target.reads(target.device, target.page)


def by_another_stream(target: Target) -> bool:
    assert target.donate() == 0
    smmu = target.el2.machine.smmu
    assert smmu is not None
    return any(
        target.reads(smmu.master(stream, "rogue"), target.page)
        for stream in (0, 9, 63, 64, 1 << 16)
    )


def by_switching_the_smmu_off(target: Target) -> bool:
    assert target.donate() == 0
    bus = target.el2.bus
    try:
        bus.write(SMMU_BASE + Reg.CR0, bytes(4))
        bus.write(SMMU_BASE + Reg.GBPA, (1 << 31).to_bytes(4, "little"))
    except Stage2Fault:
        return False
    return target.reads(target.device, target.page)


def by_mapping_before_donating(target: Target) -> bool:
    target.domain()
    target.el2.call(HostCall.IOMMU_MAP, DOMAIN, IOVA, target.page, PAGE, READ)
    if target.donate():
        return False
    return target.reads(target.device, IOVA)


def by_mapping_after_donating(target: Target) -> bool:
    target.domain()
    assert target.donate() == 0
    if target.el2.x1(HostCall.IOMMU_MAP, DOMAIN, IOVA, target.page, PAGE, READ):
        return False
    return target.reads(target.device, IOVA)


ATTACKS: dict[str, Callable[[Target], bool]] = {
    "devices lose what the host loses": by_its_address,
    "the SMMU forgets what was lost": by_what_is_cached,
    "streams that EL2 does not know abort": by_another_stream,
    "the SMMU's registers are EL2's": by_switching_the_smmu_off,
    "a page that is mapped for DMA stays the host's": by_mapping_before_donating,
    "only pages of the host's own are mapped for DMA": by_mapping_after_donating,
}


def test_every_guard_has_its_attack() -> None:
    assert set(ATTACKS) == set(dma.MUTANTS)


@pytest.mark.parametrize("guard", ATTACKS)
def test_it_is_stopped(guard: str) -> None:
    target = Target()
    assert not ATTACKS[guard](target)
    target.el2.sound()
    target.el2.machine.close()


@pytest.mark.parametrize("guard", ATTACKS)
def test_without_the_guard_it_gets_through(guard: str) -> None:
    with weakened(guard):
        target = Target(watched=False)
        assert ATTACKS[guard](target)
        target.el2.machine.close()


def test_the_errnos_are_the_dialects() -> None:
    target = Target()
    target.domain()
    target.el2.call(HostCall.IOMMU_MAP, DOMAIN, IOVA, target.page, PAGE, READ)
    assert target.donate() == -errno.EPERM
    target.el2.machine.close()
