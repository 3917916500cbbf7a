# SPDX-License-Identifier: GPL-2.0-or-later
"""The driver of the scatter-gather engine, "/dev/dma-sg".

It turns moves between user addresses into descriptors for memory that is
contiguous, fills the ring with them and rings the bell. The bytes go through
the SMMU; what the device may not touch stops it, and the driver can only say
how far it came.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from typing import NamedTuple

from pkvm.host.argument import Argument
from pkvm.host.assignment import Assignment
from pkvm.host.mm import UserSpace
from pkvm.host.pages import PageAllocator
from pkvm.host.ports import PAGE_SIZE, Bus
from pkvm.uapi.kvm import DeviceAssign, DmaMove

RING = 0x00
SIZE = 0x08
HEAD = 0x10
TAIL = 0x18
STATUS = 0x20
FAULT = 0x28
"""Registers, 64 bits each, as offsets from the device's base."""
STATUS_FAULT = 1
ENTRIES = PAGE_SIZE // 32
MAX_BYTES = 1 << 20
"""Of a descriptor."""
_DESCRIPTOR = struct.Struct("<QQIIQ")


class Move(NamedTuple):
    """What a descriptor says: PAs and bytes."""

    source: int
    destination: int
    length: int


class ScatterDriver:
    """The driver; `base` is the PA of the device's registers. The kernel lock covers it. There is a
    ring while somebody has it open."""

    def __init__(self, bus: Bus, users: UserSpace, pages: PageAllocator, base: int) -> None:
        self._bus = bus
        self._users = users
        self._pages = pages
        self._base = base
        self._ring = 0
        self._opened = 0

    def open(self) -> None:
        """One more user. Raises ENOMEM if there is no page for the ring, and what the bus raises
        while a guest has the device."""
        if not self._opened:
            ring = self._pages.alloc(1)
            try:
                self._bus.write_u64(self._base + RING, ring)
                self._bus.write_u64(self._base + SIZE, ENTRIES)
            except BaseException:
                self._pages.free(ring)
                raise
            self._ring = ring
        self._opened += 1

    def let_go(self) -> None:
        """The only user closes. Raises EBUSY if there are others."""
        if self._opened > 1:
            raise OSError(errno.EBUSY, "somebody else has the device open")
        self.close()

    def close(self) -> None:
        """One user less."""
        self._opened -= 1
        if not self._opened:
            self._bus.write_u64(self._base + SIZE, 0)
            self._pages.free(self._ring)

    def move(self, parts: list[tuple[int, int, int]]) -> int:
        """Do moves of (source, destination, length), user addresses and bytes, in order; how many
        bytes were moved, all or those before the device was stopped. Raises EFAULT outside the
        VMM's mappings; then those before may have been moved."""
        moved = 0
        batch: list[Move] = []
        for part in parts:
            for one in self._pieces(*part):
                batch.append(one)
                if len(batch) == ENTRIES - 1:
                    done = self._ring_bell(batch)
                    moved += done
                    if done < sum(piece.length for piece in batch):
                        return moved
                    batch = []
        return moved + self._ring_bell(batch)

    def _pieces(self, source: int, destination: int, length: int) -> Iterator[Move]:
        """The move cut where either side is not contiguous."""
        while length:
            (from_pa, readable), *_ = self._users.pieces(
                source, min(length, MAX_BYTES), write=False
            )
            (to_pa, writable), *_ = self._users.pieces(destination, readable, write=True)
            yield Move(from_pa, to_pa, writable)
            source += writable
            destination += writable
            length -= writable

    def _ring_bell(self, batch: list[Move]) -> int:
        """Have the device do these; the bytes that were moved."""
        bus, base = self._bus, self._base
        head = bus.read_u64(base + HEAD)
        for offset, (source, destination, length) in enumerate(batch):
            at = self._ring + (head + offset) % ENTRIES * _DESCRIPTOR.size
            bus.write(at, _DESCRIPTOR.pack(source, destination, length, 0, 0))
        bus.write_u64(base + TAIL, (head + len(batch)) % ENTRIES)
        if not bus.read_u64(base + STATUS) & STATUS_FAULT:
            return sum(piece.length for piece in batch)
        stopped = batch[(bus.read_u64(base + HEAD) - head) % ENTRIES]
        fault = bus.read_u64(base + FAULT)
        before = sum(piece.length for piece in batch[: batch.index(stopped)])
        bus.write_u64(base + SIZE, ENTRIES)  # HEAD is 0 again
        for start in (stopped.source, stopped.destination):
            if start <= fault < start + stopped.length:
                return before + fault - start
        return before


class ScatterFile:
    """/dev/dma-sg. Raises ENOMEM."""

    def __init__(self, driver: ScatterDriver, users: UserSpace, assignment: Assignment) -> None:
        driver.open()
        self._driver = driver
        self._users = users
        self._assignment = assignment
        self._has_device = True

    def ioctl(self, request: int, arg: int | bytearray) -> int:
        """DmaMove.MOVE and DeviceAssign.ASSIGN; ENOTTY for any other. Raises EINVAL for a number of
        parts that cannot be, EIO when the device was stopped, ENODEV once it was given away."""
        if not self._has_device:
            raise OSError(errno.ENODEV, "the device was given away: open it again")
        if request == DeviceAssign.ASSIGN:
            wish = Argument(arg, self._users).read(DeviceAssign.ARGS.size)
            self._assignment.assign(wish, self._let_go)
            return 0
        if request != DmaMove.MOVE:
            raise OSError(errno.ENOTTY, f"/dev/dma-sg has no ioctl {request:#x}")
        argument = Argument(arg, self._users)
        count, _ = DmaMove.HEADER.unpack(argument.read(DmaMove.HEADER.size))
        if not 0 < count <= DmaMove.MAX_PARTS:
            raise OSError(errno.EINVAL, f"a request has 1 to {DmaMove.MAX_PARTS} parts")
        size = DmaMove.HEADER.size + count * DmaMove.PART.size
        parts = list(DmaMove.PART.iter_unpack(argument.read(size)[DmaMove.HEADER.size :]))
        moved = self._driver.move(parts)
        argument.write(DmaMove.HEADER.pack(count, moved))
        if moved < sum(length for _, _, length in parts):
            raise OSError(errno.EIO, f"the device was stopped by the SMMU after {moved} bytes")
        return 0

    def release(self) -> None:
        """The ring goes with the last one."""
        if self._has_device:
            self._driver.close()

    def _let_go(self) -> None:
        self._driver.let_go()
        self._has_device = False
