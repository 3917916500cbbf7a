# SPDX-License-Identifier: GPL-2.0-or-later
"""The DMA copy engine: a device that moves bytes by itself, through a stage-2 of its own.

Registers, 64 bits each; only whole, aligned 8-byte accesses reach them. Any
other access, and any to the rest of the window, reads as zero and is ignored.

========== ====== ==== ======================================================
SRC        0x00   rw   IPA of the first byte to read
DST        0x08   rw   IPA of the first byte to write
LEN        0x10   rw   bytes
CTRL       0x18   w    bit 0: start; bit 1: reset. Reads as zero
STATUS     0x20   r    0 idle or done, 1 stopped by a fault, 2 busy
FAULT_IPA  0x28   r    address that was refused, when STATUS is 1
========== ====== ==== ======================================================

A start takes SRC, DST and LEN as they are at that moment; a reset makes every
register zero. While busy both are ignored. Bytes move as `move` says. A LEN
larger than the address space is refused as a fault of SRC before anything moves.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

from pkvm.arm64.bits import MASK64
from pkvm.arm64.stage2 import PAGE_MASK, PAGE_SIZE
from pkvm.events import DmaFault, Recorder
from pkvm.machine.bus import Master
from pkvm.machine.memory import BusError, DeviceWindow
from pkvm.machine.stage2 import Access, Stage2Fault

SRC = 0x00
DST = 0x08
LEN = 0x10
CTRL = 0x18
STATUS = 0x20
FAULT_IPA = 0x28
WINDOW_BYTES = 0x1000
CTRL_START = 1
CTRL_RESET = 2

STATUS_DONE = 0
STATUS_FAULT = 1
STATUS_BUSY = 2


PIECE = 1 << 18
"""Bytes that are read before they are written, at most."""


def move(bus: Master, source: int, destination: int, length: int) -> tuple[int, Access] | None:
    """Move bytes as a device does: in rising order, each piece read whole before it is written.
    Where source and destination overlap, a piece crosses no page boundary: a destination above
    the source therefore repeats it. Returns where it was stopped and doing what; None: nowhere.
    """
    apart = abs(source - destination) >= length
    while length:
        piece = min(length, PAGE_SIZE - (source & PAGE_MASK), PAGE_SIZE - (destination & PAGE_MASK))
        if apart and length > piece:
            reach = min(length, PIECE)
            reach = bus.span(destination, bus.span(source, reach, Access.READ), Access.WRITE)
            piece = max(piece, reach)
        try:
            data = bus.read(source, piece)
        except (Stage2Fault, BusError):
            return source, Access.READ
        try:
            bus.write(destination, data)
        except (Stage2Fault, BusError):
            return destination, Access.WRITE
        source += piece
        destination += piece
        length -= piece
    return None


class _Job(NamedTuple):
    source: int
    destination: int
    length: int


class CopyEngine:
    """The device at PA `base`; its bytes move through `bus`, at most `max_bytes` a start."""

    def __init__(
        self, bus: Master, recorder: Recorder, *, base: int, max_bytes: int, name: str = "dma-copy"
    ) -> None:
        self.name = name
        self.window = DeviceWindow(name, base, WINDOW_BYTES, self._read, self._write, self._work)
        self._bus = bus
        self._recorder = recorder
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._working = threading.RLock()
        """Held while bytes move, so that whoever started a copy sees it finished. Reentrant: a
        copy may touch the device's own registers."""
        self._registers = {SRC: 0, DST: 0, LEN: 0, STATUS: STATUS_DONE, FAULT_IPA: 0}
        self._job: _Job | None = None

    def _read(self, offset: int, size: int) -> int:
        if size != 8:
            return 0
        with self._lock:
            return self._registers.get(offset, 0)

    def _write(self, offset: int, size: int, value: int) -> None:
        if size != 8:
            return
        with self._lock:
            if offset in (SRC, DST, LEN):
                self._registers[offset] = value & MASK64
            elif offset == CTRL and self._registers[STATUS] != STATUS_BUSY:
                if value & CTRL_RESET:
                    self._registers = dict.fromkeys(self._registers, 0)
                elif value & CTRL_START:
                    self._start()

    def _start(self) -> None:
        registers = self._registers
        registers[STATUS] = STATUS_BUSY
        registers[FAULT_IPA] = 0
        self._job = _Job(registers[SRC], registers[DST], registers[LEN])

    def _work(self) -> None:
        """Move what a start asked for; the bus calls this after each access to the window."""
        with self._working:
            with self._lock:
                job, self._job = self._job, None
            if job is None:
                return
            fault = self._copy(job)
            with self._lock:
                if fault is not None:
                    self._registers[FAULT_IPA] = fault.ipa
                self._registers[STATUS] = STATUS_DONE if fault is None else STATUS_FAULT
            if fault is not None:
                self._recorder.record(fault)

    def _copy(self, job: _Job) -> DmaFault | None:
        """Move the bytes; the fault that stopped it, or None."""
        if job.length > self._max_bytes:
            return self._fault(job.source, Access.READ)
        stopped = move(self._bus, job.source, job.destination, job.length)
        return None if stopped is None else self._fault(*stopped)

    def _fault(self, ipa: int, access: Access) -> DmaFault:
        return DmaFault(self.name, ipa, access.value)
