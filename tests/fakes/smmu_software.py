# SPDX-License-Identifier: GPL-2.0-or-later
"""Software that drives an SMMU bit by bit, without the product's encoders (Arm IHI 0070)."""

from __future__ import annotations

from typing import NamedTuple

from fakes.stage2_trees import RAM, Tree
from pkvm.events import Event
from pkvm.machine.memory import PhysicalMemory
from pkvm.machine.smmu import Smmu

BASE = 0x1100_0000
STRTAB = RAM + 0x10_0000
LEVEL2 = RAM + 0x11_0000
CMDQ = RAM + 0x12_0000
EVENTQ = RAM + 0x13_0000
CMDQ_BITS = 3
EVENTQ_BITS = 2
DATA = RAM + 0x20_0000
RAM_BYTES = 4 << 20

CR0, CR0ACK, GBPA = 0x20, 0x24, 0x44
GERROR, GERRORN = 0x60, 0x64
STRTAB_BASE, STRTAB_BASE_CFG = 0x80, 0x88
CMDQ_BASE, CMDQ_PROD, CMDQ_CONS = 0x90, 0x98, 0x9C
EVENTQ_BASE, EVENTQ_PROD, EVENTQ_CONS = 0xA0, 0x100A8, 0x100AC
SMMUEN, EVENTQEN, CMDQEN = 1, 4, 8
SYNC = (0x46, 0)


class SmmuRecord(NamedTuple):
    """An event record, taken apart."""

    kind: int
    stream: int
    word1: int
    address: int
    where: int


class Software:
    """Memory, an SMMU over it, and who programs it. Queues are small, so that they wrap."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.memory = PhysicalMemory(RAM, RAM_BYTES)
        self.smmu = Smmu(self.memory, self, base=BASE)
        self.memory.add_window(self.smmu.window)
        self.tree = Tree(self.memory, RAM, vmid=7)

    def record(self, event: Event) -> None:
        self.events.append(event)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        self.memory.write(BASE + offset, value.to_bytes(size, "little"))

    def read(self, offset: int, size: int = 4) -> int:
        return int.from_bytes(self.memory.read(BASE + offset, size), "little")

    def start(
        self, *, log2size: int = 4, split: int = 0, cr0: int = SMMUEN | EVENTQEN | CMDQEN
    ) -> None:
        """Set everything up and turn it on; with a `split` the stream table has two levels."""
        self.write(STRTAB_BASE, STRTAB, 8)
        self.write(STRTAB_BASE_CFG, log2size | split << 6 | bool(split) << 16)
        self.write(CMDQ_BASE, CMDQ | CMDQ_BITS, 8)
        self.write(EVENTQ_BASE, EVENTQ | EVENTQ_BITS, 8)
        self.write(0x2C, 2)  # CR2.RECINVSID
        self.write(CR0, cr0)
        assert self.read(CR0ACK) == cr0

    def ste(self, *words: int, stream: int = 1, table: int = STRTAB) -> None:
        """Write an STE, first words first."""
        for index, word in enumerate([*words, *[0] * (8 - len(words))]):
            self.memory.write_u64(table + stream * 64 + index * 8, word)

    def translate(self, stream: int = 1, *, table: int = STRTAB, records: bool = True) -> None:
        """An STE that translates by `tree`."""
        self.ste(*translating(self.tree.context.root, records=records), stream=stream, table=table)

    def command(self, *words: tuple[int, int]) -> int:
        """Queue commands and ring; CMDQ_CONS after it."""
        for first, second in words:
            prod = self.read(CMDQ_PROD)
            at = CMDQ + (prod & (1 << CMDQ_BITS) - 1) * 16
            self.memory.write_u64(at, first)
            self.memory.write_u64(at + 8, second)
            self.write(CMDQ_PROD, prod + 1 & (2 << CMDQ_BITS) - 1)
        return self.read(CMDQ_CONS)

    def tlbi_ipa(self, ipa: int, vmid: int = 7) -> None:
        self.command((0x2A | vmid << 32, ipa), SYNC)

    def cfgi(self, stream: int = 1, *, leaf: bool = True) -> None:
        self.command((0x03 | stream << 32, int(leaf)), SYNC)

    def taken(self) -> list[SmmuRecord]:
        """Events in the queue, taken out of it."""
        found = []
        cons, prod = self.read(EVENTQ_CONS), self.read(EVENTQ_PROD)
        while (cons ^ prod) & (2 << EVENTQ_BITS) - 1:
            at = EVENTQ + (cons & (1 << EVENTQ_BITS) - 1) * 32
            w = [self.memory.read_u64(at + 8 * index) for index in range(4)]
            found.append(SmmuRecord(w[0] & 0xFF, w[0] >> 32, w[1], w[2], w[3]))
            cons = cons + 1 & (2 << EVENTQ_BITS) - 1
        self.write(EVENTQ_CONS, cons | prod & 1 << 31)
        return found


def translating(root: int, *, vmid: int = 7, records: bool = True) -> tuple[int, int, int, int]:
    """The words of an STE for a 40-bit tree with two root tables."""
    vtcr = 24 | 1 << 6 | 1 << 8 | 1 << 10 | 3 << 12 | 2 << 16
    return 1 | 6 << 1, 0, vmid | vtcr << 32 | 1 << 51 | records << 58, root
