# SPDX-License-Identifier: GPL-2.0-or-later
"""The SMMU's registers as storage: who may write what, and when (Arm IHI 0070, 6.2, 6.3).

64-bit registers are kept as two words and may be reached as such. An access that
is not of an aligned word or doubleword reads as zero and is ignored.
"""

from __future__ import annotations

from pkvm.arm64.smmu import (
    GBPA_ABORT,
    GBPA_UPDATE,
    IDR0,
    IDR1,
    IDR5,
    QUEUE_LOG2SIZE,
    WRITABLE,
    Reg,
)
from pkvm.machine.memory import PhysicalMemory

SID_BITS = 16
QUEUE_BITS = 8
"""log2 of the most entries that a queue can have."""
OAS = 2
"""Physical addresses have 40 bits, as ID_AA64MMFR0_EL1.PARange says it."""

_IDENTITY: dict[int, int] = {
    Reg.IDR0: IDR0.encode(S2P=1, TTF=2, COHACC=1, VMID16=1, TTENDIAN=2, STALL_MODEL=1, ST_LEVEL=1),
    Reg.IDR1: IDR1.encode(SIDSIZE=SID_BITS, EVENTQS=QUEUE_BITS, CMDQS=QUEUE_BITS),
    Reg.IDR5: IDR5.encode(OAS=OAS, GRAN4K=1),
    Reg.IIDR: 0,
    Reg.AIDR: 0x01,
}
_ACKNOWLEDGE = {Reg.CR0: Reg.CR0ACK, Reg.IRQ_CTRL: Reg.IRQ_CTRLACK}


class Registers:
    """Words by offset. At reset everything is off, and GBPA aborts."""

    def __init__(self) -> None:
        self.words: dict[int, int] = {**dict.fromkeys(Reg, 0), **dict.fromkeys(WRITABLE, 0)}
        self.words.update(_IDENTITY)
        self.words[Reg.GBPA] = GBPA_ABORT

    def read(self, offset: int, size: int) -> int:
        """A word (4 bytes) or doubleword (8 bytes) at `offset`."""
        if size not in (4, 8) or offset % size:
            return 0
        words = self.words
        low = words.get(offset, 0)
        return low if size == 4 else low | words.get(offset + 4, 0) << 32

    def write(self, offset: int, size: int, value: int) -> list[int]:
        """Store what software may write there now. Returns the offsets of the words stored."""
        if size not in (4, 8) or offset % size:
            return []
        parts = [(offset, value & 0xFFFF_FFFF)]
        if size == 8:
            parts.append((offset + 4, value >> 32))
        return [at for at, part in parts if self._store(at, part)]

    def _store(self, offset: int, value: int) -> bool:
        rule = WRITABLE.get(offset)
        words = self.words
        if rule is None or words[Reg.CR0] & rule.guard:
            return False
        if offset == Reg.GBPA and not value & GBPA_UPDATE:
            return False
        words[offset] = value & rule.mask
        if offset in _ACKNOWLEDGE:
            words[_ACKNOWLEDGE[Reg(offset)]] = words[offset]
        return True

    def raise_error(self, error: int) -> None:
        """Make a global error active: GERROR and GERRORN differ in its bit."""
        if not self.active_errors & error:
            self.words[Reg.GERROR] ^= error

    @property
    def active_errors(self) -> int:
        """Global errors that software has not acknowledged."""
        return self.words[Reg.GERROR] ^ self.words[Reg.GERRORN]


class QueueArea:
    """Where a queue lies, as its BASE register says: `entry_bytes` for each of 2^LOG2SIZE entries,
    at most 2^QUEUE_BITS, and aligned to all of it or to 32 bytes."""

    def __init__(
        self, memory: PhysicalMemory, base: int, address_mask: int, entry_bytes: int
    ) -> None:
        bits = min(base & QUEUE_LOG2SIZE, QUEUE_BITS)
        nbytes = entry_bytes << bits
        self.pa = base & address_mask & -max(nbytes, 32)
        self.mask = (1 << bits) - 1
        """Of an index, without the wrap flag."""
        self.wrap = (2 << bits) - 1
        """Of an index with it."""
        self.first: int | None = None
        """Index in `memory.words` of the first entry; None if that is not RAM."""
        if memory.is_ram(self.pa, nbytes):
            self.first = (self.pa - memory.ram_base) >> 3
