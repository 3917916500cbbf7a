# SPDX-License-Identifier: GPL-2.0-or-later
"""Stage-2 trees for tests, built bit by bit without the product's encoders."""

from __future__ import annotations

from hypothesis import strategies as st

from pkvm.machine.memory import PhysicalMemory
from pkvm.machine.stage2 import Stage2Context

RAM = 0x8000_0000
KIB4 = 0x1000
MIB2 = 0x20_0000
GIB1 = 0x4000_0000
PAGE_RWX = 0x7FF
PAGE_RO = 0x77F
PAGE_WO = 0x7BF
BLOCK_RWX = 0x7FD
XN = 2 << 53
VTCR_40 = 0x8002_3558
"""40-bit IPA, start level 1, 40-bit output."""
rubbish_word = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.builds(lambda page, low: RAM + page * KIB4 | low, st.integers(0, 15), st.integers(0, 4095)),
)
"""A table entry: any word at all, or one that leads to the first pages of RAM."""
SIZES = {1: GIB1, 2: MIB2, 3: KIB4}


class Tree:
    """A 40-bit tree with its two root tables at `root`; tables follow it in memory."""

    def __init__(self, memory: PhysicalMemory, root: int, vmid: int = 1) -> None:
        self.memory = memory
        self.root = root
        self.free = root + 2 * KIB4
        self.context = Stage2Context(root | vmid << 48, VTCR_40)

    def slot(self, ipa: int, level: int) -> int:
        """PA of the entry for `ipa` at `level`, making the tables on the way."""
        entry = self.root + (ipa >> 30) * 8
        for step in range(1, level):
            word = self.memory.read_u64(entry)
            if word & 3 != 3:
                word = self.free | 3
                self.free += KIB4
                self.memory.write_u64(entry, word)
            table = word & 0xFFFF_FFFF_F000
            entry = table + (ipa >> (30 - 9 * step) & 511) * 8
        return entry

    def put(self, ipa: int, level: int, descriptor: int) -> None:
        """Store a descriptor as the entry for `ipa` at `level`."""
        self.memory.write_u64(self.slot(ipa, level), descriptor)

    def page(self, ipa: int, pa: int, low: int = PAGE_RWX) -> None:
        """Map one 4 KiB page."""
        self.put(ipa, 3, pa | low)

    def block(self, ipa: int, pa: int, level: int = 2, low: int = BLOCK_RWX) -> None:
        """Map a 2 MiB (level 2) or 1 GiB (level 1) block."""
        self.put(ipa, level, pa | low)
