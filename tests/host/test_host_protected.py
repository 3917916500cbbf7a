# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_CAP_ARM_PROTECTED_VM: the RFC's errors in order, all or nothing, and what INFO writes."""

from __future__ import annotations

import struct
from functools import partial

import pytest

from fakes.host_fakes import BLOCK, PAGE, Rig, errno_of
from pkvm.host.firmware_node import FirmwareRegion
from pkvm.host.protected import tables_needed
from pkvm.hyp.abi import HostCall
from pkvm.uapi import kvm as uapi

EPERM, ENOENT, ENOMEM, EFAULT, EBUSY, EINVAL = 1, 2, 12, 14, 16, 22
ENABLE, INFO = uapi.ProtectedVm.ENABLE, uapi.ProtectedVm.INFO
FIRMWARE = FirmwareRegion(0x9000_0000, 0x3000)
RAM_IPA = 0x4000_0000
FW_SLOT = 3


class Case:
    """A VM with RAM, a firmware slot and a vCPU, on a host with guest firmware."""

    def __init__(self, *, protected: bool = True, firmware: FirmwareRegion | None = FIRMWARE):
        self.rig = Rig(protected=protected, firmware=firmware)
        self.free = self.rig.kernel.free_pages
        self.vm = self.rig.vm()
        self.ram = self.rig.kernel.mmap(2 * BLOCK)
        self.fw = self.rig.kernel.mmap(0x4000)
        self.ram.write(5, b"content")
        self.rig.slot(self.vm, 0, RAM_IPA, 2 * BLOCK, self.ram.address)
        self.rig.slot(self.vm, FW_SLOT, 0, 0x4000, self.fw.address)
        self.vcpu = self.rig.vcpu(self.vm)

    def enable(self, *args: int) -> int:
        return errno_of(self.rig.cap, self.vm, ENABLE, *(args or (FW_SLOT,)))

    def close(self) -> None:
        """Everything goes, and every page is back and zero or as it was."""
        for memory in (self.ram, self.fw):
            memory.close()
        for fd in (self.vm, self.vcpu):
            self.rig.kernel.close(fd)
        assert self.rig.kernel.free_pages == self.free
        assert not self.rig.bus.lost
        assert not self.rig.el2.shared
        assert not self.rig.el2.reserved


def test_enable_takes_every_slot_and_teardown_gives_all_back() -> None:
    case = Case()
    pa = case.ram.mapping.run.pa
    assert case.enable() == 0
    for memory in (case.ram, case.fw):
        for offset in range(0, memory.length, PAGE):
            assert errno_of(memory.read, offset, 1) == EFAULT
            assert errno_of(memory.syscall_write, offset, b"x") == EFAULT
    names = case.rig.el2.names()
    order = ["INIT_VM", "SET_FIRMWARE", "TOPUP_MEMCACHE", "DONATE_GUEST_SGLIST"]
    assert [name for name in names if name in order] == order
    assert ("SET_FIRMWARE", (0x1000, 0, 0x4000)) in case.rig.el2.calls
    case.close()
    assert bytes(case.rig.bus.ram[pa - 0x8000_0000 :][:16]) == bytes(16)


def test_enable_again_and_any_change_of_a_slot_are_eperm() -> None:
    case = Case()
    assert case.enable() == 0
    assert case.enable() == EPERM
    assert case.enable(77) == EPERM
    rig, vm, ram = case.rig, case.vm, case.ram
    for change in (
        (0, RAM_IPA, 2 * BLOCK, ram.address),
        (0, RAM_IPA, 2 * BLOCK, ram.address, uapi.MemFlag.LOG_DIRTY_PAGES),
        (0, RAM_IPA + BLOCK, 2 * BLOCK, ram.address),
        (0, 0, 0, 0),
        (9, 0, 0, 0),
        (9, 0x8000_0000, PAGE, ram.address),
        (9, 1, 1, 1),
    ):
        assert errno_of(rig.slot, vm, *change) == EPERM
    case.close()


def test_enable_after_a_run_is_ebusy() -> None:
    case = Case()
    assert errno_of(case.rig.run, case.vcpu) == EINVAL
    assert case.enable() == EBUSY
    assert case.enable(uapi.MEM_SLOTS_NUM) == EBUSY
    case.close()


def test_an_immediate_exit_counts_as_a_run() -> None:
    case = Case()
    page = case.rig.kernel.mmap_vcpu(case.vcpu, uapi.VCPU_MMAP_SIZE)
    page.view[uapi.Run.IMMEDIATE_EXIT] = 1
    assert errno_of(case.rig.run, case.vcpu) == 4
    assert case.enable() == EBUSY
    page.close()
    case.close()


def test_a_run_without_init_is_none() -> None:
    case = Case()
    late = case.rig.kernel.ioctl(case.vm, uapi.Ioctl.CREATE_VCPU, 1)
    assert errno_of(case.rig.run, late) == 8
    assert case.enable() == 0
    case.rig.kernel.close(late)
    case.close()


@pytest.mark.parametrize(
    ("slot", "expected"),
    [
        (uapi.MEM_SLOTS_NUM, EINVAL),
        ((1 << 64) - 1, EINVAL),
        (1 << 32 | FW_SLOT, EINVAL),
        (uapi.MEM_SLOTS_NUM - 1, ENOENT),
        (1, ENOENT),
    ],
)
def test_the_firmware_slot_must_exist(slot: int, expected: int) -> None:
    case = Case()
    assert case.enable(slot) == expected
    assert case.enable() == 0
    case.close()


def test_no_slots_at_all_is_enoent() -> None:
    rig = Rig(firmware=FIRMWARE)
    assert errno_of(rig.cap, rig.vm(), ENABLE, 0) == ENOENT


def test_without_guest_firmware_enable_is_einval() -> None:
    case = Case(firmware=None)
    assert case.enable() == EINVAL
    assert case.enable(1) == EINVAL


@pytest.mark.parametrize("flags", [uapi.MemFlag.LOG_DIRTY_PAGES, uapi.MemFlag.READONLY])
def test_a_firmware_slot_with_flags_is_einval_even_if_small(flags: int) -> None:
    case = Case()
    case.rig.slot(case.vm, 4, 0x10_0000, PAGE, case.fw.address, flags)
    assert case.enable(4) == EINVAL


def test_a_firmware_slot_that_is_too_small_is_enomem() -> None:
    case = Case()
    case.rig.slot(case.vm, 4, 0x10_0000, 0x2000, case.fw.address)
    assert case.enable(4) == ENOMEM


@pytest.mark.parametrize(
    ("flags", "args", "expected"),
    [
        (2, (0,), EINVAL),
        (0xFFFF_FFFF, (0,), EINVAL),
        (ENABLE, (FW_SLOT, 1), EINVAL),
        (ENABLE, (FW_SLOT, 0, 1), EINVAL),
        (ENABLE, (FW_SLOT, 0, 0, 1), EINVAL),
        (INFO, (0, 0, 1), EINVAL),
        (INFO, (0, 64, 0, 1), EINVAL),
        (2, (0, 1), EINVAL),
    ],
)
def test_reserved_arguments_and_unknown_flags(
    flags: int, args: tuple[int, ...], expected: int
) -> None:
    case = Case()
    assert errno_of(case.rig.cap, case.vm, flags, *args) == expected
    assert case.enable() == 0
    assert errno_of(case.rig.cap, case.vm, flags, *args) == expected, "before EPERM"


def test_other_capabilities_and_hosts_cannot_be_enabled() -> None:
    case = Case()
    for cap in (0, 3, 198, 200, 0xFFFF_FFFF):
        assert errno_of(partial(case.rig.cap, case.vm, 0, 0, cap=cap)) == EINVAL
    case = Case(protected=False)
    assert case.enable() == EINVAL
    assert errno_of(case.rig.cap, case.vm, INFO, case.ram.address) == EINVAL


@pytest.mark.parametrize(
    "call",
    [
        HostCall.INIT_VM,
        HostCall.HOST_SHARE_HYP,
        HostCall.SET_FIRMWARE,
        HostCall.TOPUP_MEMCACHE,
        HostCall.DONATE_GUEST_SGLIST,
    ],
)
def test_a_failed_enable_leaves_everything_as_it_was(call: HostCall) -> None:
    case = Case()
    pages = case.rig.kernel.free_pages
    case.rig.el2.refuse[call] = 28
    assert case.enable() == 28
    assert case.rig.kernel.free_pages == pages
    assert case.ram.read(5, 7) == b"content"
    case.rig.slot(case.vm, 0, 0, 0, 0)
    case.rig.slot(case.vm, 0, RAM_IPA, BLOCK, case.ram.address)
    assert case.enable() == 0
    case.close()


def test_a_slot_without_user_memory_fails_enable_with_efault() -> None:
    case = Case()
    case.rig.slot(case.vm, 8, 0x8000_0000, PAGE, 0x1000)
    calls = len(case.rig.el2.calls)
    assert case.enable() == EFAULT
    assert len(case.rig.el2.calls) == calls
    case.rig.slot(case.vm, 8, 0, 0, 0)
    assert case.enable() == 0
    case.close()


def test_two_slots_with_the_same_memory_cannot_be_donated() -> None:
    case = Case()
    case.rig.slot(case.vm, 8, 0x8000_0000, PAGE, case.ram.address + PAGE)
    assert case.enable() == EPERM
    assert case.ram.read(5, 7) == b"content"
    case.close()


def test_a_vm_that_failed_to_enable_can_still_run_unprotected() -> None:
    case = Case()
    case.rig.el2.refuse[HostCall.DONATE_GUEST_SGLIST] = EPERM
    assert case.enable() == EPERM
    assert errno_of(case.rig.run, case.vcpu) == EINVAL
    assert not next(iter(case.rig.el2.vms.values())).protected
    case.close()


def test_munmap_does_not_take_pages_from_a_protected_guest() -> None:
    case = Case()
    assert case.enable() == 0
    free = case.rig.kernel.free_pages
    case.ram.close()
    assert case.rig.kernel.free_pages == free
    case.close()


def info(case: Case, size: int) -> bytes:
    memory = case.rig.kernel.mmap(PAGE)
    memory.write(0, b"\xee" * PAGE)
    case.rig.cap(case.vm, INFO, memory.address, size)
    written = memory.read(0, 128)
    memory.close()
    return written


def test_info_writes_the_rfcs_64_bytes() -> None:
    written = info(Case(), 0)
    assert struct.unpack("<8Q", written[:64]) == (0x3000, 0, 0, 0, 0, 0, 0, 0)
    assert written[64:] == b"\xee" * 64
    assert struct.unpack("<Q", info(Case(firmware=None), 0)[:8]) == (0,)


@pytest.mark.parametrize("size", [1, 8, 15, 16, 63, 64, 65, 100, 128])
def test_info_with_a_size_truncates_or_pads_and_says_what_it_knows(size: int) -> None:
    whole = struct.pack("<8Q", 0x3000, 64, 0, 0, 0, 0, 0, 0) + bytes(64)
    assert info(Case(), size) == whole[:size] + b"\xee" * (128 - size)


def test_info_fills_a_buffer_of_many_pages() -> None:
    case = Case()
    memory = case.rig.kernel.mmap(200 * PAGE)
    memory.write(0, b"\xee" * memory.length)
    case.rig.cap(case.vm, INFO, memory.address, memory.length - 1)
    assert memory.read(64, memory.length - 65) == bytes(memory.length - 65)
    assert memory.read(memory.length - 1, 1) == b"\xee"


def test_info_works_after_enable_and_refuses_bad_pointers() -> None:
    case = Case()
    assert case.enable() == 0
    assert info(case, 0)[:2] == b"\0\x30"
    memory = case.rig.kernel.mmap(PAGE)
    for address, size in (
        (0, 0),
        (memory.address - 1, 0),
        (memory.address + PAGE - 63, 0),
        (memory.address, PAGE + 1),
        (memory.address, 1 << 63),
        ((1 << 64) - 8, 8),
        (case.ram.address, 0),
        (case.ram.address, 1),
    ):
        assert errno_of(case.rig.cap, case.vm, INFO, address, size) == EFAULT
    memory.close()
    case.close()


@pytest.mark.parametrize(
    ("extents", "tables"),
    [
        ([(0, 0, 512)], 1),
        ([(0, 0, 511)], 2),
        ([(0, 1, 512)], 3),
        ([(1, 0, 512)], 2),
        ([(0, 0, 1 << 18)], 1),
        ([(1, 0, 1 << 18)], 1 + 512),
        ([(0, 1 << 18, 512), (512, 0, 512)], 2),
        ([(0, 0, 256), (256, 256, 256)], 2),
        ([(0, 511, 2)], 3),
        ([(512, (1 << 18) - 512, 1024)], 2),
    ],
)
def test_tables_needed(extents: list[tuple[int, int, int]], tables: int) -> None:
    assert tables_needed(extents) == tables
