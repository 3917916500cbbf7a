# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory for a protected VM and the firmware in it: all or none, and exactly once."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from fakes.el2_rig import (
    FIRMWARE_BYTES,
    FIRMWARE_IPA,
    PAGE,
    RAM_IPA,
    SLOT_BYTES,
    El2,
    Guest,
)
from pkvm.events import VmLife
from pkvm.hyp.abi import HOST_CALL_BASE, HostCall
from pkvm.hyp.policy import ANDROID, UPSTREAM
from pkvm.machine.stage2 import Stage2Fault

FW_GFN = FIRMWARE_IPA >> 12
SLOT_PAGES = SLOT_BYTES >> 12


class Bare(Guest):
    """A protected VM with table pages and nothing donated."""

    def _donate(self) -> None:
        self.el2.bus.write(self.slot, b"host" * (SLOT_BYTES // 4))
        self.el2.bus.write(self.ram, b"RAM!" * (self.ram_pages * PAGE // 4))

    def donate(self, *entries: tuple[int, int, int]) -> int:
        listing = self.el2.list_page(*entries)
        return self.el2.x1(HostCall.DONATE_GUEST_SGLIST, self.handle, listing, len(entries))

    def set_firmware(self, ipa: int = FIRMWARE_IPA, nbytes: int = SLOT_BYTES) -> int:
        return self.el2.x1(HostCall.SET_FIRMWARE, self.handle, ipa, nbytes)

    def refused(self, number: int, *entries: tuple[int, int, int], check_name: str = "") -> None:
        listing = self.el2.list_page(*entries)
        self.el2.assert_refused(
            number,
            HostCall.DONATE_GUEST_SGLIST,
            self.handle,
            listing,
            len(entries),
            check_name=check_name,
        )


@pytest.fixture
def el2() -> El2:
    return El2()


@pytest.fixture
def vm(el2: El2) -> Bare:
    return Bare(el2)


def slot_entries(vm: Bare, *order: int) -> list[tuple[int, int, int]]:
    """The slot as single pages in this order."""
    return [((vm.slot >> 12) + page, FW_GFN + page, 1) for page in order]


def test_what_set_firmware_refuses(el2: El2, vm: Bare) -> None:
    call = HostCall.SET_FIRMWARE
    for ipa, nbytes in (
        (FIRMWARE_IPA + 1, SLOT_BYTES),
        (FIRMWARE_IPA, SLOT_BYTES + 1),
        (FIRMWARE_IPA, 0),
        ((1 << 40) - PAGE, 2 * PAGE),
        (1 << 40, SLOT_BYTES),
        ((1 << 64) - PAGE, 2 * PAGE),
        (0, (1 << 64) - PAGE),
    ):
        el2.assert_refused(errno.EINVAL, call, vm.handle, ipa, nbytes, check_name="ipa_range")
    small = FIRMWARE_BYTES - PAGE
    el2.assert_refused(errno.ENOMEM, call, vm.handle, FIRMWARE_IPA, small)
    el2.assert_refused(errno.ENOENT, call, vm.handle + 1, FIRMWARE_IPA, SLOT_BYTES)
    el2.assert_refused(errno.ENOENT, call, 0, FIRMWARE_IPA, SLOT_BYTES)
    other = Guest(el2, protected=False)
    el2.assert_refused(errno.EINVAL, call, other.handle, FIRMWARE_IPA, SLOT_BYTES)
    el2.call(HostCall.START_TEARDOWN_VM, vm.handle)
    el2.assert_refused(errno.ENOENT, call, vm.handle, FIRMWARE_IPA, SLOT_BYTES)


def test_a_machine_without_firmware() -> None:
    el2 = El2(firmware=False)
    assert el2.call(HostCall.FIRMWARE_INFO) == 0
    vm = Bare(el2)
    args = (vm.handle, FIRMWARE_IPA, SLOT_BYTES)
    el2.assert_refused(errno.EINVAL, HostCall.SET_FIRMWARE, *args, check_name="firmware")


def test_infos(el2: El2) -> None:
    assert el2.call(HostCall.FIRMWARE_INFO) == FIRMWARE_BYTES
    assert el2.call(HostCall.PGD_INFO) == 0x2000


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
@pytest.mark.parametrize("scattered", [False, True])
def test_the_image_lands_where_the_range_is(
    el2: El2, vm: Bare, order: tuple[int, ...], scattered: bool
) -> None:
    vm.set_firmware()
    entries = slot_entries(vm, *order) if scattered else [(vm.slot >> 12, FW_GFN, SLOT_PAGES)]
    assert vm.donate((vm.ram >> 12, RAM_IPA >> 12, 4), *entries) == 0
    content = el2.machine.memory.read(vm.slot, SLOT_BYTES)
    assert content == el2.image + bytes(SLOT_BYTES - FIRMWARE_BYTES)
    assert el2.machine.memory.read(vm.ram, 4) == b"RAM!"
    assert VmLife("firmware", vm.handle) in el2.recorder.events
    el2.sound()


def test_the_range_may_lie_inside_an_entry(el2: El2) -> None:
    vm = Bare(el2, ram_pages=SLOT_PAGES + 4)
    vm.set_firmware(RAM_IPA + 2 * PAGE)
    assert vm.donate((vm.ram >> 12, RAM_IPA >> 12, SLOT_PAGES + 4)) == 0
    memory = el2.machine.memory
    assert memory.read(vm.ram, 2 * PAGE) == b"RAM!" * (2 * PAGE // 4)
    assert memory.read(vm.ram + 2 * PAGE, FIRMWARE_BYTES) == el2.image
    after = vm.ram + 2 * PAGE + SLOT_BYTES
    assert memory.read(after, 2 * PAGE) == b"RAM!" * (2 * PAGE // 4)


def test_a_range_in_parts_is_refused(el2: El2, vm: Bare) -> None:
    vm.set_firmware()
    vm.refused(errno.EINVAL, *slot_entries(vm, 0, 1, 2), check_name="firmware_range")
    vm.refused(errno.EINVAL, *slot_entries(vm, 1, 2, 3), check_name="firmware_range")
    vm.refused(errno.EPERM, *slot_entries(vm, 0, 1, 2, 2))
    assert el2.bus.read(vm.slot, 4) == b"host"
    vm.load()
    args = (vm.slot >> 12, FW_GFN, SLOT_PAGES - 1)
    el2.assert_refused(errno.EINVAL, HostCall.HOST_DONATE_GUEST, *args)
    el2.call(HostCall.HOST_DONATE_GUEST, vm.slot >> 12, FW_GFN, SLOT_PAGES)
    assert el2.machine.memory.read(vm.slot, FIRMWARE_BYTES) == el2.image


def test_a_list_that_fails_loads_nothing(el2: El2, vm: Bare) -> None:
    vm.set_firmware()
    good = (vm.slot >> 12, FW_GFN, SLOT_PAGES)
    for bad in (
        (el2.hyp.mem.carveout[0] >> 12, RAM_IPA >> 12, 1),
        (el2.firmware_pa >> 12, RAM_IPA >> 12, 1),
        (vm.page >> 12, RAM_IPA >> 12, 1),
        (vm.areas[0] >> 12, RAM_IPA >> 12, 1),
        (0x10000, RAM_IPA >> 12, 1),
    ):
        vm.refused(errno.EPERM, good, bad)
    for bad in (
        ((1 << 64) - 1, RAM_IPA >> 12, 1),
        (vm.ram >> 12, (1 << 64) - 1, 2),
        (vm.ram >> 12, RAM_IPA >> 12, (1 << 64) - 1),
        (vm.ram >> 12, 1 << 28, 1),
        (vm.ram >> 12, RAM_IPA >> 12, 0),
    ):
        vm.refused(errno.EINVAL, good, bad)
    assert el2.bus.read(vm.slot, 4) == b"host"
    assert not vm.vm.firmware_loaded


def test_the_firmware_can_be_said_again_until_it_is_there(el2: El2, vm: Bare) -> None:
    assert vm.set_firmware(0x8000_0000) == 0
    assert vm.set_firmware() == 0
    assert vm.donate((vm.slot >> 12, FW_GFN, SLOT_PAGES)) == 0
    args = (vm.handle, FIRMWARE_IPA, SLOT_BYTES)
    el2.assert_refused(errno.EBUSY, HostCall.SET_FIRMWARE, *args)


def test_the_hosts_list_must_be_the_hosts(el2: El2, vm: Bare) -> None:
    other = Guest(el2)
    call = HostCall.DONATE_GUEST_SGLIST
    for pa in (other.ram, other.areas[0], el2.hyp.mem.carveout[0], el2.firmware_pa):
        el2.assert_refused(errno.EPERM, call, vm.handle, pa, 1, check_name="host_state")
    edge = other.ram - 8
    el2.assert_refused(errno.EPERM, call, vm.handle, edge, 1, check_name="host_state")
    end = el2.machine.memory.ram_end
    for pa, nr in (
        (0x1000_0000, 1), (0, 1), (end, 1), (end - 16, 1), (vm.ram + 4, 1), ((1 << 64) - 8, 1),
        (vm.ram, 0), (vm.ram, (1 << 64) - 1), (vm.ram, 1 << 61), (vm.ram, 2_000_000),
    ):  # fmt: skip
        el2.assert_refused(errno.EINVAL, call, vm.handle, pa, nr, check_name="list_range")


def test_the_list_is_read_once(el2: El2, vm: Bare, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that rewrites the list while EL2 works on it changes nothing."""
    listing = el2.list_page((vm.ram >> 12, RAM_IPA >> 12, 1))
    mem = el2.hyp.mem
    seen: list[np.ndarray[tuple[int, ...], np.dtype[np.uint64]]] = []

    def spy(target: object, entries: np.ndarray[tuple[int, ...], np.dtype[np.uint64]]) -> None:
        el2.machine.memory.write_u64(listing, 0)
        seen.append(entries.copy())

    monkeypatch.setattr(mem, "host_donate_guest_list", spy)
    el2.call(HostCall.DONATE_GUEST_SGLIST, vm.handle, listing, 1)
    assert seen[0].tolist() == [[vm.ram >> 12, RAM_IPA >> 12, 1]]


def test_donation_is_for_protected_vms(el2: El2) -> None:
    guest = Guest(el2, protected=False)
    listing = el2.list_page((el2.pages() >> 12, 0x50000, 1))
    call = HostCall.DONATE_GUEST_SGLIST
    el2.assert_refused(errno.EINVAL, call, guest.handle, listing, 1, check_name="vm_kind")
    guest.load()
    el2.assert_refused(errno.EINVAL, HostCall.HOST_DONATE_GUEST, el2.pages() >> 12, 0x50000, 1)


def test_without_table_pages_there_is_no_memory(el2: El2) -> None:
    vm = Bare(el2, tables=0)
    vm.refused(errno.ENOMEM, (vm.ram >> 12, RAM_IPA >> 12, 4), check_name="memcache")
    pages = [el2.pages() for _ in range(2)]
    assert el2.call(HostCall.TOPUP_MEMCACHE, vm.handle, el2.link(pages), 2) == 2
    assert vm.donate((vm.ram >> 12, RAM_IPA >> 12, 4)) == 0


def test_topup_refuses_what_is_not_the_hosts(el2: El2) -> None:
    vm = Bare(el2)
    other = Guest(el2)
    call = HostCall.TOPUP_MEMCACHE
    for pa in (other.ram, vm.page, el2.hyp.mem.carveout[0], 0x1000_0000, 8, (1 << 64) - PAGE):
        el2.assert_refused(errno.ENOMEM, call, vm.handle, pa, 1)
    page = el2.link([el2.pages()])
    for nr in (0, 1 << 40, (1 << 64) - 1):
        el2.assert_refused(errno.EINVAL, call, vm.handle, page, nr)
    circle = el2.pages()
    el2.bus.write_u64(circle, circle)
    el2.assert_refused(errno.ENOMEM, call, vm.handle, circle, 2, tables=False)


def test_nobody_but_the_guest_reads_the_firmware(el2: El2, vm: Bare) -> None:
    vm.set_firmware()
    vm.donate((vm.slot >> 12, FW_GFN, SLOT_PAGES))
    for pa in (el2.firmware_pa, el2.firmware_pa + FIRMWARE_BYTES - 8, vm.slot, vm.slot + PAGE):
        for bus in (el2.machine.host_bus, el2.device()):
            with pytest.raises(Stage2Fault):
                bus.read(pa, 8)


# Android: page by page


class Fresh(Bare):
    """Neither vCPUs nor memory."""

    def __init__(self, el2: El2) -> None:
        super().__init__(el2, vcpus=0, created_vcpus=1, firmware=False)


def test_android_fills_what_is_donated_of_the_range() -> None:
    el2 = El2(policy=ANDROID)
    vm = Fresh(el2)
    assert vm.set_firmware(0x8000_0000) == 0
    assert vm.set_firmware() == 0, "until somebody might have asked for it"
    read = el2.machine.memory.read
    # The page before the range, and its first two; then the last one.
    assert vm.donate((vm.ram >> 12, FW_GFN - 1, 3)) == 0
    assert read(vm.ram, PAGE) == b"RAM!" * (PAGE // 4)
    assert read(vm.ram + PAGE, 2 * PAGE) == el2.image
    assert vm.donate(*slot_entries(vm, 3)) == 0
    assert read(vm.slot + 3 * PAGE, PAGE) == bytes(PAGE), "behind the image"
    assert read(vm.slot + 2 * PAGE, PAGE) == b"host" * (PAGE // 4), "still the host's"
    assert not vm.vm.firmware_loaded
    el2.sound()


def test_android_names_the_range_before_vcpus_and_memory() -> None:
    el2 = El2(policy=ANDROID)
    with_memory, with_vcpu = Fresh(el2), Fresh(el2)
    assert with_memory.donate((with_memory.ram >> 12, RAM_IPA >> 12, 1)) == 0
    with_vcpu.add_vcpu(0)
    for vm in (with_memory, with_vcpu):
        args = (vm.handle, FIRMWARE_IPA, SLOT_BYTES)
        el2.assert_refused(errno.EBUSY, HostCall.SET_FIRMWARE, *args, check_name="firmware")


def test_upstream_has_none() -> None:
    el2 = El2(policy=UPSTREAM)
    vm = Fresh(el2)
    function = HOST_CALL_BASE + HostCall.SET_FIRMWARE
    with el2.unchanged():
        assert el2.hyp.host_call(function, vm.handle, FIRMWARE_IPA, SLOT_BYTES) == (-1, 0)
