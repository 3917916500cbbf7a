# SPDX-License-Identifier: GPL-2.0-or-later
"""The rules about devices that guests have see what is broken; and without a guard what it guards
against happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest.mock import patch

import pytest

from fakes.device_rig import DEVICE_IPA, IOVA, PRIVATE, DeviceGuest
from fakes.el2_rig import PAGE, RAM_IPA
from pkvm.arm64.smccc import SUCCESS, Function
from pkvm.arm64.smmu import BYPASS_STE
from pkvm.arm64.stage2 import ADDRESS_MASK
from pkvm.check.invariants import check_hyp
from pkvm.hyp.abi import MAX_DOMAINS, HostCall
from pkvm.hyp.assignment import DEVICE_PAGE, Assignment
from pkvm.hyp.devices import DeviceTable
from pkvm.hyp.guest_host import GuestHost
from pkvm.hyp.host_memory import HostMemory
from pkvm.hyp.vmemmap import GUEST_SHARED_WITH_HOST, HOST_OWNED
from pkvm.machine.dma import SRC
from pkvm.machine.machine import DMA_BASE, DMA_STREAM, SG_BASE, SG_STREAM
from pkvm.machine.stage2 import Stage2Fault


class Scene:
    """A guest with the copy engine, attached to its domain, in which PRIVATE is mapped at IOVA; and
    another guest."""

    def __init__(self) -> None:
        self.owner = DeviceGuest()
        self.el2 = self.owner.el2
        self.other = DeviceGuest(self.el2)
        self.owner.assign()
        self.number = self.owner.alloc()
        assert self.owner.attach(self.number) == SUCCESS
        assert self.owner.map(self.number, IOVA, PRIVATE) == (SUCCESS, PAGE)
        self.mem = self.el2.hyp.mem
        (self.domain,) = self.mem.domains.values()
        assert self.mem.smmu is not None
        self.smmu = self.mem.smmu

    def page(self, ipa: int) -> int:
        return self.owner.pa(ipa) - self.mem.memory.ram_base >> 12

    def maps(self, pa: int) -> None:
        """The domain maps something else."""
        index, entry, _ = self.domain.stage2.find(IOVA)
        self.mem.memory.words[index] = entry & ~ADDRESS_MASK | pa

    def guest_maps(self, guest: DeviceGuest, ipa: int, pa: int) -> None:
        guest.guest.vm.stage2.put(ipa, pa | DEVICE_PAGE)


@pytest.fixture
def scene() -> Iterator[Scene]:
    scene = Scene()
    assert check_hyp(scene.el2.hyp) == []
    yield scene
    scene.el2.machine.close()


def uncounted(s: Scene) -> None:
    s.mem.vmemmap.refcount[s.page(PRIVATE)] = 0


def counted_for_nothing(s: Scene) -> None:
    s.mem.vmemmap.refcount[s.page(PRIVATE + PAGE)] = 1


def domain_of_nobody(s: Scene) -> None:
    s.domain.vm = 0x10FF


BREAKS: dict[str, Callable[[Scene], None]] = {
    "a mapping is not counted": uncounted,
    "a page is counted that is not mapped": counted_for_nothing,
    "another guest's page": lambda s: s.maps(s.other.pa(PRIVATE)),
    "the host's page": lambda s: s.maps(s.el2.pages()),
    "EL2's page": lambda s: s.maps(s.mem.carveout[0]),
    "no RAM": lambda s: s.maps(SG_BASE),
    "a device in bypass": lambda s: s.smmu.configure(DMA_STREAM, BYPASS_STE),
    "a device in the identity domain": lambda s: s.smmu.configure(
        DMA_STREAM,
        s.mem.host.identity.ste,  # type: ignore[union-attr]
    ),
    "the host's device in a guest's domain": lambda s: s.smmu.configure(
        SG_STREAM, s.smmu.ste(DMA_STREAM)
    ),
    "a device of a VM that is not there": lambda s: s.mem.devices.give(0, 0x10FF, 0, 0),
    "a device that the VM has not": lambda s: s.mem.devices.give(0, s.other.handle, 0, 0),
    "a domain of a VM that is not there": domain_of_nobody,
    "a domain that is gone": lambda s: s.mem.domains.clear(),
    "the host may map the registers": lambda s: s.mem.host.give_device(DMA_BASE, PAGE),
    "registers of the host's": lambda s: s.guest_maps(s.owner, DEVICE_IPA + PAGE, SG_BASE),
    "registers of another's": lambda s: s.guest_maps(s.other, DEVICE_IPA, DMA_BASE),
    "registers twice": lambda s: s.guest_maps(s.owner, DEVICE_IPA + PAGE, DMA_BASE),
    "no device's registers": lambda s: s.guest_maps(s.owner, DEVICE_IPA + PAGE, 0x2000_0000),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_what_is_broken_is_seen(scene: Scene, broken: str) -> None:
    BREAKS[broken](scene)
    problems = check_hyp(scene.el2.hyp)
    assert any(problem.startswith("P8: ") for problem in problems), problems


def test_without_a_release_the_device_reaches_what_was_the_guests() -> None:
    with patch.object(Assignment, "release", lambda self, vm: None):
        s = Scene()
        s.el2.recorder.watch = None  # which sees it at once
        s.el2.call(HostCall.START_TEARDOWN_VM, s.owner.handle)
        gfn = PRIVATE >> 12
        s.el2.x1(HostCall.RECLAIM_DYING_GUEST_RANGE, s.owner.handle, gfn, 1)
        s.el2.device().write(IOVA, b"still there")
        assert s.el2.machine.memory.read(s.owner.pa(PRIVATE), 11) == b"still there"
        assert any(problem.startswith("P8: ") for problem in check_hyp(s.el2.hyp))


def test_without_a_reset_the_guest_finds_what_the_host_left() -> None:
    with patch.object(DeviceTable, "reset", lambda self, index: None):
        guest = DeviceGuest()
        guest.el2.bus.write_u64(DMA_BASE + SRC, 0x1234)
        guest.assign()
        assert guest.el2.machine.memory.read(DMA_BASE + SRC, 8) != bytes(8)


def test_without_taking_the_registers_the_host_drives_the_device() -> None:
    with patch.object(HostMemory, "take_device", lambda self, base, nbytes: None):
        guest = DeviceGuest()
        guest.el2.x1(HostCall.ASSIGN_DEVICE, guest.handle, DMA_BASE, 0, 0)
        guest.el2.bus.write_u64(DMA_BASE + SRC, 0x1234)
        assert any(problem.startswith("P8: ") for problem in check_hyp(guest.el2.hyp))


def test_without_the_count_the_device_reaches_a_page_that_is_shared(scene: Scene) -> None:
    vm = scene.owner.guest.vm
    refcount = scene.mem.vmemmap.refcount
    page = scene.page(PRIVATE)
    refcount[page] = 0
    assert GuestHost.guest_share_host(scene.mem, vm, PRIVATE, 1) == 1
    assert scene.mem.vmemmap.state[page] == GUEST_SHARED_WITH_HOST
    assert any(problem.startswith("P8: ") for problem in check_hyp(scene.el2.hyp))


def test_without_the_count_the_device_reaches_what_was_given_back(scene: Scene) -> None:
    scene.mem.vmemmap.refcount[scene.page(PRIVATE)] = 0
    assert scene.owner.hvc(Function.MEM_RELINQUISH, PRIVATE)[0] == SUCCESS
    assert scene.mem.vmemmap.state[scene.page(PRIVATE)] == HOST_OWNED
    scene.el2.device().read(IOVA, 1)
    assert any(problem.startswith("P8: ") for problem in check_hyp(scene.el2.hyp))


def test_a_stale_translation_is_seen(scene: Scene) -> None:
    scene.el2.device().read(IOVA, 4)
    with patch.object(scene.smmu, "invalidate_page", lambda vmid, ipa: None):
        assert scene.owner.unmap(scene.number, IOVA) == (SUCCESS, PAGE)
    scene.el2.device().read(IOVA, 4)
    problems = set(check_hyp(scene.el2.hyp))
    assert problems == {f"P9: the SMMU still has {IOVA:#x} of domain {scene.domain.number}"}


def test_numbers_of_guests_domains_are_their_own(scene: Scene) -> None:
    assert scene.domain.number > MAX_DOMAINS
    theirs = scene.other.alloc()
    assert len(scene.mem.domains) == 2
    assert scene.other.map(theirs, IOVA, RAM_IPA + 2 * PAGE) == (SUCCESS, PAGE)
    with pytest.raises(Stage2Fault):
        scene.el2.device().write(IOVA + PAGE, b"x")
