# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_IRQFD: eventfds that are interrupts, and the ones that are told of their end."""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fakes.gic_machine import GicMachine, Group, off
from fakes.host_fakes import FakeVcpu, errno_of
from fakes.host_machine import TIMEOUT_S
from pkvm.arm64 import gicv3 as g
from pkvm.arm64.gic import LR_STATE
from pkvm.hyp.abi import ExitCode
from pkvm.uapi import kvm as uapi

EBADF, EAGAIN, EBUSY, EINVAL = 9, 11, 16, 22
SPI = 8
INTID = 32 + SPI
Flag = uapi.IrqfdFlag

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="eventfds are Linux's")


@contextmanager
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)


def irqfd(machine: GicMachine, fd: int, gsi: int = SPI, flags: int = 0, resample: int = 0) -> None:
    argument = bytearray(uapi.IRQFD.pack(fd & 0xFFFF_FFFF, gsi, flags, resample))
    machine.rig.kernel.ioctl(machine.vm, uapi.Ioctl.IRQFD, argument)


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.001)


@pytest.fixture
def machine() -> Iterator[GicMachine]:
    """SPI 8 is edge-triggered, as it is at reset."""
    made = GicMachine(lambda vcpu: iter(()))
    made.enable(INTID)
    yield made
    made.close()
    made.rig.kernel.shutdown()


def pending(machine: GicMachine) -> bool:
    return bool(machine.get(Group.DIST_REGS, g.ISPENDR + 4) >> SPI & 1)


def test_a_signal_is_an_edge(machine: GicMachine) -> None:
    with eventfd() as fd:
        irqfd(machine, fd)
        os.eventfd_write(fd, 1)
        until(lambda: pending(machine))
        machine.attr(Group.DIST_REGS, g.ISPENDR + 4, 0)
        # The VMM's own descriptor may go: the kernel has one.
        other = os.dup(fd)
    os.eventfd_write(other, 1)
    until(lambda: pending(machine))
    os.close(other)


def test_a_device_that_never_stops_signalling_makes_one_interrupt(machine: GicMachine) -> None:
    """However often a device raises its line, nothing piles up: one interrupt is pending, and when
    the storm ends so does what the host does for it."""
    stop = threading.Event()
    with eventfd() as fd:
        irqfd(machine, fd)

        def storm() -> None:
            while not stop.is_set():
                os.eventfd_write(fd, 1)

        device = threading.Thread(target=storm)
        device.start()
        for _ in range(20):
            until(lambda: pending(machine))
            machine.attr(Group.DIST_REGS, g.ISPENDR + 4, 0)
        stop.set()
        device.join(TIMEOUT_S)
        assert not device.is_alive()
        interrupts = calm = 0
        while calm < 200:
            calm += 1
            if pending(machine):
                interrupts, calm = interrupts + 1, 0
                machine.attr(Group.DIST_REGS, g.ISPENDR + 4, 0)
        assert interrupts <= 3, "of the storm no more than what was under way is left"


def test_a_signal_that_came_before_counts(machine: GicMachine) -> None:
    with eventfd() as fd:
        os.eventfd_write(fd, 1)
        irqfd(machine, fd)
        until(lambda: pending(machine))


def test_deassigned_signals_are_nobodys(machine: GicMachine) -> None:
    with eventfd() as fd, eventfd() as other:
        irqfd(machine, fd)
        irqfd(machine, fd, flags=Flag.DEASSIGN)
        irqfd(machine, fd, flags=Flag.DEASSIGN)
        os.eventfd_write(fd, 1)
        irqfd(machine, other, gsi=SPI + 1)
        os.eventfd_write(other, 1)
        until(lambda: bool(machine.get(Group.DIST_REGS, g.ISPENDR + 4) >> SPI + 1 & 1))
        assert not pending(machine)
        assert os.eventfd_read(fd) == 1


def test_errors(machine: GicMachine) -> None:
    reader, writer = os.pipe()
    with eventfd() as fd:
        assert errno_of(irqfd, machine, fd, SPI, 4) == EINVAL
        assert errno_of(irqfd, machine, -1) == EBADF
        assert errno_of(irqfd, machine, 999_999) == EBADF
        assert errno_of(irqfd, machine, reader) == EINVAL
        assert errno_of(irqfd, machine, fd, SPI, Flag.RESAMPLE, writer) == EINVAL
        assert errno_of(irqfd, machine, fd, SPI, Flag.RESAMPLE, 999_999) == EBADF
        assert errno_of(irqfd, machine, reader, SPI, Flag.DEASSIGN) == EINVAL
        irqfd(machine, fd)
        assert errno_of(irqfd, machine, fd) == EBUSY
        assert errno_of(irqfd, machine, fd, SPI + 1, Flag.RESAMPLE, fd) == EBUSY
        # Interrupts that there are not may be signalled.
        with eventfd() as other:
            irqfd(machine, other, gsi=0xFFFF_FFFF)
            os.eventfd_write(other, 1)
            assert errno_of(machine.rig.kernel.ioctl, machine.vm, uapi.Ioctl.IRQFD, bytearray(31))
    os.close(reader)
    os.close(writer)


def test_before_initialisation() -> None:
    machine = GicMachine(lambda vcpu: iter(()), start=False)
    with eventfd() as fd:
        assert errno_of(irqfd, machine, fd) == EAGAIN
    machine.close()


def test_a_resampling_line_stays_high_until_the_guest_has_handled_it() -> None:
    rounds: list[int] = []
    handled = threading.Event()

    def guest(vcpu: FakeVcpu) -> Iterator[int]:
        while len(rounds) < 2:
            if vcpu.nr_lrs:
                [word] = vcpu.list_registers()
                rounds.append(word)
                vcpu.set_list_register(0, word & ~LR_STATE)
            elif not rounds:
                vcpu.el2.interrupted.wait(TIMEOUT_S)
            elif len(rounds) == 1:
                handled.set()
                vcpu.el2.interrupted.clear()
                vcpu.el2.interrupted.wait(TIMEOUT_S)
            yield ExitCode.IRQ
        yield off(vcpu)

    machine = GicMachine(guest)
    machine.by_level(INTID)
    machine.enable(INTID)
    with eventfd() as fd, eventfd() as resample:
        irqfd(machine, fd, flags=Flag.RESAMPLE, resample=resample)
        os.eventfd_write(fd, 1)
        thread = threading.Thread(target=machine.run, daemon=True)
        thread.start()
        assert handled.wait(TIMEOUT_S)
        assert select.select([resample], [], [], TIMEOUT_S)[0]
        assert os.eventfd_read(resample) == 1
        os.eventfd_write(fd, 1)
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
        assert os.eventfd_read(resample) == 1
    assert machine.get(Group.LEVEL_INFO, 32) == 0
    machine.close()
    machine.rig.kernel.shutdown()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_the_thread_ends_with_the_kernel() -> None:
    before = set(threading.enumerate())
    machine = GicMachine(lambda vcpu: iter(()))
    descriptors = open_files()
    with eventfd() as fd:
        irqfd(machine, fd)
        machine.close()
        machine.rig.kernel.shutdown()
    assert set(threading.enumerate()) == before
    assert open_files() == descriptors
