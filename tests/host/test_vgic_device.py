# SPDX-License-Identifier: GPL-2.0-or-later
"""The interrupt controller's ioctls and attributes, and Linux's errno for each mistake."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from fakes.gic_machine import (
    FRAMES,
    GICD,
    GICR,
    OPEN_VMCR,
    GicMachine,
    Group,
    create_device,
    off,
    wfi,
)
from fakes.host_fakes import FakeVcpu, Rig, errno_of
from fakes.host_machine import TIMEOUT_S, Machine
from pkvm.arm64 import gicv3 as g
from pkvm.arm64 import registers as r
from pkvm.arm64.gic import VMCR
from pkvm.uapi import kvm as uapi

ENOENT, ENXIO, E2BIG, EAGAIN, EFAULT, EBUSY, EEXIST, ENODEV = 2, 6, 7, 11, 14, 16, 17, 19
EINVAL, ENOTTY = 22, 25
Addr, Ctrl = uapi.VgicAddr, uapi.VgicCtrl
IDLE = [lambda vcpu: iter(())] * 2


def ends(vcpu: FakeVcpu) -> Iterator[int]:
    yield off(vcpu)


@pytest.fixture
def fresh() -> Iterator[GicMachine]:
    """Made, and nothing said of it."""
    machine = GicMachine(*IDLE, start=False)
    yield machine
    machine.close()


@pytest.fixture
def ready() -> Iterator[GicMachine]:
    machine = GicMachine(*IDLE)
    yield machine
    machine.close()


def test_capabilities() -> None:
    rig = Rig()
    caps = (
        uapi.Cap.IRQCHIP,
        uapi.Cap.IRQFD,
        uapi.Cap.IRQFD_RESAMPLE,
        uapi.Cap.ARM_IRQ_LINE_LAYOUT_2,
    )
    assert all(rig.kernel.ioctl(rig.kvm, uapi.Ioctl.CHECK_EXTENSION, cap) for cap in caps)
    without = Rig()
    without.el2.has_gic = False
    assert not any(
        without.kernel.ioctl(without.kvm, uapi.Ioctl.CHECK_EXTENSION, cap) for cap in caps
    )


def test_create_device() -> None:
    machine = Machine(*IDLE)
    for kind in (0, uapi.DeviceType.ARM_VGIC_V2, uapi.DeviceType.ARM_VGIC_ITS, 99, 0xFFFF_FFFF):
        assert errno_of(create_device, machine, kind) == ENODEV
        assert errno_of(create_device, machine, kind, uapi.CREATE_DEVICE_TEST) == ENODEV
    gicv3 = uapi.DeviceType.ARM_VGIC_V3
    create_device(machine, gicv3, uapi.CREATE_DEVICE_TEST)
    ioctl = machine.rig.kernel.ioctl
    assert errno_of(ioctl, machine.vm, uapi.Ioctl.CREATE_DEVICE, bytearray(11)) == EFAULT
    assert errno_of(ioctl, machine.vm, uapi.Ioctl.CREATE_IRQCHIP) == ENODEV
    fd = create_device(machine)
    assert errno_of(create_device, machine) == EEXIST
    assert errno_of(ioctl, fd, uapi.Ioctl.RUN) == ENOTTY
    assert errno_of(ioctl, fd, uapi.Ioctl.SET_DEVICE_ATTR, bytearray(23)) == EFAULT
    machine.rig.kernel.close(fd)
    machine.close()


def test_a_device_comes_before_the_first_run() -> None:
    machine = Machine(ends)
    machine.run()
    assert errno_of(create_device, machine) == EBUSY
    machine.close()


def test_a_closed_descriptor_leaves_the_device(ready: GicMachine) -> None:
    ready.rig.kernel.close(ready.device)
    ready.spi(32, 1)
    assert errno_of(create_device, ready) == EEXIST
    ready.device = ready.rig.kernel.open("/dev/kvm")


def test_no_vcpu_comes_after_initialisation(ready: GicMachine) -> None:
    create = uapi.Ioctl.CREATE_VCPU
    assert errno_of(ready.rig.kernel.ioctl, ready.vm, create, 7) == EBUSY


def test_vcpus_may_come_after_the_device() -> None:
    machine = Machine()
    device = create_device(machine)
    for number in (3, 1):
        machine.vcpus.append(machine.rig.kernel.ioctl(machine.vm, uapi.Ioctl.CREATE_VCPU, number))
    [vm] = machine.rig.kernel._host.vms
    assert vm.gic is not None
    vm.gic.add_region(0, GICR, 0)
    assert [(cpu.vcpu.id, cpu.frames) for cpu in vm.gic.cpus] == [(3, GICR), (1, GICR + FRAMES)]
    machine.vcpus.append(machine.rig.kernel.ioctl(machine.vm, uapi.Ioctl.CREATE_VCPU, 2))
    assert vm.gic.cpus[2].frames == GICR + 2 * FRAMES
    machine.rig.kernel.close(device)
    machine.close()


def test_unknown_attributes(ready: GicMachine) -> None:
    for group, attr in ((2, 0), (8, 0), (99, 0), (Group.ADDR, 0), (Group.ADDR, 1), (Group.CTRL, 9)):
        for call in (ready.attr, ready.get, ready.has):
            assert errno_of(call, group, attr) == ENXIO, (group, attr)
    assert errno_of(ready.get, Group.CTRL, Ctrl.INIT) == ENXIO
    for group, attr in (
        (Group.ADDR, Addr.DIST), (Group.ADDR, Addr.REDIST), (Group.ADDR, Addr.REDIST_REGION),
        (Group.NR_IRQS, 0), (Group.CTRL, Ctrl.INIT), (Group.CTRL, Ctrl.SAVE_PENDING_TABLES),
        (Group.DIST_REGS, g.GICD_CTLR), (Group.REDIST_REGS, g.GICR_TYPER),
        (Group.CPU_SYSREGS, r.ICC_PMR_EL1.one_reg), (Group.LEVEL_INFO, 0),
    ):  # fmt: skip
        ready.has(group, attr)


def test_pointers_outside_every_mapping(fresh: GicMachine) -> None:
    ioctl = fresh.rig.kernel.ioctl
    for request, group, attr in (
        (uapi.Ioctl.SET_DEVICE_ATTR, Group.ADDR, Addr.DIST),
        (uapi.Ioctl.GET_DEVICE_ATTR, Group.ADDR, Addr.DIST),
        (uapi.Ioctl.GET_DEVICE_ATTR, Group.ADDR, Addr.REDIST_REGION),
        (uapi.Ioctl.SET_DEVICE_ATTR, Group.NR_IRQS, 0),
        (uapi.Ioctl.GET_DEVICE_ATTR, Group.NR_IRQS, 0),
        (uapi.Ioctl.SET_DEVICE_ATTR, Group.DIST_REGS, 0),
    ):
        argument = bytearray(uapi.DEVICE_ATTR.pack(0, group, attr, 8))
        assert errno_of(ioctl, fresh.device, request, argument) == EFAULT
    # A command has no value to point to.
    argument = bytearray(uapi.DEVICE_ATTR.pack(0, Group.CTRL, Ctrl.INIT, 8))
    assert ioctl(fresh.device, uapi.Ioctl.SET_DEVICE_ATTR, argument) == 0


@pytest.mark.parametrize(
    ("number", "expected"),
    [(0, EINVAL), (32, EINVAL), (63, EINVAL), (64, 0), (65, EINVAL), (128, 0), (992, 0),
     (1024, EINVAL), (1056, EINVAL), (0xFFFF_FFE0, EINVAL)],
)  # fmt: skip
def test_number_of_interrupts(fresh: GicMachine, number: int, expected: int) -> None:
    assert fresh.get(Group.NR_IRQS, 0) == 32
    assert errno_of(fresh.attr, Group.NR_IRQS, 0, number) == expected
    if not expected:
        assert fresh.get(Group.NR_IRQS, 0) == number
        assert errno_of(fresh.attr, Group.NR_IRQS, 0, number) == EBUSY


def test_the_default_number_is_256(fresh: GicMachine) -> None:
    fresh.attr(Group.CTRL, Ctrl.INIT)
    assert fresh.get(Group.NR_IRQS, 0) == 256
    assert errno_of(fresh.attr, Group.NR_IRQS, 0, 128) == EBUSY
    fresh.attr(Group.CTRL, Ctrl.INIT)


@pytest.mark.parametrize(
    ("address", "expected"),
    [(GICD, 0), (0, 0), (0x8000, EINVAL), ((1 << 40) - 0x1_0000, 0), (1 << 40, E2BIG),
     (1 << 63, E2BIG)],
)  # fmt: skip
def test_distributor_address(fresh: GicMachine, address: int, expected: int) -> None:
    assert fresh.get(Group.ADDR, Addr.DIST) == (1 << 64) - 1
    assert errno_of(fresh.attr, Group.ADDR, Addr.DIST, address) == expected
    if not expected:
        assert fresh.get(Group.ADDR, Addr.DIST) == address
        assert errno_of(fresh.attr, Group.ADDR, Addr.DIST, address) == EEXIST


def test_one_region_of_redistributors(fresh: GicMachine) -> None:
    fresh.attr(Group.ADDR, Addr.DIST, GICD)
    assert fresh.get(Group.ADDR, Addr.REDIST) == (1 << 64) - 1
    for address, expected in (
        (GICR + 0x8000, EINVAL),
        (GICD, EINVAL),
        (GICD - FRAMES, EINVAL),
        ((1 << 40) - FRAMES, E2BIG),
        ((1 << 64) - FRAMES, EINVAL),
        (GICR, 0),
        (GICR, EEXIST),
        (GICR + 0x100_0000, EEXIST),
    ):
        assert errno_of(fresh.attr, Group.ADDR, Addr.REDIST, address) == expected, hex(address)
    assert fresh.get(Group.ADDR, Addr.REDIST) == GICR


def test_numbered_regions_of_redistributors(fresh: GicMachine) -> None:
    region = uapi.redist_region
    for value, expected in (
        (region(1, GICR, 1), EINVAL),
        (region(0, GICR, 0), EINVAL),
        (region(0, GICR, 1) | 1 << 12, EINVAL),
        (region(0, GICR, 1), 0),
        (region(0, GICR + FRAMES, 1), EINVAL),
        (region(2, GICR + FRAMES, 1), EINVAL),
        (region(1, GICR, 1), EINVAL),
        (region(1, (1 << 40) - FRAMES, 2), E2BIG),
        (region(1, GICR + 4 * FRAMES, 2), 0),
    ):
        assert errno_of(fresh.attr, Group.ADDR, Addr.REDIST_REGION, value) == expected, hex(value)
    assert errno_of(fresh.attr, Group.ADDR, Addr.REDIST, GICR) == EINVAL
    get = fresh.get
    assert get(Group.ADDR, Addr.REDIST_REGION, 1) == region(1, GICR + 4 * FRAMES, 2)
    assert errno_of(get, Group.ADDR, Addr.REDIST_REGION, 2) == ENOENT


def test_a_region_on_the_distributor_is_taken_back(fresh: GicMachine) -> None:
    fresh.attr(Group.ADDR, Addr.DIST, GICD)
    value = uapi.redist_region(0, GICD, 2)
    assert errno_of(fresh.attr, Group.ADDR, Addr.REDIST_REGION, value) == EINVAL
    fresh.attr(Group.ADDR, Addr.REDIST_REGION, uapi.redist_region(0, GICR, 2))


def test_an_incomplete_controller_stops_the_first_run() -> None:
    machine = GicMachine(ends, start=False)
    assert errno_of(machine.run) == ENXIO
    machine.attr(Group.ADDR, Addr.REDIST, GICR)
    assert errno_of(machine.run) == ENXIO
    machine.attr(Group.ADDR, Addr.DIST, GICD)
    assert errno_of(machine.run) == EBUSY
    machine.attr(Group.CTRL, Ctrl.INIT)
    assert machine.run() == uapi.ExitReason.SYSTEM_EVENT
    machine.close()


def test_frames_that_overlap_stop_the_first_run() -> None:
    machine = GicMachine(ends, start=False)
    machine.attr(Group.ADDR, Addr.REDIST, GICR)
    machine.attr(Group.ADDR, Addr.DIST, GICR + 0x1_0000)
    machine.attr(Group.CTRL, Ctrl.INIT)
    assert errno_of(machine.run) == EINVAL
    machine.close()


def test_registers_as_attributes(ready: GicMachine) -> None:
    ready.attr(Group.DIST_REGS, g.GICD_CTLR, 2)
    assert ready.get(Group.DIST_REGS, g.GICD_CTLR) == 0x52
    second = 1 << uapi.VGIC_MPIDR_SHIFT
    ready.attr(Group.REDIST_REGS, second | g.SGI_FRAME + g.ISENABLER, 1 << 27)
    assert ready.get(Group.REDIST_REGS, second | g.SGI_FRAME + g.ISENABLER) == 1 << 27 | 0xFFFF
    assert ready.get(Group.REDIST_REGS, g.SGI_FRAME + g.ISENABLER) == 0xFFFF
    assert ready.get(Group.REDIST_REGS, second | g.GICR_TYPER + 4) == 1
    for offset in (0x20, 2, g.ISENABLER + 16, 0x8000, 0x1_0000):
        for call in (ready.attr, ready.get, ready.has):
            assert errno_of(call, Group.DIST_REGS, offset) == ENXIO, hex(offset)
    for call in (ready.attr, ready.get, ready.has):
        assert errno_of(call, Group.REDIST_REGS, 2 << 32) == EINVAL
        assert errno_of(call, Group.CPU_SYSREGS, 2 << 32 | r.ICC_PMR_EL1.one_reg) == EINVAL


def test_registers_need_an_initialised_controller(fresh: GicMachine) -> None:
    for group, attr in ((Group.DIST_REGS, 0), (Group.REDIST_REGS, 0), (Group.LEVEL_INFO, 32)):
        assert errno_of(fresh.attr, group, attr) == EBUSY
        assert errno_of(fresh.get, group, attr) == EBUSY
    assert errno_of(fresh.attr, Group.CTRL, Ctrl.SAVE_PENDING_TABLES) == EBUSY


def test_levels_as_attributes(ready: GicMachine) -> None:
    ready.by_level(33)
    ready.spi(33, 1)
    assert ready.get(Group.LEVEL_INFO, 32) == 2
    ready.attr(Group.LEVEL_INFO, 32, 4)
    assert ready.get(Group.LEVEL_INFO, 32) == 4
    assert ready.get(Group.DIST_REGS, g.ISPENDR + 4) == 0
    assert ready.get(Group.LEVEL_INFO, 1 << 32) == 0
    for call in (ready.attr, ready.get):
        assert errno_of(call, Group.LEVEL_INFO, 33) == EINVAL
        assert errno_of(call, Group.LEVEL_INFO, 1 << 10) == EINVAL
    assert errno_of(ready.has, Group.LEVEL_INFO, 1 << 10) == ENXIO


def test_the_cpu_interface_shows_what_el2_shows() -> None:
    vmcr = VMCR.encode(VENG1=1, VPMR=0xF0, VBPR0=2, VBPR1=3, VEOIM=1)

    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        vcpu.set_vmcr(vmcr)
        yield off(vcpu)

    machine = GicMachine(guest)
    machine.run()
    expected = {
        r.ICC_PMR_EL1: 0xF0, r.ICC_BPR0_EL1: 2, r.ICC_BPR1_EL1: 3, r.ICC_CTLR_EL1: 0x402,
        r.ICC_SRE_EL1: 7, r.ICC_IGRPEN0_EL1: 0, r.ICC_IGRPEN1_EL1: 1,
    }  # fmt: skip
    for register, value in expected.items():
        assert machine.get(Group.CPU_SYSREGS, register.one_reg) == value
        machine.attr(Group.CPU_SYSREGS, register.one_reg, value)
        assert errno_of(machine.attr, Group.CPU_SYSREGS, register.one_reg, value + 1) == EINVAL
    for register in (r.ICC_AP0R0_EL1, r.ICC_AP1R0_EL1, r.ICC_IAR1_EL1, r.VBAR_EL1):
        for call in (machine.get, machine.attr, machine.has):
            assert errno_of(call, Group.CPU_SYSREGS, register.one_reg) == ENXIO
    machine.close()


def test_a_running_vcpu_keeps_its_registers() -> None:
    asleep = threading.Event()

    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        vcpu.set_vmcr(OPEN_VMCR)
        asleep.set()
        yield wfi(vcpu)
        yield off(vcpu)

    machine = GicMachine(guest)
    machine.enable(40)
    thread = threading.Thread(target=machine.run, daemon=True)
    thread.start()
    assert asleep.wait(TIMEOUT_S)
    assert errno_of(machine.get, Group.DIST_REGS, 0) == EBUSY
    assert errno_of(machine.attr, Group.DIST_REGS, 0) == EBUSY
    machine.spi(40, 1)
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()
    assert machine.get(Group.DIST_REGS, 0) == 0x53
    machine.close()


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (uapi.irq_number(uapi.IrqType.SPI, 32), 0),
        (uapi.irq_number(uapi.IrqType.SPI, 127), 0),
        (uapi.irq_number(uapi.IrqType.SPI, 128), EINVAL),
        (uapi.irq_number(uapi.IrqType.SPI, 31), EINVAL),
        (uapi.irq_number(uapi.IrqType.SPI, 0xFFFF), EINVAL),
        (uapi.irq_number(uapi.IrqType.PPI, 16, 1), 0),
        (uapi.irq_number(uapi.IrqType.PPI, 31, 1), 0),
        (uapi.irq_number(uapi.IrqType.PPI, 15, 1), EINVAL),
        (uapi.irq_number(uapi.IrqType.PPI, 32, 1), EINVAL),
        (uapi.irq_number(uapi.IrqType.PPI, 16, 2), EINVAL),
        (uapi.irq_number(uapi.IrqType.PPI, 16, 0x101), EINVAL),
        (uapi.irq_number(uapi.IrqType.CPU, 0), ENXIO),
        (3 << 24 | 32, EINVAL),
        (15 << 24 | 32, EINVAL),
    ],
)
def test_irq_line(ready: GicMachine, number: int, expected: int) -> None:
    assert errno_of(ready.line, number, 1) == expected
    assert errno_of(ready.line, number, 0) == expected


def test_irq_line_without_a_controller_or_before_it_is_initialised(fresh: GicMachine) -> None:
    assert errno_of(fresh.spi, 32, 1) == EBUSY
    ioctl = fresh.rig.kernel.ioctl
    assert errno_of(ioctl, fresh.vm, uapi.Ioctl.IRQ_LINE, bytearray(7)) == EFAULT
    bare = fresh.rig.vm()
    for kind, expected in (
        (uapi.IrqType.SPI, ENXIO),
        (uapi.IrqType.PPI, ENXIO),
        (uapi.IrqType.CPU, EINVAL),
    ):
        argument = bytearray(uapi.IRQ_LEVEL.pack(uapi.irq_number(kind, 32), 1))
        assert errno_of(ioctl, bare, uapi.Ioctl.IRQ_LINE, argument) == expected
    irqfd = bytearray(uapi.IRQFD.pack(0, 0, 0, 0))
    assert errno_of(ioctl, bare, uapi.Ioctl.IRQFD, irqfd) == EAGAIN
    fresh.rig.kernel.close(bare)


def test_a_timers_input_is_not_the_vmms(ready: GicMachine) -> None:
    ready.line(uapi.irq_number(uapi.IrqType.PPI, 27), 1)
    assert ready.get(Group.LEVEL_INFO, 0) == 0


def test_everything_goes_with_the_vm() -> None:
    machine = GicMachine(*IDLE)
    assert machine.rig.alarms.all
    machine.close()
    assert machine.rig.alarms.all == []
