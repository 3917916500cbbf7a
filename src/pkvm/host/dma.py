# SPDX-License-Identifier: GPL-2.0-or-later
"""The driver of the machine's copy engine, "/dev/dma-copy".

The device reads and writes physical memory by itself, behind a stage-2 that
only EL2 programs. The driver translates user addresses and programs it; what
the device may not touch stops it, and the driver can only report that.
"""

from __future__ import annotations

import errno

from pkvm.host.mm import UserSpace
from pkvm.host.ports import Bus
from pkvm.uapi.kvm import DmaCopy

SOURCE = 0x00
DESTINATION = 0x08
LENGTH = 0x10
CONTROL = 0x18
STATUS = 0x20
FAULT_ADDRESS = 0x28
"""Registers, 64 bits each, as offsets from the device's base."""
START = 1
STATUS_FAULT = 1


class CopyDriver:
    """The driver; `base` is the PA of the device's registers. The kernel lock covers it."""

    def __init__(self, bus: Bus, users: UserSpace, base: int) -> None:
        self._bus = bus
        self._users = users
        self._base = base

    def copy(self, argument: bytes) -> None:
        """DMA_COPY with (source, destination, length): user addresses and bytes.

        Raises EFAULT outside the VMM's mappings, EIO when the device was stopped by its stage-2;
        what it had copied by then stays copied.
        """
        source, destination, length = DmaCopy.ARGS.unpack(argument)
        source_pa = self._users.pa(source, length)
        destination_pa = self._users.pa(destination, length)
        for register, value in (
            (SOURCE, source_pa),
            (DESTINATION, destination_pa),
            (LENGTH, length),
            (CONTROL, START),
        ):
            self._bus.write_u64(self._base + register, value)
        if self._bus.read_u64(self._base + STATUS) & STATUS_FAULT:
            stopped = self._bus.read_u64(self._base + FAULT_ADDRESS)
            raise OSError(
                errno.EIO,
                f"the copy engine was stopped by its stage-2 at physical address {stopped:#x}",
            )
