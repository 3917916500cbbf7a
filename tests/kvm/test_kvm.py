# SPDX-License-Identifier: GPL-2.0-or-later
"""Kvm, Vm and Vcpu: one ioctl a method, the right bytes, and exits that can be matched."""

from __future__ import annotations

import errno
import threading

import pytest

from fakes.fake_kernel import (
    Block,
    Fail,
    FakeKernel,
    Guest,
    Load,
    Step,
    Stop,
    Store,
    just,
    power_off,
)
from pkvm.kvm import (
    FailEntry,
    InternalError,
    Intr,
    Kvm,
    Mmio,
    ProtectedVmInfo,
    SystemEvent,
    Unknown,
    Vcpu,
)
from pkvm.uapi import kvm as uapi


def vcpu_of(*steps: Step) -> tuple[FakeKernel, Vcpu]:
    kernel = FakeKernel(lambda _: just(*steps))
    vcpu = Kvm(kernel).create_vm().create_vcpu(0)
    return kernel, vcpu


def test_closing_gives_every_descriptor_back_once() -> None:
    kernel = FakeKernel()
    closed = []
    with Kvm(kernel, on_close=lambda: closed.append(1)) as kvm, kvm.create_vm() as vm:
        with vm.create_vcpu(0) as vcpu:
            assert len(kernel.fds) == 3
            vcpu.set_reg("x0", 1)
            vcpu.close()
        vm.protected_vm_info()
        vm.close()
        kvm.close()
    assert kernel.fds == {}
    assert closed == [1]
    assert all(memory.closed for memory in kernel.memories)
    vcpu.kick()  # a kick that comes too late is nobody's


def test_system_ioctls() -> None:
    kernel = FakeKernel()
    kvm = Kvm(kernel)
    assert kvm.api_version() == 12
    assert kvm.check_extension(uapi.Cap.ARM_PROTECTED_VM) == 1
    assert kvm.check_extension(4711) == 0
    vm = kvm.create_vm(40)
    assert vm.check_extension(uapi.Cap.ARM_PROTECTED_VM) == 1
    assert [kvm.vcpu_mmap_size(), kvm.vcpu_mmap_size()] == [8192, 8192]
    names = [name for name, _ in kernel.log]
    assert names.count("GET_VCPU_MMAP_SIZE") == 1
    assert ("CREATE_VM", 40) in kernel.log
    with pytest.raises(OSError, match="No such file") as refused:
        Kvm(kernel, "/dev/nothing")
    assert refused.value.errno == errno.ENOENT


def test_memory_regions() -> None:
    kernel = FakeKernel()
    kvm = Kvm(kernel)
    vm = kvm.create_vm()
    memory = kvm.mmap(0x4000)
    vm.set_user_memory_region(0, 0x4000_0000, memory)
    vm.set_user_memory_region(
        1, 0x8000_0000, memory, flags=uapi.MemFlag.READONLY, offset=0x1000, size=0x2000
    )
    vm.set_user_memory_region(2, 0x9000_0000, None)
    sent = [value for name, value in kernel.log if name == "SET_USER_MEMORY_REGION"]
    assert [uapi.MEMORY_REGION.unpack(value) for value in sent if isinstance(value, bytes)] == [
        (0, 0, 0x4000_0000, 0x4000, memory.address),
        (1, 2, 0x8000_0000, 0x2000, memory.address + 0x1000),
        (2, 0, 0x9000_0000, 0, 0),
    ]


def test_protect_and_info() -> None:
    kernel = FakeKernel(firmware_size=0x5000)
    kvm = Kvm(kernel)
    vm = kvm.create_vm()
    assert vm.protected_vm_info() == ProtectedVmInfo(0x5000, 0)
    assert vm.protected_vm_info(64) == ProtectedVmInfo(0x5000, 64)
    assert vm.protected_vm_info(4096) == ProtectedVmInfo(0x5000, 64)
    assert vm.protected_vm_info(8) == ProtectedVmInfo(0x5000, 0)
    for size in (0, 7, 4097):
        with pytest.raises(ValueError, match="not between 8 and 4096"):
            vm.protected_vm_info(size)
    vm.protect(firmware_slot=3)
    name, sent = kernel.log[-1]
    assert name == "ENABLE_CAP"
    assert isinstance(sent, bytes)
    assert uapi.ENABLE_CAP.unpack(sent) == (199, 0, 3, 0, 0, 0)
    with pytest.raises(OSError, match="not permitted") as refused:
        vm.protect(firmware_slot=3)
    assert refused.value.errno == errno.EPERM


def test_init_asks_for_the_preferred_target() -> None:
    kernel, vcpu = vcpu_of()
    vcpu.init()
    assert kernel.vcpus[0].init == (5, 1 << 2, 0, 0, 0, 0, 0, 0)
    vcpu.init(power_off=True)
    assert kernel.vcpus[0].init == (5, 1 << 2 | 1, 0, 0, 0, 0, 0, 0)
    vcpu.init(features=[uapi.VcpuFeature.SVE], target=7)
    assert kernel.vcpus[0].init == (7, 1 << 4, 0, 0, 0, 0, 0, 0)


def test_registers_by_id_and_by_name() -> None:
    kernel, vcpu = vcpu_of()
    vcpu.set_reg("x0", 0x4000_0000)
    vcpu.set_reg("v31", 1 << 127)
    vcpu.set_one_reg(uapi.REG_FPCR, 0xFFFF_FFFF)
    assert kernel.vcpus[0].registers == {
        0x6030_0000_0010_0000: 0x4000_0000,
        uapi.reg_v(31): 1 << 127,
        uapi.REG_FPCR: 0xFFFF_FFFF,
    }
    assert vcpu.get_reg("x0") == 0x4000_0000
    assert vcpu.get_reg("v31") == 1 << 127
    assert vcpu.get_one_reg(uapi.REG_FPCR) == 0xFFFF_FFFF
    assert sorted(vcpu.reg_list()) == sorted(kernel.vcpus[0].registers)
    with pytest.raises(ValueError, match="no register 'x31'"):
        vcpu.get_reg("x31")
    with pytest.raises(ValueError, match="does not fit in the 4 bytes"):
        vcpu.set_one_reg(uapi.REG_FPCR, 1 << 32)
    with pytest.raises(OSError, match="No such file"):
        vcpu.get_reg("pc")


def test_an_empty_register_list() -> None:
    _, vcpu = vcpu_of()
    assert vcpu.reg_list() == ()


def test_mp_state() -> None:
    kernel, vcpu = vcpu_of()
    vcpu.mp_state = uapi.MpState.STOPPED
    assert kernel.vcpus[0].mp_state == 5
    assert vcpu.mp_state == uapi.MpState.STOPPED


def test_mmio_exits_and_their_answers() -> None:
    seen = []

    def guest(_: int) -> Guest:
        yield Store(0x0900_0000, 0x1122_3344_5566_7788, 8)
        yield Store(0x0900_0001, 0xAABB, 2)
        seen.append((yield Load(0x0B00_0000, 8)))
        seen.append((yield Load(0x0B00_0000, 1)))
        yield power_off()

    vcpu = Kvm(FakeKernel(guest)).create_vm().create_vcpu(0)
    assert vcpu.run() == Mmio(0x0900_0000, 8, 0x1122_3344_5566_7788, True)
    write = vcpu.run()
    assert write == Mmio(0x0900_0001, 2, 0xAABB, True)
    read = vcpu.run()
    assert read == Mmio(0x0B00_0000, 8, 0, False)
    assert isinstance(read, Mmio)
    vcpu.complete(read, -1)
    byte = vcpu.run()
    assert isinstance(byte, Mmio)
    vcpu.complete(byte, 0x1FF)
    assert vcpu.run() == SystemEvent("shutdown", (0,))
    assert seen == [2**64 - 1, 0xFF]


def test_completing_a_write_changes_nothing() -> None:
    _, vcpu = vcpu_of(Store(0x1000, 7), Load(0x1000))
    write = vcpu.run()
    assert isinstance(write, Mmio)
    before = bytes(vcpu._run)
    vcpu.complete(write, 0xFFFF)
    assert bytes(vcpu._run) == before


def test_every_other_exit_has_a_record() -> None:
    event = uapi.Run.SYSTEM_EVENT
    _, vcpu = vcpu_of(
        Stop(uapi.ExitReason.SYSTEM_EVENT, event.pack(2, 1, 1, *[0] * 15)),
        Stop(uapi.ExitReason.SYSTEM_EVENT, event.pack(3, 0, *[0] * 16)),
        Stop(uapi.ExitReason.SYSTEM_EVENT, event.pack(77, 99, *range(16))),
        Stop(uapi.ExitReason.INTR),
        Stop(uapi.ExitReason.FAIL_ENTRY, uapi.Run.FAIL_ENTRY.pack(5, 1)),
        Stop(uapi.ExitReason.INTERNAL_ERROR, uapi.Run.INTERNAL_ERROR.pack(4, 0)),
        Stop(uapi.ExitReason.ARM_NISV),
        Stop(0x1_06),  # not MMIO, although its low byte is
    )
    assert [vcpu.run() for _ in range(8)] == [
        SystemEvent("reset", (1,)),
        SystemEvent("crash", ()),
        SystemEvent("77", tuple(range(16))),
        Intr(),
        FailEntry(5, 1),
        InternalError(4),
        Unknown(28),
        Unknown(0x106),
    ]


def test_a_refused_entry_is_an_exit_once() -> None:
    _, vcpu = vcpu_of(
        Fail(errno.EINVAL, uapi.ExitReason.FAIL_ENTRY),
        Fail(errno.EINVAL),
        Fail(errno.EPERM, uapi.ExitReason.FAIL_ENTRY),
    )
    assert vcpu.run() == FailEntry(0, 0)
    with pytest.raises(OSError, match="Invalid argument"):
        vcpu.run()
    with pytest.raises(PermissionError):
        vcpu.run()


def test_a_kick_before_run_ends_the_next_run_and_only_that() -> None:
    _, vcpu = vcpu_of(power_off())
    vcpu.kick()
    assert vcpu.run() == Intr()
    assert vcpu.run() == SystemEvent("shutdown", (0,))


def test_a_kick_ends_a_run_under_way() -> None:
    _, vcpu = vcpu_of(Block())
    exits = []
    thread = threading.Thread(target=lambda: exits.append(vcpu.run()))
    thread.start()
    vcpu.kick()
    thread.join(10)
    assert exits == [Intr()]


def test_exits_can_be_matched_as_the_readme_does() -> None:
    _, vcpu = vcpu_of(Store(0x0900_0000, ord("k")), Load(0x1234), power_off())
    console = ""
    while True:
        match vcpu.run():
            case Mmio(address=0x0900_0000, is_write=True, data=data):
                console += chr(data & 0xFF)
            case Mmio() as mmio:
                vcpu.complete(mmio, 0)
            case SystemEvent(kind=kind):
                break
    assert (console, kind) == ("k", "shutdown")
