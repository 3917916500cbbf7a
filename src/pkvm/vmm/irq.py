# SPDX-License-Identifier: GPL-2.0-or-later
"""Interrupt lines: a wire from a device to the VM's interrupt controller.

A device tells its line the level that its registers give, as often as it likes;
only a change costs a system call. Shared peripheral interrupts (SPIs) have the
numbers of QEMU's `virt` machine (`pkvm.vmm.board`).
"""

from __future__ import annotations

import threading
from typing import Protocol

from pkvm.uapi import kvm as uapi

SPI_BASE = 32
"""INTID of SPI 0 (Arm GIC architecture, IHI 0069, 2.2.1)."""


class InterruptController(Protocol):
    """What drives the lines: `pkvm.kvm.Vm`."""

    def irq_line(self, irq: int, level: bool) -> None:
        """KVM_IRQ_LINE. Raises OSError."""
        ...


class Line(Protocol):
    """What a device drives."""

    def set(self, level: bool) -> None:
        """The level that the device asserts from now on. Any thread may."""
        ...


class IrqLine:
    """A level-triggered SPI of `vm`, low at first. `spi` counts from 0."""

    def __init__(self, vm: InterruptController, spi: int) -> None:
        self._vm = vm
        self._irq = uapi.irq_number(uapi.IrqType.SPI, SPI_BASE + spi)
        self._lock = threading.Lock()
        self._level = False

    def set(self, level: bool) -> None:
        """Drive the line; nothing happens if it has that level. Raises OSError."""
        if level == self._level:
            return
        with self._lock:
            if level != self._level:
                self._vm.irq_line(self._irq, level)
                self._level = level


class NoLine:
    """The wire of a board without an interrupt controller: it ends nowhere."""

    def set(self, level: bool) -> None:
        """Nothing."""
