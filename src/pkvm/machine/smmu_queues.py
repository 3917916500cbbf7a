# SPDX-License-Identifier: GPL-2.0-or-later
"""The SMMU's queues in memory: commands from software, events to it (Arm IHI 0070, 3.5, 4, 7).

Both are rings; an index has a wrap flag above its bits. A command that makes no
sense stops its queue with CMDQ_CONS.ERR and GERROR.CMDQ_ERR until software
acknowledges; a full event queue loses events and says so in EVENTQ_PROD.OVFLG.
"""

from __future__ import annotations

import struct
from typing import Protocol

from pkvm.arm64.smmu import (
    CFGI_LEAF,
    CFGI_RANGE,
    COMMAND_BYTES,
    COMMAND_OPCODE,
    COMMAND_STREAM_SHIFT,
    COMMAND_VMID_MASK,
    COMMAND_VMID_SHIFT,
    CONS_ERR_SHIFT,
    EVENT_BYTES,
    EVENT_WORDS,
    GERROR_CMDQ_ERR,
    GERROR_EVENTQ_ABT_ERR,
    OVERFLOW,
    QUEUE_ADDRESS,
    QUEUE_INDEX,
    SYNC_CS_SHIFT,
    TLBI_ADDRESS,
    Command,
    CommandError,
    Reg,
)
from pkvm.machine.memory import PhysicalMemory
from pkvm.machine.smmu_registers import QueueArea, Registers
from pkvm.machine.tlb import TlbPair

_PROD, _CONS = int(Reg.CMDQ_PROD), int(Reg.CMDQ_CONS)
_SYNC, _TLBI_S2_IPA = int(Command.SYNC), int(Command.TLBI_S2_IPA)
_pair = struct.Struct("<4Q").unpack_from
_CS_RESERVED = 3
_ALL_STREAMS = 31
_IGNORED = (Command.PREFETCH_CONFIG, Command.PREFETCH_ADDR)


class Caches(Protocol):
    """What commands invalidate."""

    tlbs: dict[int, TlbPair]
    """By VMID."""

    def forget_streams(self, first: int, count: int, *, leaf: bool) -> None:
        """Drop cached STEs; without `leaf` the level 1 descriptors on the way as well."""
        ...


class CommandQueue:
    """The consumer of commands. Called with the SMMU's lock held."""

    def __init__(self, memory: PhysicalMemory, registers: Registers, caches: Caches) -> None:
        self._memory = memory
        self._memory_words = memory.words
        self._registers = registers
        self._caches = caches
        self._tlbs = caches.tlbs
        self._area: QueueArea | None = None
        self._runs = False
        """Whether it is on, in RAM, and not stopped by an error."""
        self._octets = memory.words.cast("B")
        self._start = self._mask = self._wrap = 0
        """Offset in RAM of the first entry, bytes; and as in `QueueArea`."""
        self.prod = self.cons = 0
        """CMDQ_PROD and CMDQ_CONS; in `registers` they are as of the last `show`."""

    def show(self) -> None:
        """Bring CMDQ_PROD and CMDQ_CONS in the registers up to date."""
        self._registers.words[_PROD], self._registers.words[_CONS] = self.prod, self.cons

    def enable(self, enabled: bool) -> None:
        """CR0.CMDQEN was written."""
        self._area = None
        if enabled:
            base = self._registers.read(Reg.CMDQ_BASE, 8)
            self._area = area = QueueArea(self._memory, base, QUEUE_ADDRESS, COMMAND_BYTES)
            self._start, self._mask, self._wrap = (area.first or 0) << 3, area.mask, area.wrap
        self.resume()

    def resume(self) -> None:
        """Look again whether commands can be executed, and do so."""
        area = self._area
        is_stopped = bool(self._registers.active_errors & GERROR_CMDQ_ERR)
        self._runs = area is not None and area.first is not None and not is_stopped
        if self._runs:
            self.ring(self.prod)
        elif area is not None and not is_stopped:
            cons = self.cons & area.wrap
            if cons != self.prod & area.wrap:
                self._fail(cons, CommandError.ABT)

    def ring(self, prod: int) -> None:
        """CMDQ_PROD was written: execute commands up to it, or to the first bad one. A TLBI of a
        page and then a SYNC, side by side, are what software issues most: they are fetched at once
        and done right here."""
        self.prod = prod
        if not self._runs:
            if self._area is not None and self._area.first is None:
                self.resume()
            return
        cons = self.cons
        if prod == cons + 2 and not cons & 1 and self._mask:
            word, address, after, _ = _pair(self._octets, self._start + ((cons & self._mask) << 4))
            if word & COMMAND_OPCODE == _TLBI_S2_IPA and after == _SYNC:
                tlb = self._tlbs.get(word >> COMMAND_VMID_SHIFT & COMMAND_VMID_MASK)
                if tlb is not None:
                    tlb.forget(address & TLBI_ADDRESS)
                self.cons = prod & self._wrap
                return
        words, wrap = self._memory_words, self._wrap
        cons &= wrap
        prod &= wrap
        while cons != prod:
            at = (self._start >> 3) + ((cons & self._mask) << 1)
            word = words[at]
            if not self._execute(word & COMMAND_OPCODE, word, words[at + 1]):
                self._fail(cons, CommandError.ILL)
                return
            cons = cons + 1 & wrap
        self.cons = cons

    def _execute(self, opcode: int, word: int, more: int) -> bool:
        """Any command; False if there is no such one."""
        stream = word >> COMMAND_STREAM_SHIFT
        if opcode == Command.CFGI_STE:
            self._caches.forget_streams(stream, 1, leaf=bool(more & CFGI_LEAF))
        elif opcode == Command.CFGI_STE_RANGE:
            bits = (more & CFGI_RANGE) + 1
            first = 0 if bits > _ALL_STREAMS else stream & -(1 << bits)
            self._caches.forget_streams(first, 1 << bits, leaf=False)
        elif opcode == Command.TLBI_S2_IPA:
            tlb = self._tlbs.get(word >> COMMAND_VMID_SHIFT & COMMAND_VMID_MASK)
            if tlb is not None:
                tlb.forget(more & TLBI_ADDRESS)
        elif opcode == Command.TLBI_S12_VMALL:
            tlb = self._tlbs.get(word >> COMMAND_VMID_SHIFT & COMMAND_VMID_MASK)
            if tlb is not None:
                tlb.forget_all()
        elif opcode == Command.TLBI_NSNH_ALL:
            for tlb in self._tlbs.values():
                tlb.forget_all()
        elif opcode == Command.SYNC:
            return word >> SYNC_CS_SHIFT & 3 != _CS_RESERVED
        else:
            return opcode in _IGNORED
        return True

    def _fail(self, cons: int, error: CommandError) -> None:
        self.cons = cons | error << CONS_ERR_SHIFT
        self._registers.raise_error(GERROR_CMDQ_ERR)
        self._runs = False


class EventQueue:
    """The producer of events. Called with the SMMU's lock held."""

    def __init__(self, memory: PhysicalMemory, registers: Registers) -> None:
        self._memory = memory
        self._registers = registers
        self._words = registers.words
        self._area: QueueArea | None = None

    def enable(self, enabled: bool) -> None:
        """CR0.EVENTQEN was written."""
        if not enabled:
            self._area = None
        elif self._area is None:
            base = self._registers.read(Reg.EVENTQ_BASE, 8)
            self._area = QueueArea(self._memory, base, QUEUE_ADDRESS, EVENT_BYTES)

    def put(self, record: tuple[int, int, int, int]) -> None:
        """Write an event record; lost if the queue is off, full or not in RAM."""
        area, registers = self._area, self._words
        if area is None:
            return
        if area.first is None:
            self._registers.raise_error(GERROR_EVENTQ_ABT_ERR)
            return
        flags, prod = registers[Reg.EVENTQ_PROD] & OVERFLOW, registers[Reg.EVENTQ_PROD] & area.wrap
        cons = registers[Reg.EVENTQ_CONS]
        if prod ^ cons & area.wrap == area.mask + 1:
            if flags == cons & OVERFLOW:
                registers[Reg.EVENTQ_PROD] ^= OVERFLOW
            return
        at = area.first + (prod & area.mask) * EVENT_WORDS
        for offset, word in enumerate(record):
            self._memory.words[at + offset] = word
        registers[Reg.EVENTQ_PROD] = flags | (prod + 1 & area.wrap & QUEUE_INDEX)
