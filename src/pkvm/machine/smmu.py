# SPDX-License-Identifier: GPL-2.0-or-later
"""`Smmu`: an SMMUv3 with stage 2, before every DMA-capable device of the machine (Arm IHI 0070).

Its registers are one window of two 64 KiB pages. A device is a stream
(`master`); what the stream table does not know aborts, and before software has
turned the SMMU on everything does (GBPA.ABORT). It translates by the walker of
everyone else's, and caches translations by VMID and configurations by stream:
only commands empty the caches. What it aborts becomes an event record in
software's queue. It raises no interrupt: software polls.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

from pkvm.arm64.bits import MASK64
from pkvm.arm64.smmu import (
    CLASS_IN,
    CR0_CMDQEN,
    CR0_EVENTQEN,
    CR0_SMMUEN,
    CR2_RECINVSID,
    EVENT1,
    EVENT1_READ,
    EVENT3_ADDRESS,
    EVENT_STREAM_SHIFT,
    GBPA_ABORT,
    QUEUE_INDEX,
    WINDOW_BYTES,
    EventId,
    Reg,
)
from pkvm.arm64.stage2 import ADDRESS_MASK
from pkvm.events import Recorder, SmmuEvent
from pkvm.machine.memory import BusError, DeviceWindow, PhysicalMemory
from pkvm.machine.smmu_queues import CommandQueue, EventQueue
from pkvm.machine.smmu_registers import Registers
from pkvm.machine.smmu_streams import (
    ABORTED,
    BYPASSED,
    EVENT_OF_FSC,
    StreamConfig,
    StreamFault,
    StreamMaster,
    StreamTable,
)
from pkvm.machine.stage2 import Access, Stage2Fault, leaf
from pkvm.machine.tlb import TlbEntry, TlbPair

_CMDQ_PROD, _CMDQ_CONS = int(Reg.CMDQ_PROD), int(Reg.CMDQ_CONS)
_TRANSLATION_EVENT = EVENT1.encode(S2=1, Class=CLASS_IN)


class DmaDevice(NamedTuple):
    """A DMA-capable device of a machine, as its boot firmware describes it."""

    name: str
    base: int
    """PA of its registers."""
    size: int
    """Bytes of them, whole pages."""
    stream: int
    """StreamID of its transactions."""


class Smmu:
    """The device at PA `base`. Safe for threads; `_lock` covers its state and each transaction."""

    def __init__(
        self, memory: PhysicalMemory, recorder: Recorder, *, base: int, name: str = "smmu"
    ) -> None:
        self.name = name
        self.window = DeviceWindow(name, base, WINDOW_BYTES, self._read, self._write)
        self.tlbs: dict[int, TlbPair] = {}
        """What is cached of translations, by VMID."""
        self._memory = memory
        self._recorder = recorder
        self._lock = threading.RLock()
        """Reentrant: a device may reach the SMMU's own registers."""
        self._take, self._drop = self._lock.acquire, self._lock.release
        self._registers = Registers()
        self._words = self._registers.words
        self._table = StreamTable(memory, self._registers)
        self._masters: dict[int, list[StreamMaster]] = {}
        self._commands = CommandQueue(memory, self._registers, self)
        self._ring = self._commands.ring
        self._events = EventQueue(memory, self._registers)

    def master(self, stream: int, name: str) -> StreamMaster:
        """A device's way to memory with this StreamID."""
        master = StreamMaster(self, self._memory, self._lock, stream, name)
        self._masters.setdefault(stream, []).append(master)
        return master

    def masters(self) -> list[StreamMaster]:
        """All devices, by rising StreamID."""
        return [master for stream in sorted(self._masters) for master in self._masters[stream]]

    def tlb_columns(self) -> dict[int, list[tuple[Access, int, list[int], list[int]]]]:
        """What is cached, by VMID, each as `TlbPair.columns`, for those who check it."""
        with self._lock:
            return {vmid: tlb.columns() for vmid, tlb in self.tlbs.items()}

    def tlb_entries(self) -> dict[str, list[TlbEntry]]:
        """The same one by one."""
        with self._lock:
            return {f"VMID {vmid} DMA": tlb.entries() for vmid, tlb in self.tlbs.items()}

    def holds(self, vmid: int, ipa: int) -> bool:
        """Whether a translation of `ipa` is cached for a VMID."""
        with self._lock:
            return vmid in self.tlbs and self.tlbs[vmid].holds(ipa)

    def stream_config(self, stream: int) -> StreamConfig:
        """What the SMMU does with a stream's transactions now."""
        with self._lock:
            return self._config(stream)

    # For its masters and its command queue

    def bind(self, master: StreamMaster) -> StreamConfig:
        """The configuration of a master's stream."""
        with self._lock:
            return self._config(master.stream)

    def tlb(self, vmid: int) -> TlbPair:
        """The translations of a VMID."""
        with self._lock:
            return self.tlbs.setdefault(vmid, TlbPair())

    def forget_streams(self, first: int, count: int, *, leaf: bool) -> None:
        """CFGI: drop what is cached of the configuration of these streams."""
        self._table.forget(first, count, leaf=leaf)
        for stream, masters in self._masters.items():
            if first <= stream < first + count:
                for master in masters:
                    master.unbind()

    def report(self, master: StreamMaster, fault: Stage2Fault) -> None:
        """Write the event record of a transaction that was aborted, if one is due."""
        with self._lock:
            event = self._event(fault, master.stream)
            if event is None:
                return
            kind, record = event
            self._events.put(record)
        self._recorder.record(
            SmmuEvent(master.stream, kind.name, fault.ipa & MASK64, fault.access.value)
        )

    def _config(self, stream: int) -> StreamConfig:
        if self._words[Reg.CR0] & CR0_SMMUEN:
            return self._table.config(stream)
        return ABORTED if self._words[Reg.GBPA] & GBPA_ABORT else BYPASSED

    def _event(
        self, fault: Stage2Fault, stream: int
    ) -> tuple[EventId, tuple[int, int, int, int]] | None:
        """Kind and words of the record of a fault; None if software does not want it."""
        where = 0
        if isinstance(fault, StreamFault):
            kind = fault.config.event
            if kind is None:
                return None
            if kind is EventId.C_BAD_STREAMID and not self._words[Reg.CR2] & CR2_RECINVSID:
                return None
            word1, where = 0, fault.config.fetched
        else:
            config = self._config(stream)
            if config.context is None or not config.records:
                return None
            word1 = _TRANSLATION_EVENT | (EVENT1_READ if fault.access is Access.READ else 0)
            kind, where = EVENT_OF_FSC[fault.fsc - fault.level], fault.ipa
            if kind is EventId.F_WALK_EABT:
                try:
                    where = leaf(self._memory, config.context, fault.ipa)[0] & ADDRESS_MASK
                except BusError:
                    where = config.context.root
        if fault.ipa > MASK64:
            kind, word1, where = EventId.F_UUT, 0, 0
        head = kind | stream << EVENT_STREAM_SHIFT
        return kind, (head, word1, fault.ipa & MASK64, where & EVENT3_ADDRESS)

    # Registers

    def _read(self, offset: int, size: int) -> int:
        if offset == _CMDQ_CONS and size == 4:
            return self._commands.cons  # what software polls
        with self._lock:
            self._commands.show()
            return self._registers.read(offset, size)

    def _write(self, offset: int, size: int, value: int) -> None:
        if offset == _CMDQ_PROD and size == 4:  # what software writes most
            self._take()
            try:
                self._ring(value & QUEUE_INDEX)
            finally:
                self._drop()
            return
        with self._lock:
            self._commands.show()
            before = self._words[Reg.CR0]
            written = self._registers.write(offset, size, value)
            if Reg.CR0 in written:
                self._switch(before ^ self._words[Reg.CR0])
            elif Reg.GBPA in written:
                self._unbind_all()
            elif Reg.CMDQ_PROD in written or Reg.CMDQ_CONS in written:
                self._commands.cons = self._words[_CMDQ_CONS]
                self._ring(self._words[_CMDQ_PROD])
            elif Reg.GERRORN in written:
                self._commands.resume()

    def _switch(self, changed: int) -> None:
        """CR0 was written; `changed` are the bits that differ from before."""
        enabled = self._words[Reg.CR0]
        if changed & CR0_SMMUEN:
            self._unbind_all()
        if changed & CR0_EVENTQEN:
            self._events.enable(bool(enabled & CR0_EVENTQEN))
        if changed & CR0_CMDQEN:
            self._commands.enable(bool(enabled & CR0_CMDQEN))

    def _unbind_all(self) -> None:
        for master in self.masters():
            master.unbind()
