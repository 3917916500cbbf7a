# SPDX-License-Identifier: GPL-2.0-or-later
"""EL2's driver of the SMMUv3: the only software that ever programs it (facts §10; Arm IHI 0070).

The stream table and both queues are pages of EL2's. A stream that EL2 has not
been told of finds a zero STE there, or none, and is aborted. Invalidations are
complete when they return: each command is followed by a CMD_SYNC, and CONS is
polled until the SMMU has come by it. Odd slots of the command queue hold
CMD_SYNC for good, so that two words and one register write are an invalidation.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from pkvm.arm64.smmu import (
    CFGI_RANGE,
    COMMAND_STREAM_SHIFT,
    COMMAND_VMID_SHIFT,
    CR0_CMDQEN,
    CR0_EVENTQEN,
    CR0_SMMUEN,
    CR2_RECINVSID,
    EVENT1_READ,
    EVENT_ID,
    EVENT_STREAM_SHIFT,
    EVENT_WORDS,
    OVERFLOW,
    STE_WORDS,
    TLBI_LEAF,
    Command,
    Reg,
)
from pkvm.arm64.stage2 import PAGE_SIZE
from pkvm.events import NO_ADDRESS, Recorder, Tlbi
from pkvm.hyp.errors import Errno, HypBug, Refused
from pkvm.hyp.pool import PagePool
from pkvm.machine.memory import PhysicalMemory
from pkvm.machine.smmu import Smmu

STREAM_BITS = 6
"""log2 of the streams in EL2's table, which is one page."""
_COMMAND_BITS = 8
_EVENT_BITS = 7
"""log2 of the entries of the queues, one page each."""
_COMMAND_MASK = (1 << _COMMAND_BITS) - 1
_COMMAND_WRAP = (2 << _COMMAND_BITS) - 1
_EVENT_MASK = (1 << _EVENT_BITS) - 1
_EVENT_WRAP = (2 << _EVENT_BITS) - 1
_PROD, _CONS = int(Reg.CMDQ_PROD), int(Reg.CMDQ_CONS)
_TLBI_S2_IPA = int(Command.TLBI_S2_IPA)
_POLLS = 1000
"""Reads of CONS before the SMMU counts as dead."""
QUEUE_PAGES = 2
SMMU_PAGES = 1 + QUEUE_PAGES
"""Pages that EL2 needs for it."""
_make = tuple.__new__
_command = struct.Struct("<QQ")


class SmmuRecord(NamedTuple):
    """An event of the SMMU's, as EL2 read it."""

    event: int
    stream: int
    is_read: bool
    ipa: int


class SmmuDriver:
    """The SMMU of a machine. Called with EL2's lock held."""

    def __init__(
        self, memory: PhysicalMemory, pool: PagePool, hardware: Smmu, recorder: Recorder
    ) -> None:
        self.hardware = hardware
        """For those who check; EL2 itself uses its registers only."""
        self.window = hardware.window
        self.overflows = 0
        """How often events were lost because nobody took them."""
        self._read, self._write = self.window.read, self.window.write
        self._words = memory.words
        self._octets = memory.words.cast("B")
        self._record = recorder.record
        self._table, self._commands, self._events = (pool.alloc_aligned(1) for _ in range(3))
        self._first_ste = (self._table - memory.ram_base) >> 3
        self._first_command = (self._commands - memory.ram_base) >> 3
        self._first_event = (self._events - memory.ram_base) >> 3
        self._prod = 0

    @property
    def queue_pages(self) -> tuple[int, int]:
        """PAs of the command and the event queue: what changes there is no state."""
        return self._commands, self._events

    def start(self) -> None:
        """Turn it on, with no stream configured. Until here GBPA aborts everything."""
        write = self._write
        write(Reg.CR0, 4, 0)
        write(Reg.STRTAB_BASE, 8, self._table)
        write(Reg.STRTAB_BASE_CFG, 4, STREAM_BITS)
        write(Reg.CMDQ_BASE, 8, self._commands | _COMMAND_BITS)
        write(Reg.EVENTQ_BASE, 8, self._events | _EVENT_BITS)
        for register in (_PROD, _CONS, Reg.EVENTQ_PROD, Reg.EVENTQ_CONS):
            write(register, 4, 0)
        write(Reg.CR2, 4, CR2_RECINVSID)
        for slot in range(1, _COMMAND_MASK + 1, 2):
            self._words[self._first_command + 2 * slot] = Command.SYNC
        write(Reg.CR0, 4, CR0_CMDQEN)
        self._issue(Command.CFGI_STE_RANGE, CFGI_RANGE)
        self._issue(Command.TLBI_NSNH_ALL)
        enabled = CR0_CMDQEN | CR0_EVENTQEN | CR0_SMMUEN
        write(Reg.CR0, 4, enabled)
        if self._read(Reg.CR0ACK, 4) != enabled:
            raise HypBug("the SMMU does not turn on")

    def configure(self, stream: int, ste: tuple[int, int, int, int]) -> None:
        """Have the stream follow `ste`, an STE's first four words, when this returns; in between
        it is aborted. Translations of a VMID that the stream leaves stay cached.

        Raises Refused(ENOENT) for a stream beyond the table.
        """
        at = self._ste(stream)
        words = self._words
        command = Command.CFGI_STE | stream << COMMAND_STREAM_SHIFT
        words[at] = 0
        self._issue(command)
        for offset in range(3, -1, -1):
            words[at + offset] = ste[offset]
        self._issue(command)

    def ste(self, stream: int) -> tuple[int, int, int, int]:
        """The first four words of a stream's STE. Raises Refused(ENOENT) beyond the table."""
        at = self._ste(stream)
        first, second, third, fourth = self._words[at : at + 4]
        return first, second, third, fourth

    def invalidate_page(self, vmid: int, ipa: int) -> None:
        """TLBI of one page of a VMID, and wait until it is done."""
        prod = self._prod
        at = self._first_command + ((prod & _COMMAND_MASK) << 1)
        word = _TLBI_S2_IPA | vmid << COMMAND_VMID_SHIFT
        _command.pack_into(self._octets, at << 3, word, ipa | TLBI_LEAF)
        self._prod = prod = prod + 2 & _COMMAND_WRAP
        self._write(_PROD, 4, prod)
        if self._read(_CONS, 4) != prod:
            self._wait()
        self._record(_make(Tlbi, (vmid, ipa, "smmu")))

    def invalidate_all(self, vmid: int) -> None:
        """TLBI of a VMID, and wait until it is done."""
        self._issue(Command.TLBI_S12_VMALL | vmid << COMMAND_VMID_SHIFT)
        self._record(Tlbi(vmid, NO_ADDRESS, "smmu"))

    def take_events(self, most: int) -> Iterator[SmmuRecord]:
        """At most `most` of the events since the last time, oldest first. The queue is read by
        index, whatever the SMMU wrote; a queue that was full has lost some."""
        prod = self._read(Reg.EVENTQ_PROD, 4)
        cons = self._read(Reg.EVENTQ_CONS, 4)
        if (prod ^ cons) & OVERFLOW:
            self.overflows += 1
        for _ in range(min(most, prod - cons & _EVENT_WRAP)):
            at = self._first_event + (cons & _EVENT_MASK) * EVENT_WORDS
            head, word1, address = self._words[at : at + 3]
            cons = cons + 1 & _EVENT_WRAP
            self._write(Reg.EVENTQ_CONS, 4, cons | prod & OVERFLOW)
            yield SmmuRecord(
                head & EVENT_ID, head >> EVENT_STREAM_SHIFT, bool(word1 & EVENT1_READ), address
            )
        self._write(Reg.EVENTQ_CONS, 4, cons | prod & OVERFLOW)

    def _ste(self, stream: int) -> int:
        """Index in `memory.words` of a stream's STE."""
        if not 0 <= stream < 1 << STREAM_BITS:
            raise Refused(Errno.ENOENT, "stream", f"there is no stream {stream:#x}")
        return self._first_ste + stream * STE_WORDS

    def _issue(self, word: int, more: int = 0) -> None:
        """A command and its CMD_SYNC; returns when both are done."""
        at = self._first_command + ((self._prod & _COMMAND_MASK) << 1)
        self._words[at] = word
        self._words[at + 1] = more
        self._prod = self._prod + 2 & _COMMAND_WRAP
        self._write(_PROD, 4, self._prod)
        self._wait()

    def _wait(self) -> None:
        """Until the SMMU has executed all commands."""
        for _ in range(_POLLS):
            if self._read(_CONS, 4) == self._prod:
                return
        raise HypBug(f"the SMMU stopped at {self._read(_CONS, 4):#x} of {self._prod:#x}")


assert STE_WORDS * 8 << STREAM_BITS == PAGE_SIZE
