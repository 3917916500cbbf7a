# SPDX-License-Identifier: GPL-2.0-or-later
"""The system calls: numbers, layouts and Linux's errnos, descriptors, reference counts."""

from __future__ import annotations

import pytest

from fakes.host_fakes import PAGE, Rig, errno_of
from pkvm import events
from pkvm.arm64.registers import MPIDR_EL1, VBAR_EL1, mpidr_of_vcpu_id
from pkvm.host import regs
from pkvm.hyp.abi import HostCall
from pkvm.uapi import kvm as uapi

EPERM, ENOENT, EIO, E2BIG, ENOEXEC, EBADF, ENOMEM = 1, 2, 5, 7, 8, 9, 12
EFAULT, EBUSY, EEXIST, ENODEV, EINVAL, EMFILE, ENOTTY = 14, 16, 17, 19, 22, 24, 25
Ioctl = uapi.Ioctl


def test_system_ioctls() -> None:
    rig = Rig()
    call = rig.kernel.ioctl
    assert call(rig.kvm, Ioctl.GET_API_VERSION) == 12
    assert call(rig.kvm, Ioctl.GET_VCPU_MMAP_SIZE) == 8192
    assert errno_of(lambda: call(rig.kvm, Ioctl.GET_API_VERSION, 1)) == EINVAL
    assert errno_of(lambda: call(rig.kvm, Ioctl.GET_VCPU_MMAP_SIZE, bytearray(8))) == EINVAL
    assert errno_of(lambda: call(rig.kvm, 0xAEFF)) == EINVAL
    assert errno_of(lambda: call(rig.kvm, Ioctl.RUN)) == EINVAL
    assert errno_of(lambda: call(rig.vm(), 0xAEFF)) == EINVAL


@pytest.mark.parametrize("protected", [False, True])
def test_capabilities_are_the_same_for_system_and_vm(protected: bool) -> None:
    rig = Rig(protected=protected)
    vm = rig.vm()
    expected = {
        uapi.Cap.ARM_PROTECTED_VM: int(protected),
        uapi.Cap.USER_MEMORY: 1,
        uapi.Cap.MAX_VCPUS: 512,
        uapi.Cap.NR_MEMSLOTS: 32767,
        uapi.Cap.ARM_VM_IPA_SIZE: 40,
        uapi.Cap.ARM_EL1_32BIT: 0,
        uapi.Cap.IMMEDIATE_EXIT: 1,
        12345: 0,
    }
    for cap, value in expected.items():
        for fd in (rig.kvm, vm):
            assert rig.kernel.ioctl(fd, Ioctl.CHECK_EXTENSION, cap) == value
    assert rig.kernel.ioctl(vm, Ioctl.CHECK_EXTENSION, bytearray(4)) == 0


@pytest.mark.parametrize(
    ("protected", "kind", "expected"),
    [
        (True, 0, 0),
        (True, 31, 0),
        (True, 52, 0),
        (True, 0xFF, 0),
        (True, 1 << 8, EINVAL),
        (True, 1 << 30, EINVAL),
        (True, 1 << 31, EINVAL),
        (True, 1 << 32 | 40, EINVAL),
        (False, 40, 0),
        (False, 32, 0),
        (False, 31, EINVAL),
        (False, 41, EINVAL),
    ],
)
def test_create_vm_types(protected: bool, kind: int, expected: int) -> None:
    rig = Rig(protected=protected)
    assert errno_of(lambda: rig.kernel.ioctl(rig.kvm, Ioctl.CREATE_VM, kind)) == expected


def test_the_256th_vm_has_no_room_and_a_closed_one_makes_it() -> None:
    rig = Rig()
    vms = [rig.vm() for _ in range(255)]
    assert errno_of(rig.vm) == ENOMEM
    rig.kernel.close(vms[7])
    rig.vm()


def test_create_vcpu_and_init() -> None:
    rig = Rig()
    vm = rig.vm()
    create = Ioctl.CREATE_VCPU
    fd = rig.kernel.ioctl(vm, create, 3)
    assert errno_of(lambda: rig.kernel.ioctl(vm, create, 3)) == EEXIST
    for vcpu_id in (512, -1, 1 << 63, bytearray(4)):
        assert errno_of(rig.kernel.ioctl, vm, create, vcpu_id) == EINVAL
    for request in (Ioctl.RUN, Ioctl.GET_ONE_REG, Ioctl.SET_ONE_REG, Ioctl.GET_REG_LIST):
        assert errno_of(rig.kernel.ioctl, fd, request) == ENOEXEC
    target = bytearray(32)
    rig.kernel.ioctl(vm, Ioctl.ARM_PREFERRED_TARGET, target)
    rig.kernel.ioctl(fd, Ioctl.ARM_VCPU_INIT, target)
    assert rig.get_reg(fd, uapi.REG_PSTATE) == 0x3C5
    assert rig.get_reg(fd, uapi.sysreg(MPIDR_EL1.one_reg)) == mpidr_of_vcpu_id(3)


@pytest.mark.parametrize(
    ("target", "words", "expected"),
    [
        (5, [0], 0),
        (5, [0b101], 0),
        (4, [0], EINVAL),
        (5, [1 << uapi.VcpuFeature.EL1_32BIT], EINVAL),
        (5, [1 << uapi.VcpuFeature.SVE], EINVAL),
        (5, [1 << uapi.VcpuFeature.PMU_V3], EINVAL),
        (5, [1 << uapi.VcpuFeature.HAS_EL2], EINVAL),
        (5, [1 << 10], ENOENT),
        (5, [1 << 31], ENOENT),
        (5, [0, 1], ENOENT),
        (5, [0, 0, 0, 0, 0, 0, 1 << 31], ENOENT),
    ],
)
def test_vcpu_init_features(target: int, words: list[int], expected: int) -> None:
    rig = Rig()
    fd = rig.kernel.ioctl(rig.vm(), Ioctl.CREATE_VCPU, 0)
    argument = bytearray(uapi.VCPU_INIT.pack(target, *(words + [0] * 7)[:7]))
    assert errno_of(lambda: rig.kernel.ioctl(fd, Ioctl.ARM_VCPU_INIT, argument)) == expected


def test_vcpu_init_again_resets_and_must_name_the_same_features_but_power_off() -> None:
    rig = Rig()
    psci = uapi.VcpuFeature.PSCI_0_2
    fd = rig.vcpu(rig.vm(), 0, psci)
    rig.set_reg(fd, uapi.reg_x(5), 99)
    none = bytearray(uapi.VCPU_INIT.pack(uapi.TARGET_GENERIC_V8, *[0] * 7))
    assert errno_of(lambda: rig.kernel.ioctl(fd, uapi.Ioctl.ARM_VCPU_INIT, none)) == EINVAL
    assert rig.get_reg(fd, uapi.reg_x(5)) == 99
    rig.init(fd, psci, uapi.VcpuFeature.POWER_OFF)
    assert rig.get_reg(fd, uapi.reg_x(5)) == 0


def test_one_reg_keeps_every_listed_register_apart() -> None:
    rig = Rig()
    fd = rig.vcpu(rig.vm())
    settable = [register for register in regs.PLACES if register != uapi.REG_PSTATE]
    for value, register in enumerate(settable, start=1):
        rig.set_reg(fd, register, value)
    for value, register in enumerate(settable, start=1):
        assert rig.get_reg(fd, register) == value
    assert rig.get_reg(fd, uapi.REG_PSTATE) == 0x3C5


@pytest.mark.parametrize(
    ("register", "expected"),
    [
        (uapi.reg_x(0), 0),
        (uapi.reg_v(31), 0),
        (uapi.REG_FPCR, 0),
        (uapi.sysreg(VBAR_EL1.one_reg), 0),
        (0, EINVAL),
        (uapi.reg_x(0) ^ 0x2000_0000_0000_0000, EINVAL),
        (uapi.core_reg(0, 4), EINVAL),
        (uapi.core_reg(4), EINVAL),
        (uapi.core_reg(0x110, 16), EINVAL),
        (uapi.core_reg(0x360), ENOENT),
        (uapi.core_reg(0x35C), ENOENT),
        (uapi.core_reg(0x3_FFFC), ENOENT),
        (uapi.sysreg(0xFFFF), ENOENT),
        (uapi.REG_PSCI_VERSION + 1, ENOENT),
        (uapi.REG_ARM64 | uapi.REG_SIZE_U64 | 0x11 << 16, ENOENT),
        (1 << 63 | uapi.reg_x(0), EINVAL),
    ],
)
def test_one_reg_errors(register: int, expected: int) -> None:
    rig = Rig()
    fd = rig.vcpu(rig.vm())
    memory = rig.kernel.mmap(PAGE)
    argument = bytearray(uapi.ONE_REG.pack(register, memory.address))
    for request in (Ioctl.GET_ONE_REG, Ioctl.SET_ONE_REG):
        assert errno_of(rig.kernel.ioctl, fd, request, argument) == expected


def test_one_reg_pointers_outside_every_mapping_are_efault() -> None:
    rig = Rig()
    fd = rig.vcpu(rig.vm())
    memory = rig.kernel.mmap(PAGE)
    for address in (0, memory.address - 1, memory.address + PAGE - 7, 1 << 63, (1 << 64) - 1):
        argument = bytearray(uapi.ONE_REG.pack(uapi.reg_x(0), address))
        for request in (Ioctl.GET_ONE_REG, Ioctl.SET_ONE_REG):
            assert errno_of(rig.kernel.ioctl, fd, request, argument) == EFAULT
    assert errno_of(lambda: rig.kernel.ioctl(fd, Ioctl.GET_ONE_REG, bytearray(15))) == EFAULT


def test_fixed_registers_take_only_their_own_value() -> None:
    rig = Rig()
    fd = rig.vcpu(rig.vm())
    for register in (uapi.sysreg(MPIDR_EL1.one_reg), uapi.REG_PSCI_VERSION):
        value = rig.get_reg(fd, register)
        rig.set_reg(fd, register, value)
        assert errno_of(rig.set_reg, fd, register, value + 1) == EINVAL


@pytest.mark.parametrize(
    ("pstate", "expected"),
    [(0x3C5, 0), (0x3C4, 0), (0x3C0, 0), (0x3C9, EINVAL), (0x1D0, EINVAL), (0x3CD, EINVAL)],
)
def test_pstate_must_be_aarch64_el1_or_el0(pstate: int, expected: int) -> None:
    rig = Rig()
    fd = rig.vcpu(rig.vm())
    assert errno_of(lambda: rig.set_reg(fd, uapi.REG_PSTATE, pstate)) == expected


def test_reg_list_says_how_many_when_it_does_not_fit() -> None:
    rig = Rig()
    fd = rig.vcpu(rig.vm())
    short = bytearray(8)
    assert errno_of(lambda: rig.kernel.ioctl(fd, Ioctl.GET_REG_LIST, short)) == E2BIG
    count = int.from_bytes(short, "little")
    assert errno_of(lambda: rig.kernel.ioctl(fd, Ioctl.GET_REG_LIST, bytearray(7))) == EFAULT
    claims = bytearray(count.to_bytes(8, "little"))
    assert errno_of(lambda: rig.kernel.ioctl(fd, Ioctl.GET_REG_LIST, claims)) == EFAULT
    full = bytearray(count.to_bytes(8, "little")) + bytearray(8 * count)
    rig.kernel.ioctl(fd, Ioctl.GET_REG_LIST, full)
    listed = memoryview(full).cast("Q")[1:].tolist()
    assert len(set(listed)) == count
    assert uapi.reg_x(30) in listed
    for register in listed:
        rig.get_reg(fd, register)


def test_mp_state() -> None:
    rig = Rig()
    vm = rig.vm()
    fd = rig.vcpu(vm, 0, uapi.VcpuFeature.POWER_OFF)
    state = bytearray(4)
    rig.kernel.ioctl(fd, Ioctl.GET_MP_STATE, state)
    assert state == bytearray([5, 0, 0, 0])
    rig.kernel.ioctl(fd, Ioctl.SET_MP_STATE, bytearray(4))
    rig.kernel.ioctl(fd, Ioctl.GET_MP_STATE, state)
    assert state == bytearray(4)
    for bad in (1, 10, 0xFFFF_FFFF):
        argument = bytearray(bad.to_bytes(4, "little"))
        assert errno_of(rig.kernel.ioctl, fd, Ioctl.SET_MP_STATE, argument) == EINVAL
    assert errno_of(lambda: rig.kernel.ioctl(fd, Ioctl.GET_MP_STATE, bytearray(3))) == EFAULT


def test_a_number_as_pointer_is_looked_up_in_the_mappings() -> None:
    rig = Rig()
    fd = rig.vcpu(rig.vm(), 0, uapi.VcpuFeature.POWER_OFF)
    memory = rig.kernel.mmap(PAGE)
    rig.kernel.ioctl(fd, Ioctl.GET_MP_STATE, memory.address + PAGE - 4)
    assert memory.read(PAGE - 4, 4) == b"\5\0\0\0"
    assert errno_of(lambda: rig.kernel.ioctl(fd, Ioctl.GET_MP_STATE, memory.address - 4)) == EFAULT


def test_descriptors() -> None:
    rig = Rig()
    assert errno_of(lambda: rig.kernel.open("/dev/null")) == ENOENT
    vm = rig.vm()
    dma = rig.kernel.open("/dev/dma-copy")
    assert errno_of(lambda: rig.kernel.ioctl(dma, Ioctl.RUN)) == ENOTTY
    for fd in (-1, 99, 1 << 40, 0):
        assert errno_of(rig.kernel.ioctl, fd, Ioctl.RUN) == EBADF
        assert errno_of(rig.kernel.close, fd) == EBADF
        assert errno_of(rig.kernel.kick, fd) == EBADF
        assert errno_of(rig.kernel.mmap_vcpu, fd, 8192) == EBADF
    assert errno_of(lambda: rig.kernel.mmap_vcpu(vm, 8192)) == ENODEV
    assert errno_of(lambda: rig.kernel.kick(vm)) == EINVAL
    fd = rig.vcpu(vm)
    assert errno_of(lambda: rig.kernel.mmap_vcpu(fd, 0)) == EINVAL
    assert errno_of(lambda: rig.kernel.mmap_vcpu(fd, 8193)) == EINVAL
    rig.kernel.kick(fd)
    rig.kernel.close(vm)
    assert rig.kernel.open("/dev/kvm") == vm, "the lowest free descriptor is used"


def test_there_are_at_most_1024_descriptors() -> None:
    rig = Rig()
    vm = rig.vm()
    while errno_of(lambda: rig.kernel.open("/dev/kvm")) == 0:
        pass
    assert errno_of(lambda: rig.kernel.open("/dev/kvm")) == EMFILE
    free = rig.kernel.free_pages
    assert errno_of(rig.vm) == EMFILE
    assert errno_of(lambda: rig.kernel.ioctl(vm, Ioctl.CREATE_VCPU, 0)) == EMFILE
    assert rig.kernel.free_pages == free


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)])
def test_a_vm_goes_with_its_last_descriptor_or_mapping_in_any_order(
    order: tuple[int, ...],
) -> None:
    rig = Rig()
    vm = rig.vm()
    vcpus = [rig.vcpu(vm, index) for index in range(2)]
    page = rig.kernel.mmap_vcpu(vcpus[0], 8192)
    closers = [
        lambda: rig.kernel.close(vm),
        lambda: rig.kernel.close(vcpus[0]),
        lambda: rig.kernel.close(vcpus[1]),
        page.close,
    ]
    for step in order:
        assert rig.kernel.free_pages < rig.pages_at_start
        assert "UNRESERVE_VM" not in rig.el2.names()
        closers[step]()
    assert rig.kernel.free_pages == rig.pages_at_start
    assert rig.el2.names()[-1] == "UNRESERVE_VM"


def test_shutdown_closes_everything_and_is_final() -> None:
    rig = Rig()
    fd = rig.vcpu(rig.vm())
    page = rig.kernel.mmap_vcpu(fd, 8192)
    memory = rig.kernel.mmap(PAGE)
    rig.kernel.shutdown()
    assert rig.kernel.free_pages == rig.pages_at_start
    memory.close()
    page.close()
    rig.kernel.shutdown()
    assert errno_of(lambda: rig.kernel.ioctl(fd, Ioctl.RUN)) == EBADF
    assert errno_of(lambda: rig.kernel.open("/dev/kvm")) == ENODEV
    assert errno_of(lambda: rig.kernel.mmap(PAGE)) == ENODEV


def test_each_call_is_announced_with_its_result() -> None:
    rig = Rig()
    vm = rig.vm()
    errno_of(lambda: rig.kernel.ioctl(vm, 0xAE77, bytearray(3)))
    rig.kernel.close(vm)
    said = [event for event in rig.log.events if isinstance(event, events.Ioctl)]
    assert said == [
        (-1, "open", rig.kvm),
        (rig.kvm, "CREATE_VM", vm),
        (vm, "0xae77", -EINVAL),
        (vm, "close", 0),
    ]


def test_a_vm_that_el2_has_no_handle_for_is_not_made() -> None:
    rig = Rig()
    rig.el2.refuse[HostCall.RESERVE_VM] = ENOMEM
    assert errno_of(rig.vm) == ENOMEM
    assert rig.kernel.free_pages == rig.pages_at_start


def test_host_memory_that_the_host_lost_is_efault_in_the_kernel_too() -> None:
    rig = Rig()
    vm = rig.vm()
    rig.bus.lost.update(range(0x8_0000, 0x8_0000 + 8192))
    assert errno_of(lambda: rig.vcpu(vm)) == EFAULT


def test_dma_copy_takes_user_addresses_and_reports_the_devices_fault() -> None:
    rig = Rig()
    dma = rig.kernel.open("/dev/dma-copy")
    source, target = rig.kernel.mmap(2 * PAGE), rig.kernel.mmap(PAGE)
    source.write(PAGE - 4, b"through")

    def copy(at: int, to: int, length: int) -> int:
        argument = bytearray(uapi.DmaCopy.ARGS.pack(at, to, length))
        return rig.kernel.ioctl(dma, uapi.DmaCopy.COPY, argument)

    copy(source.address + PAGE - 4, target.address + 1, 7)
    assert target.read(0, 9) == b"\0through\0"
    assert errno_of(lambda: copy(source.address, target.address, PAGE + 1)) == EFAULT
    assert errno_of(lambda: copy(0, target.address, 1)) == EFAULT
    assert errno_of(lambda: copy(source.address, target.address, 1 << 63)) == EFAULT
    rig.bus.lost.add(source.mapping.run.pa // PAGE)
    assert errno_of(lambda: copy(source.address, target.address, 8)) == EIO
    assert target.read(0, 9) == b"\0through\0"
