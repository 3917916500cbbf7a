# SPDX-License-Identifier: GPL-2.0-or-later
"""Streams: what the stream table says of a device, and the device's way to memory by it.

The table is walked in physical memory as software left it (Arm IHI 0070, 3.3,
5.2). What was read is kept, valid or not, until a CFGI command names it. Stage 1
is not there: an STE that asks for it is illegal, and S2AFFD counts as 0.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from pkvm.arm64.esr import (
    FSC_ACCESS_FLAG,
    FSC_ADDRESS_SIZE,
    FSC_EXTERNAL_ON_WALK,
    FSC_PERMISSION,
    FSC_TRANSLATION,
)
from pkvm.arm64.smmu import (
    FMT_TWO_LEVEL,
    L1STD,
    L1STD_BYTES,
    SPLITS,
    STE0,
    STE2,
    STE2_VTCR_MASK,
    STE2_VTCR_SHIFT,
    STE3_S2TTB,
    STE_BYTES,
    STRTAB_BASE_CFG,
    TABLE_ADDRESS,
    Config,
    EventId,
    Reg,
)
from pkvm.arm64.stage2 import PARANGE_BITS, VTCR, VTTBR_VMID_SHIFT
from pkvm.machine.bus import Master
from pkvm.machine.memory import PhysicalMemory
from pkvm.machine.smmu_registers import OAS, SID_BITS, Registers
from pkvm.machine.stage2 import Access, Stage2Context, Stage2Fault
from pkvm.machine.tlb import TlbPair

EVENT_OF_FSC = {
    FSC_ADDRESS_SIZE: EventId.F_ADDR_SIZE,
    FSC_TRANSLATION: EventId.F_TRANSLATION,
    FSC_ACCESS_FLAG: EventId.F_ACCESS,
    FSC_PERMISSION: EventId.F_PERMISSION,
    FSC_EXTERNAL_ON_WALK: EventId.F_WALK_EABT,
}


class StreamConfig(NamedTuple):
    """What is done with a stream's transactions."""

    context: Stage2Context | None = None
    """Translate by this tree."""
    bypass: bool = False
    """Let them through as they are."""
    event: EventId | None = None
    """Abort, and report this."""
    fetched: int = 0
    """PA that could not be fetched, of F_STE_FETCH."""
    records: bool = False
    """Faults of the translation are reported (STE.S2R)."""


ABORTED = StreamConfig()
"""Abort, and report nothing."""
BYPASSED = StreamConfig(bypass=True)


class StreamFault(Stage2Fault):
    """A transaction that its stream's configuration does not let through."""

    def __init__(self, ipa: int, access: Access, stream: int, config: StreamConfig) -> None:
        super().__init__(ipa, access, 0, FSC_TRANSLATION)
        self.stream = stream
        self.config = config

    @property
    def words(self) -> str:
        """What the SMMU says of the stream."""
        event = self.config.event
        return f"stream {self.stream:#x} {'is blocked' if event is None else event.name}"


class StreamTable:
    """The table that STRTAB_BASE names, and what is cached of it. Called with the SMMU's lock."""

    def __init__(self, memory: PhysicalMemory, registers: Registers) -> None:
        self._memory = memory
        self._registers = registers
        self._configs: dict[int, StreamConfig] = {}
        self._level1: dict[int, int] = {}

    def config(self, stream: int) -> StreamConfig:
        """What the table says of a stream, from the cache if it is there. Whatever is in memory,
        there is an answer."""
        config = self._configs.get(stream)
        if config is not None:
            return config
        found = self._find(stream)
        if isinstance(found, StreamConfig):
            return found
        if not self._memory.is_ram(found, STE_BYTES):
            return StreamConfig(event=EventId.F_STE_FETCH, fetched=found)
        first = (found - self._memory.ram_base) >> 3
        config = decode(*self._memory.words[first : first + 4].tolist())
        self._configs[stream] = config
        return config

    def forget(self, first: int, count: int, *, leaf: bool) -> None:
        """Drop what is cached of these streams; without `leaf`, level 1 too."""
        for stream in [one for one in self._configs if first <= one < first + count]:
            del self._configs[stream]
        if not leaf:
            split = self._split
            for at in [at for at in self._level1 if first >> split <= at <= first + count >> split]:
                del self._level1[at]

    @property
    def _split(self) -> int:
        split = STRTAB_BASE_CFG["SPLIT"].get(self._registers.words[Reg.STRTAB_BASE_CFG])
        return split if split in SPLITS else SPLITS[0]

    def _find(self, stream: int) -> int | StreamConfig:
        """PA of a stream's STE, or why there is none."""
        out_of_range = StreamConfig(event=EventId.C_BAD_STREAMID)
        layout = STRTAB_BASE_CFG.decode(self._registers.words[Reg.STRTAB_BASE_CFG])
        bits = min(layout["LOG2SIZE"], SID_BITS)
        if stream >> bits:
            return out_of_range
        base = self._registers.read(Reg.STRTAB_BASE, 8) & TABLE_ADDRESS
        if layout["FMT"] != FMT_TWO_LEVEL:
            return (base & -(STE_BYTES << bits)) + stream * STE_BYTES
        split = self._split
        index = stream >> split
        entry = self._level1.get(index)
        if entry is None:
            at = (base & -max(L1STD_BYTES << max(bits - split, 0), 64)) + index * L1STD_BYTES
            if not self._memory.is_ram(at, L1STD_BYTES):
                return StreamConfig(event=EventId.F_STE_FETCH, fetched=at)
            entry = self._level1[index] = self._memory.read_u64(at)
        span = L1STD["Span"].get(entry)
        low = stream & (1 << split) - 1
        if not 0 < span <= split + 1 or low >> span - 1:
            return out_of_range
        return (entry & TABLE_ADDRESS & -(STE_BYTES << span - 1)) + low * STE_BYTES


def decode(word0: int, word1: int, word2: int, word3: int) -> StreamConfig:
    """What an STE's first four words ask for; C_BAD_STE if they are illegal (IHI 0070 5.5)."""
    illegal = StreamConfig(event=EventId.C_BAD_STE)
    head = STE0.decode(word0)
    if not head["V"]:
        return illegal
    if head["Config"] < Config.BYPASS:
        return ABORTED
    if head["Config"] == Config.BYPASS:
        return BYPASSED
    second = STE2.decode(word2)
    if (
        head["Config"] != Config.STAGE2
        or not second["S2AA64"]
        or second["S2ENDI"]
        or second["S2S"]
        or (word3 & STE3_S2TTB) >> PARANGE_BITS[OAS]
    ):
        return illegal
    vtcr = word2 >> STE2_VTCR_SHIFT & STE2_VTCR_MASK
    if second["S2PS"] > OAS:
        vtcr = vtcr & ~VTCR["PS"].mask | VTCR["PS"].put(OAS)
    vttbr = word3 & STE3_S2TTB | second["S2VMID"] << VTTBR_VMID_SHIFT
    context = Stage2Context(vttbr, vtcr)
    if context.refusal is not None:
        return illegal
    return StreamConfig(context=context, records=bool(second["S2R"]))


class Translations(Protocol):
    """The SMMU, to a master behind it. Both are called with its lock held or not."""

    def bind(self, master: StreamMaster) -> StreamConfig:
        """The configuration that a stream's transactions have now."""
        ...

    def report(self, master: StreamMaster, fault: Stage2Fault) -> None:
        """A transaction was aborted."""
        ...

    def tlb(self, vmid: int) -> TlbPair:
        """The translations of a VMID."""
        ...


class StreamMaster(Master):
    """A device's way to memory: its transactions carry a StreamID.

    Bound to a configuration at the first transaction, and again after `unbind`. The TLB is the
    SMMU's, common to all streams with that VMID.
    """

    def __init__(
        self,
        smmu: Translations,
        memory: PhysicalMemory,
        lock: AbstractContextManager[object],
        stream: int,
        name: str,
    ) -> None:
        super().__init__(memory, name, lock)
        self.stream = stream
        self._smmu = smmu
        self._config: StreamConfig | None = None

    def unbind(self) -> None:
        """Look at the configuration again. Called with the lock held."""
        self._config = None
        self._context = None
        self._use(TlbPair())

    def _locate(self, ipa: int, length: int, access: Access) -> tuple[int, int]:
        config = self._config
        if config is None:
            config = self._bind()
        if config.context is None and not config.bypass:
            raise StreamFault(ipa, access, self.stream, config)
        return super()._locate(ipa, length, access)

    def _bind(self) -> StreamConfig:
        config = self._smmu.bind(self)
        if config.event in (EventId.C_BAD_STREAMID, EventId.F_STE_FETCH):
            return config  # nothing was read, so there is nothing to keep
        self._config = config
        self._context = config.context
        if config.context is not None:
            self._use(self._smmu.tlb(config.context.vmid))
        return config

    def _refused(self, fault: Stage2Fault, retries: int) -> None:
        """Tell software, and end the transaction."""
        self._smmu.report(self, fault)
        raise fault
