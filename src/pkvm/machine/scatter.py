# SPDX-License-Identifier: GPL-2.0-or-later
"""The scatter-gather engine: a device that works off a ring of descriptors in memory, by DMA.

Registers, 64 bits each; only whole, aligned 8-byte accesses reach them. Any
other access, and any to the rest of the window, reads as zero and is ignored.

========== ====== ==== ======================================================
RING       0x00   rw   address of the ring; a write also makes HEAD 0
SIZE       0x08   rw   descriptors in it, 2 to 1024; a write also makes HEAD 0
HEAD       0x10   r    the descriptor that is next
TAIL       0x18   w    do the descriptors from HEAD up to this one, around the end
STATUS     0x20   r    0 idle, 1 stopped, 2 busy
FAULT      0x28   r    address that was refused, when STATUS is 1
CTRL       0x30   w    bit 1: reset, every register is zero. Reads as zero
========== ====== ==== ======================================================

A descriptor has 32 bytes, little-endian: source (u64), destination (u64),
length (u32, at most 1 MiB), reserved (u32), state (u64), to which the device
writes 1 when the bytes are moved (see `pkvm.machine.dma.move`). It is read when
its turn comes, through the same SMMU as everything else. What cannot be done
stops the engine, HEAD at the descriptor: a refused address, a length that is too
large (FAULT is the descriptor's own address), a TAIL or SIZE out of range (FAULT
is the number). A write of TAIL starts anew from HEAD; while busy all writes are
ignored, so that a descriptor that rings the device's own bell goes nowhere.
"""

from __future__ import annotations

import struct
import threading

from pkvm.arm64.bits import MASK64
from pkvm.events import DmaFault, Recorder
from pkvm.machine.bus import Master
from pkvm.machine.dma import CTRL_RESET, STATUS_BUSY, STATUS_DONE, STATUS_FAULT, WINDOW_BYTES, move
from pkvm.machine.memory import BusError, DeviceWindow
from pkvm.machine.stage2 import Access, Stage2Fault

RING = 0x00
SIZE = 0x08
HEAD = 0x10
TAIL = 0x18
STATUS = 0x20
FAULT = 0x28
CTRL = 0x30

DESCRIPTOR = struct.Struct("<QQIIQ")
STATE_OFFSET = 24
STATE_DONE = 1
MIN_SIZE, MAX_SIZE = 2, 1024
MAX_BYTES = 1 << 20
"""Of a descriptor: so a ring holds at most a gigabyte of work."""


class _Stopped(Exception):
    """A descriptor cannot be done; `address` goes to FAULT."""

    def __init__(self, address: int, access: Access) -> None:
        super().__init__(address)
        self.address = address
        self.access = access


class ScatterEngine:
    """The device at PA `base`; everything it does in memory goes through `bus`."""

    def __init__(self, bus: Master, recorder: Recorder, *, base: int, name: str = "dma-sg") -> None:
        self.name = name
        self.window = DeviceWindow(name, base, WINDOW_BYTES, self._read, self._write, self._work)
        self._bus = bus
        self._recorder = recorder
        self._lock = threading.Lock()
        self._working = threading.RLock()
        """Held while descriptors are done, so that who rang sees them done. Reentrant: a
        descriptor may touch the device's own registers."""
        self._registers = dict.fromkeys((RING, SIZE, HEAD, STATUS, FAULT), 0)
        self._tail: int | None = None

    def _read(self, offset: int, size: int) -> int:
        if size != 8:
            return 0
        with self._lock:
            return self._registers.get(offset, 0)

    def _write(self, offset: int, size: int, value: int) -> None:
        if size != 8:
            return
        with self._lock:
            registers = self._registers
            if registers[STATUS] == STATUS_BUSY:
                return
            if offset in (RING, SIZE):
                registers[offset] = value & MASK64
                registers[HEAD] = 0
            elif offset == CTRL and value & CTRL_RESET:
                self._registers = dict.fromkeys(registers, 0)
            elif offset == TAIL:
                registers[STATUS], registers[FAULT] = STATUS_BUSY, 0
                self._tail = value

    def _work(self) -> None:
        """Do what was rung for; the bus calls this after each access to the window."""
        with self._working:
            with self._lock:
                tail, self._tail = self._tail, None
                registers = dict(self._registers)
            if tail is None:
                return
            stopped = self._run(registers, tail)
            with self._lock:
                self._registers[HEAD] = registers[HEAD]
                self._registers[STATUS] = STATUS_DONE if stopped is None else STATUS_FAULT
                self._registers[FAULT] = 0 if stopped is None else stopped.address & MASK64
            if stopped is not None:
                fault = DmaFault(self.name, stopped.address & MASK64, stopped.access.value)
                self._recorder.record(fault)

    def _run(self, registers: dict[int, int], tail: int) -> _Stopped | None:
        """Do descriptors from HEAD to `tail`, moving HEAD on; why it ended early, if it did."""
        size = registers[SIZE]
        if not MIN_SIZE <= size <= MAX_SIZE:
            return _Stopped(size, Access.READ)
        if tail >= size:
            return _Stopped(tail, Access.READ)
        while registers[HEAD] != tail:
            try:
                self._do(registers[RING] + registers[HEAD] * DESCRIPTOR.size)
            except _Stopped as stopped:
                return stopped
            registers[HEAD] = (registers[HEAD] + 1) % size
        return None

    def _do(self, address: int) -> None:
        """The descriptor at that address."""
        try:
            source, destination, length, _, _ = DESCRIPTOR.unpack(
                self._bus.read(address, DESCRIPTOR.size)
            )
        except (Stage2Fault, BusError) as error:
            raise _Stopped(address, Access.READ) from error
        if length > MAX_BYTES:
            raise _Stopped(address, Access.READ)
        stopped = move(self._bus, source, destination, length)
        if stopped is not None:
            raise _Stopped(*stopped)
        try:
            self._bus.write(address + STATE_OFFSET, STATE_DONE.to_bytes(8, "little"))
        except (Stage2Fault, BusError) as error:
            raise _Stopped(address + STATE_OFFSET, Access.WRITE) from error
