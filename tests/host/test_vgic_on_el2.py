# SPDX-License-Identifier: GPL-2.0-or-later
"""The interrupt controller on the real EL2 and CPU: a guest takes an interrupt of each kind."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fakes.contract_rig import RAM_IPA, Rig, rig, running_system
from pkvm import events, guests
from pkvm.kvm import Device, Vcpu
from pkvm.system import ClockName, System
from pkvm.uapi import kvm as uapi
from pkvm.vmm import board
from pkvm.vmm.board import Board
from pkvm.vmm.loader import load_image
from pkvm.vmm.mailbox import Event, Mailbox
from pkvm.vmm.vmm import Vmm

TIMEOUT_S = 60
SPI_INTID = 95
"""What guests/irq waits for."""
SGI, VIRTUAL_TIMER, PHYSICAL_TIMER = 3, 27, 30
SPIN = (0x1400_0000).to_bytes(4, "little")
WFI_LOOP = (0xD503_207F).to_bytes(4, "little") + (0x17FF_FFFF).to_bytes(4, "little")
GICD, GICR = 0x0800_0000, 0x080A_0000


class Run:
    """guests/irq on a machine of its own; `raise_later`: its SPI comes from another thread, while
    the guest waits."""

    def __init__(
        self, system: System, cpus: int, protected: bool, *, raise_later: bool = False
    ) -> None:
        self.notes: list[int] = []
        self.console = b""
        self._raise_later = raise_later
        the_board = Board(ram_bytes=8 << 20, cpus=cpus, gic=True)
        with system.open() as kvm:
            self.vmm = Vmm(
                kvm,
                the_board,
                load_image(guests.image("irq"), the_board),
                protected=protected,
                console=self._print,
                plug=self._plug,
            )
            self.outcome = self.vmm.run(timeout=TIMEOUT_S)
            self.vmm.close()

    def _print(self, data: bytes) -> None:
        self.console += data

    def _plug(self, vmm: Vmm) -> None:
        vmm.devices[board.MAILBOX_BASE >> 12] = Mailbox(self._on_event)
        self._line = vmm.line(SPI_INTID - 32)

    def _on_event(self, event: Event) -> None:
        number = event.args[0]
        lower = number in self.notes
        self.notes.append(number)
        if number != SPI_INTID:
            return
        if lower or not self._raise_later:
            self._line.set(not lower)
        else:
            threading.Timer(0.02, self._line.set, (True,)).start()


@pytest.mark.parametrize("protected", [True, False])
@pytest.mark.parametrize("clock", ["real", "virtual"])
@pytest.mark.parametrize("cpus", [1, 2])
def test_a_guest_takes_an_interrupt_of_each_kind(
    clock: ClockName, protected: bool, cpus: int
) -> None:
    with running_system(clock=clock, firmware=guests.image("firmware")) as system:
        run = Run(system, cpus, protected, raise_later=clock == "real")
    expected = [VIRTUAL_TIMER, PHYSICAL_TIMER, SPI_INTID, SPI_INTID, *[SGI] * (cpus - 1)]
    assert (run.outcome.kind, run.notes) == ("powered-off", expected), run.console.decode()


class Log:
    def __init__(self) -> None:
        self.events: list[events.Event] = []

    def record(self, event: events.Event, /) -> None:
        self.events.append(event)


def test_with_the_virtual_clock_interrupts_come_at_the_same_moment_each_time() -> None:
    def one() -> list[events.Event]:
        log = Log()
        with System(64 << 20, clock="virtual", recorder=log) as system:
            Run(system, 2, True)
        return log.events

    first = one()
    assert [one() == first for _ in range(2)] == [True, True]


@contextmanager
def running(code: bytes) -> Iterator[tuple[Rig, Vcpu, Device]]:
    """The vCPU of a VM that has a GIC, in a KVM_RUN that executes `code`; kicked in the end."""
    with rig() as made:
        made.ram.write(0, code)
        [vcpu] = made.vcpus()
        vcpu.set_reg("pc", RAM_IPA)
        with made.vm.create_device(uapi.DeviceType.ARM_VGIC_V3) as device:
            device.set_attr(uapi.VgicGroup.ADDR, uapi.VgicAddr.DIST, GICD)
            device.set_attr(uapi.VgicGroup.ADDR, uapi.VgicAddr.REDIST, GICR)
            device.set_attr(uapi.VgicGroup.CTRL, uapi.VgicCtrl.INIT)
            device.set_attr(uapi.VgicGroup.DIST_REGS, 0, 2)
            device.set_attr(uapi.VgicGroup.DIST_REGS, 0x104, 1)
            thread = threading.Thread(target=vcpu.run, daemon=True)
            thread.start()
            yield made, vcpu, device
            vcpu.kick()
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()


def test_a_waiting_guest_costs_nothing() -> None:
    with running(WFI_LOOP):
        time.sleep(0.2)
        before = time.process_time()
        time.sleep(1.0)
        assert time.process_time() - before < 0.03


def test_an_interrupt_of_another_thread_gets_in_while_a_guest_spins() -> None:
    with running(SPIN) as (made, _, _):
        times = []
        for level in (True, False) * 20:
            start = time.perf_counter()
            made.vm.irq_line(uapi.irq_number(uapi.IrqType.SPI, 32), level)
            times.append(time.perf_counter() - start)
        assert sorted(times)[len(times) // 2] < 0.02


def test_an_eventfd_interrupts() -> None:
    with rig() as made:
        device = made.vm.create_device(uapi.DeviceType.ARM_VGIC_V3)
        made.vcpus()
        device.set_attr(uapi.VgicGroup.CTRL, uapi.VgicCtrl.INIT)
        device.set_attr(uapi.VgicGroup.DIST_REGS, 0xC08, 0xAAAA_AAAA)
        fd = os.eventfd(0)
        made.vm.irqfd(fd, 3)
        os.eventfd_write(fd, 1)
        limit = time.monotonic() + TIMEOUT_S
        while not device.get_attr(uapi.VgicGroup.DIST_REGS, 0x204):
            assert time.monotonic() < limit
        made.vm.deassign_irqfd(fd, 3)
        os.close(fd)
        device.close()
