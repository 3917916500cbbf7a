# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_RUN with an interrupt controller, on a scripted EL2: registers served in the host, list
registers at entries, waiting and waking, the timers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from fakes.gic_machine import (
    FRAMES,
    GICD,
    GICR,
    OPEN_VMCR,
    GicMachine,
    hvc,
    off,
    read_sysreg,
    store,
    wfi,
    write_sysreg,
)
from fakes.host_fakes import FakeAlarm, FakeVcpu, errno_of
from fakes.host_machine import DEVICE, TIMEOUT_S, Machine, dabt
from pkvm.arm64 import gicv3 as g
from pkvm.arm64 import registers as r
from pkvm.arm64.esr import SF, SRT_SHIFT
from pkvm.arm64.gic import LR, LR_ACTIVE, LR_EOI, LR_PENDING, LR_STATE, VMCR
from pkvm.arm64.registers import SCTLR_EE
from pkvm.host.ports import NS_PER_TICK
from pkvm.hyp.abi import ExitCode, HostVcpu, VcpuFlag
from pkvm.machine.clock import NS_PER_TICK as MACHINE_TICK
from pkvm.uapi import kvm as uapi

EINTR = 4
INCREMENT_PC, PENDING_EXCEPTION = VcpuFlag.INCREMENT_PC, VcpuFlag.PENDING_EXCEPTION
SGI_FRAME = GICR + g.SGI_FRAME
MMIO, SYSTEM_EVENT = uapi.ExitReason.MMIO, uapi.ExitReason.SYSTEM_EVENT


def intids(vcpu: FakeVcpu) -> list[int]:
    return [LR["vINTID"].get(word) for word in vcpu.list_registers()]


def start(body: Callable[..., object], *args: object) -> threading.Thread:
    thread = threading.Thread(target=body, args=args, daemon=True)
    thread.start()
    return thread


def join(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), "a KVM_RUN hangs"


def test_the_tick_is_the_machines() -> None:
    assert NS_PER_TICK == MACHINE_TICK


def end(machine: GicMachine, index: int, thread: threading.Thread) -> None:
    """Kick a vCPU until its KVM_RUN is over."""
    while thread.is_alive():
        machine.rig.kernel.kick(machine.vcpus[index])
        thread.join(0.01)


# Registers


@pytest.mark.parametrize("protected", [True, False])
def test_registers_are_served_without_an_exit(protected: bool) -> None:
    seen: list[int] = []

    def value(vcpu: FakeVcpu) -> int:
        return vcpu.x0 if protected else vcpu.read(HostVcpu.X + 8 * 7)

    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        more = SF | 7 << SRT_SHIFT
        yield vcpu.publish(x0=2, x7=2, **dabt(GICD + g.GICD_CTLR, 2, write=True, more=more))
        assert vcpu.flags & INCREMENT_PC
        for address, size in ((GICD, 2), (GICR + FRAMES + g.GICR_TYPER, 3), (GICD + g.PIDR2, 2)):
            yield vcpu.publish(**dabt(address, size, more=more))
            assert vcpu.flags & INCREMENT_PC
            seen.append(value(vcpu))
        yield off(vcpu)

    machine = GicMachine(guest, lambda vcpu: iter(()), protected=protected)
    assert machine.run() == SYSTEM_EVENT
    assert seen == [0x52, 1 << 32 | 1 << 8 | 1 << 4, 0x3B]
    machine.close()


def test_a_big_endian_guest_sees_the_same_numbers() -> None:
    seen: list[int] = []

    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        big = {"pstate": 5, "sctlr_ee": SCTLR_EE}
        yield vcpu.publish(x0=0x0200_0000, **big, **dabt(GICD, 2, write=True))
        yield vcpu.publish(**big, **dabt(GICD + g.GICD_CTLR, 2))
        seen.append(vcpu.x0)
        yield off(vcpu)

    machine = GicMachine(guest)
    assert machine.run() == SYSTEM_EVENT
    machine.close()
    assert seen == [0x5200_0000]


def test_what_is_between_the_frames_is_the_vmms() -> None:
    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        for address in (GICD + 0x1_0000, GICR - 4, GICR + FRAMES, GICD - 4, DEVICE):
            yield store(vcpu, address, 1)

    machine = GicMachine(guest)
    for address in (GICD + 0x1_0000, GICR - 4, GICR + FRAMES, GICD - 4, DEVICE):
        assert machine.run() == MMIO
        assert machine.mmio()[0] == address
    machine.close()


def test_without_a_controller_its_addresses_are_the_vmms() -> None:
    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        yield store(vcpu, GICD, 1)
        yield write_sysreg(vcpu, r.ICC_SGI1R_EL1, 0)
        assert vcpu.flags == PENDING_EXCEPTION
        yield read_sysreg(vcpu, r.CNTP_CTL_EL0)
        assert vcpu.flags == INCREMENT_PC, "the timer counts, though nobody hears of it"
        yield off(vcpu)

    machine = Machine(guest)
    assert machine.run() == MMIO
    assert machine.run() == SYSTEM_EVENT
    machine.close()


# Delivery


def test_an_interrupt_of_a_device_comes_and_goes() -> None:
    words: list[list[int]] = []

    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        yield store(vcpu, GICD, 2)
        yield store(vcpu, GICD + g.ISENABLER + 4, 1 << 8)
        yield store(vcpu, GICD + g.IPRIORITYR + 40, 0xA0, 0)
        assert vcpu.nr_lrs == 0
        yield store(vcpu, DEVICE, 1)
        words.append(vcpu.list_registers())
        # Taken; the device is told to lower its line, and the interrupt ended.
        vcpu.set_list_register(0, words[0][0] ^ LR_STATE)
        yield store(vcpu, DEVICE, 2)
        words.append(vcpu.list_registers())
        vcpu.set_list_register(0, 0)
        yield store(vcpu, DEVICE, 3)
        words.append(vcpu.list_registers())
        yield off(vcpu)

    machine = GicMachine(guest)
    machine.by_level(40)
    assert machine.run() == MMIO
    machine.spi(40, 1)
    assert machine.run() == MMIO
    machine.spi(40, 0)
    assert machine.run() == MMIO
    assert machine.run() == SYSTEM_EVENT
    word = LR.encode(Group=1, Priority=0xA0, vINTID=40)
    assert words == [[word | LR_PENDING | LR_EOI], [word | LR_ACTIVE], []]
    machine.close()


def test_a_line_that_stays_high_interrupts_again() -> None:
    taken = 0

    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        nonlocal taken
        for _ in range(3):
            [word] = vcpu.list_registers()
            assert word & LR_STATE == LR_PENDING
            assert word & LR_EOI
            vcpu.set_list_register(0, word & ~LR_STATE)
            taken += 1
            yield ExitCode.IRQ
        yield off(vcpu)

    machine = GicMachine(guest)
    machine.by_level(40)
    machine.enable(40)
    machine.spi(40, 1)
    assert machine.run() == SYSTEM_EVENT
    assert taken == 3
    machine.close()


def test_a_disabled_interrupt_waits_and_is_not_lost() -> None:
    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        yield store(vcpu, GICD, 2)
        assert vcpu.nr_lrs == 0
        yield store(vcpu, GICD + g.ISENABLER + 4, 1 << 8)
        assert intids(vcpu) == [40]
        yield store(vcpu, GICD + g.ICENABLER + 4, 1 << 8)
        assert vcpu.nr_lrs == 0
        yield off(vcpu)

    machine = GicMachine(guest)
    machine.spi(40, 1)
    assert machine.run() == SYSTEM_EVENT
    machine.close()


def test_an_sgi_reaches_the_other_vcpu() -> None:
    awake = threading.Event()

    def first(vcpu: FakeVcpu) -> Iterator[int]:
        assert awake.wait(TIMEOUT_S)
        yield write_sysreg(vcpu, r.ICC_SGI1R_EL1, 3 << 24 | 0b10)
        assert vcpu.flags & INCREMENT_PC
        assert vcpu.nr_lrs == 0
        yield read_sysreg(vcpu, r.ICC_SGI1R_EL1)
        assert vcpu.flags & PENDING_EXCEPTION
        yield wfi(vcpu)

    def second(vcpu: FakeVcpu) -> Iterator[int]:
        vcpu.set_vmcr(OPEN_VMCR)
        yield store(vcpu, GICD, 2)
        awake.set()
        yield wfi(vcpu)
        assert intids(vcpu) == [3]
        yield off(vcpu)

    machine = GicMachine(first, second, protected=False, off=False)
    receiver = start(machine.run, 1)
    assert awake.wait(TIMEOUT_S)
    sender = start(errno_of, machine.run, 0)
    join(receiver)
    assert machine.reason(1) == SYSTEM_EVENT
    end(machine, 0, sender)
    machine.close()


def test_an_interrupt_reaches_a_running_guest_at_once() -> None:
    """irq_line from another thread interrupts the CPU, and the next entry has the interrupt."""
    spinning = threading.Event()

    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        vcpu.el2.interrupted.clear()
        spinning.set()
        while not vcpu.nr_lrs:
            assert vcpu.el2.interrupted.wait(TIMEOUT_S)
            yield ExitCode.IRQ
        assert intids(vcpu) == [45]
        yield off(vcpu)

    machine = GicMachine(guest)
    machine.enable(45)
    thread = start(machine.run)
    assert spinning.wait(TIMEOUT_S)
    machine.spi(45, 1)
    join(thread)
    machine.close()


# Waiting


@pytest.mark.parametrize(
    ("vmcr", "wakes"),
    [
        (OPEN_VMCR, True),
        (VMCR.encode(VENG0=1, VPMR=0xF8), False),
        (VMCR.encode(VENG1=1, VPMR=0), False),
        (VMCR.encode(VENG1=1, VPMR=0x08), True),
    ],
)
def test_only_what_the_cpu_interface_lets_through_ends_a_wait(vmcr: int, wakes: bool) -> None:
    waiting = threading.Event()

    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        vcpu.set_vmcr(vmcr)
        waiting.set()
        yield wfi(vcpu)
        assert vcpu.flags & INCREMENT_PC
        assert intids(vcpu) == [40]
        yield off(vcpu)

    machine = GicMachine(guest)
    machine.enable(40)
    results: list[int] = []
    thread = start(lambda: results.append(errno_of(machine.run)))
    assert waiting.wait(TIMEOUT_S)
    machine.spi(40, 1)
    if not wakes:
        thread.join(0.05)
        assert thread.is_alive()
        machine.rig.kernel.kick(machine.vcpus[0])
    join(thread)
    assert results == [0 if wakes else EINTR]
    machine.close()


def test_a_pending_interrupt_means_no_wait() -> None:
    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        vcpu.set_vmcr(OPEN_VMCR)
        yield wfi(vcpu)
        yield hvc(vcpu, 0x8400_0001)
        assert vcpu.x0 == 0
        yield off(vcpu)

    machine = GicMachine(guest)
    machine.enable(40)
    machine.spi(40, 1)
    assert machine.run() == SYSTEM_EVENT
    machine.close()


def test_a_wait_ends_for_a_kick_and_the_guest_goes_on_behind_it() -> None:
    waiting = threading.Event()

    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        vcpu.set_vmcr(OPEN_VMCR)
        waiting.set()
        yield wfi(vcpu)
        assert vcpu.flags & INCREMENT_PC
        yield off(vcpu)

    machine = GicMachine(guest)
    results: list[int] = []
    thread = start(lambda: results.append(errno_of(machine.run)))
    assert waiting.wait(TIMEOUT_S)
    end(machine, 0, thread)
    assert results == [EINTR]
    assert machine.run() == SYSTEM_EVENT
    machine.close()


# The virtual timer


def test_the_virtual_timer_is_asked_for_at_interrupts() -> None:
    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        yield store(vcpu, GICD, 2)
        yield store(vcpu, SGI_FRAME + g.ISENABLER, 1 << 27)
        vcpu.timer_output = 1
        yield store(vcpu, DEVICE, 0)
        # No interrupt has said so yet.
        assert vcpu.nr_lrs == 0
        yield ExitCode.IRQ
        assert intids(vcpu) == [27]
        # The guest sets its timer anew without taking the interrupt.
        vcpu.timer_output = 0
        yield store(vcpu, GICD + g.GICD_STATUSR, 0)
        assert vcpu.nr_lrs == 0
        vcpu.timer_output = 1
        yield ExitCode.IRQ
        [word] = vcpu.list_registers()
        # Taken, and ended without having set the timer: it comes again.
        vcpu.set_list_register(0, word & ~LR_STATE)
        yield ExitCode.IRQ
        assert intids(vcpu) == [27]
        [word] = vcpu.list_registers()
        vcpu.set_list_register(0, word & ~LR_STATE)
        vcpu.timer_output = 0
        yield ExitCode.IRQ
        assert vcpu.nr_lrs == 0
        yield off(vcpu)

    machine = GicMachine(guest)
    assert machine.run() == MMIO
    assert machine.run() == SYSTEM_EVENT
    machine.close()


def test_the_virtual_timer_ends_a_wait() -> None:
    waiting = threading.Event()
    vcpus: list[FakeVcpu] = []

    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        vcpus.append(vcpu)
        vcpu.set_vmcr(OPEN_VMCR)
        waiting.set()
        yield wfi(vcpu)
        assert intids(vcpu) == [27]
        yield off(vcpu)

    machine = GicMachine(guest)
    machine.enable(27)
    thread = start(machine.run)
    assert waiting.wait(TIMEOUT_S)
    # An alarm of somebody else's.
    assert machine.rig.kernel.interrupt()
    thread.join(0.02)
    assert thread.is_alive()
    vcpus[0].timer_output = 1
    assert machine.rig.kernel.interrupt()
    join(thread)
    machine.close()


def test_a_timer_that_has_expired_means_no_wait() -> None:
    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        vcpu.set_vmcr(OPEN_VMCR)
        vcpu.timer_output = 1
        yield wfi(vcpu)
        assert intids(vcpu) == [27]
        yield off(vcpu)

    machine = GicMachine(guest)
    machine.enable(27)
    assert machine.run() == SYSTEM_EVENT
    machine.close()


# The physical timer


def test_registers_of_the_physical_timer() -> None:
    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        clock = machine.rig.clock
        clock.ns = 1000 * NS_PER_TICK
        yield write_sysreg(vcpu, r.CNTP_CVAL_EL0, 1500)
        yield read_sysreg(vcpu, r.CNTP_TVAL_EL0)
        assert vcpu.x0 == 500
        yield write_sysreg(vcpu, r.CNTP_CTL_EL0, 0xFF)
        yield read_sysreg(vcpu, r.CNTP_CTL_EL0)
        assert vcpu.x0 == 3
        clock.ns = 1500 * NS_PER_TICK
        yield read_sysreg(vcpu, r.CNTP_CTL_EL0)
        assert vcpu.x0 == 7
        clock.ns += 2 * NS_PER_TICK
        yield read_sysreg(vcpu, r.CNTP_TVAL_EL0)
        assert vcpu.x0 == 0xFFFF_FFFE
        yield write_sysreg(vcpu, r.CNTP_TVAL_EL0, 0xFFFF_FFFF)
        yield read_sysreg(vcpu, r.CNTP_CVAL_EL0)
        assert vcpu.x0 == 1501
        assert alarm().deadline is None
        yield write_sysreg(vcpu, r.CNTP_TVAL_EL0, 10)
        assert alarm().deadline is None
        yield write_sysreg(vcpu, r.CNTP_CTL_EL0, 1)
        assert alarm().deadline == 1512 * NS_PER_TICK
        yield write_sysreg(vcpu, r.CNTP_CVAL_EL0, (1 << 64) - 1)
        assert alarm().deadline is None
        yield write_sysreg(vcpu, r.CNTP_CVAL_EL0, 1600)
        assert alarm().deadline == 1600 * NS_PER_TICK
        yield write_sysreg(vcpu, r.CNTP_CTL_EL0, 0)
        assert alarm().deadline is None
        yield off(vcpu)

    def alarm() -> FakeAlarm:
        [one] = machine.rig.alarms.all
        return one

    machine = GicMachine(guest)
    assert machine.run() == SYSTEM_EVENT
    machine.close()


def test_the_physical_timer_interrupts_and_ends_a_wait() -> None:
    waiting = threading.Event()

    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        vcpu.set_vmcr(OPEN_VMCR)
        yield write_sysreg(vcpu, r.CNTP_CVAL_EL0, 1000)
        yield write_sysreg(vcpu, r.CNTP_CTL_EL0, 1)
        waiting.set()
        yield wfi(vcpu)
        [word] = vcpu.list_registers()
        assert LR["vINTID"].get(word) == 30
        # Still asserted when it has been handled: again.
        vcpu.set_list_register(0, word & ~LR_STATE)
        yield ExitCode.IRQ
        assert intids(vcpu) == [30]
        yield write_sysreg(vcpu, r.CNTP_CTL_EL0, 0)
        assert vcpu.nr_lrs == 0
        yield off(vcpu)

    machine = GicMachine(guest)
    machine.enable(30)
    thread = start(machine.run)
    assert waiting.wait(TIMEOUT_S)
    machine.rig.clock.ns = 1000 * NS_PER_TICK
    [alarm] = machine.rig.alarms.all
    assert alarm.callback()
    join(thread)
    machine.close()


def test_an_off_vcpu_has_no_timer() -> None:
    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        yield write_sysreg(vcpu, r.CNTP_CVAL_EL0, 1000)
        yield write_sysreg(vcpu, r.CNTP_CTL_EL0, 1)
        [alarm] = machine.rig.alarms.all
        assert alarm.deadline is not None
        leaving.set()
        yield hvc(vcpu, 0x8400_0002)

    leaving = threading.Event()
    machine = GicMachine(guest)
    thread = start(errno_of, machine.run)
    assert leaving.wait(TIMEOUT_S)
    end(machine, 0, thread)
    [alarm] = machine.rig.alarms.all
    assert alarm.deadline is None
    machine.close()


# Virtual time


def test_time_jumps_when_everybody_waits() -> None:
    order: list[tuple[int, int]] = []

    def guest(vcpu: FakeVcpu, index: int) -> Iterator[int]:
        if index == 0:
            # CPU_ON of the other one.
            yield hvc(vcpu, 0xC400_0003, 1)
        vcpu.set_vmcr(OPEN_VMCR)
        yield store(vcpu, GICD, 2)
        yield store(vcpu, SGI_FRAME + index * FRAMES + g.ISENABLER, 1 << 30)
        for deadline in ((1000, 5000), (2000, 3000))[index]:
            yield write_sysreg(vcpu, r.CNTP_CVAL_EL0, deadline)
            yield write_sysreg(vcpu, r.CNTP_CTL_EL0, 1)
            yield wfi(vcpu)
            assert intids(vcpu) == [30]
            order.append((index, machine.rig.clock.ns // NS_PER_TICK))
            [word] = vcpu.list_registers()
            vcpu.set_list_register(0, word & ~LR_STATE)
            yield write_sysreg(vcpu, r.CNTP_CTL_EL0, 0)
        yield hvc(vcpu, 0x8400_0002 if index else 0x8400_0008)

    machine = GicMachine(lambda vcpu: guest(vcpu, 0), lambda vcpu: guest(vcpu, 1), virtual=True)
    first, second = (start(errno_of, machine.run, index) for index in range(2))
    join(first)
    end(machine, 1, second)
    assert order == [(0, 1000), (1, 2000), (1, 3000), (0, 5000)]
    machine.close()


def test_with_nothing_to_jump_to_a_wait_lasts_until_the_kick() -> None:
    waiting = threading.Event()

    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        waiting.set()
        yield wfi(vcpu)

    machine = GicMachine(guest, virtual=True)
    results: list[int] = []
    thread = start(lambda: results.append(errno_of(machine.run)))
    assert waiting.wait(TIMEOUT_S)
    end(machine, 0, thread)
    assert results == [EINTR]
    machine.close()
