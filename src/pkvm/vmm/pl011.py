# SPDX-License-Identifier: GPL-2.0-or-later
"""PL011, Arm's UART (DDI 0183), revision r1p5: what the guest sends appears at once.

The transmitter is never busy, so its interrupt follows every character. The
receive timeout elapses at once: with any character in the FIFO its interrupt is
raised, whatever the trigger level. Both receive interrupts follow the FIFO's
level and cannot be lost by a write to ICR. There is no DMA.

Input waits at a `source` until the FIFO has room for it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from pkvm.vmm.irq import Line, NoLine
from pkvm.vmm.primecell import PrimeCell

DR, RSR, FR, ILPR, IBRD, FBRD, LCR_H, CR, IFLS, IMSC, RIS, MIS, ICR, DMACR = (
    0x000, 0x004, 0x018, 0x020, 0x024, 0x028, 0x02C, 0x030, 0x034, 0x038, 0x03C, 0x040, 0x044,
    0x048,
)  # fmt: skip
FR_RXFE = 1 << 4
FR_RXFF = 1 << 6
FR_TXFE = 1 << 7
LCR_H_FEN = 1 << 4
INT_RX = 1 << 4
INT_TX = 1 << 5
INT_RT = 1 << 6
FIFO_DEPTH = 32
"""Characters; one with the FIFOs disabled (LCR_H.FEN)."""

_TRIGGERS = (4, 8, 16, 24, 28, 28, 28, 28)
"""Characters that raise the receive interrupt, by IFLS.RXIFLSEL; the last three are reserved."""
_WRITABLE = {
    ILPR: 0xFF, IBRD: 0xFFFF, FBRD: 0x3F, LCR_H: 0xFF, CR: 0xFF87, IFLS: 0x3F, IMSC: 0x7FF,
}  # fmt: skip
"""Registers that hold what is written to them, and the bits that they have."""

_CHARACTERS = tuple(bytes((code,)) for code in range(256))


class Pl011(PrimeCell):
    """The device: `sink` gets each byte that the guest sends as it sends it, and `line` the
    interrupt. `source` has the input: called with the number of characters that there is room
    for, it returns as many or fewer, b"" if it has none. Whoever has new input calls `arrived`;
    without a line, `source` is also asked whenever the guest looks and none is left. With
    `hold_input` nothing arrives before the guest sets the line up (LCR_H) with a receive interrupt
    unmasked: what reaches Linux earlier, while it opens the port, it forgets."""

    def __init__(
        self,
        sink: Callable[[bytes], object],
        source: Callable[[int], bytes] | None = None,
        line: Line | None = None,
        *,
        hold_input: bool = False,
    ) -> None:
        super().__init__((0x11, 0x10, 0x34, 0x00))
        self._sink = sink
        self._source = source
        self._polled = line is None and source is not None
        self._line = NoLine() if line is None else line
        self._held_back = hold_input
        self._lock = threading.Lock()
        """Covers the FIFO and what the line was told: `arrived` comes from any thread."""
        self._fifo: deque[int] = deque()
        self._held = dict.fromkeys(_WRITABLE, 0) | {CR: 0x300, IFLS: 0x12}
        self._sent = 0
        """INT_TX if a character was sent since ICR cleared it."""

    def arrived(self) -> None:
        """There may be input at the source. Any thread may call it."""
        with self._lock:
            self._fill()
            self._drive()

    def write(self, offset: int, size: int, value: int) -> None:
        """`PrimeCell.write`, quick for what a guest does most: send one character after another."""
        if offset == DR and self._sent:
            self._sink(_CHARACTERS[value & 0xFF])
        else:
            super().write(offset, size, value)

    def _load(self, offset: int) -> int:
        if self._polled and not self._fifo and offset in (DR, FR, RIS, MIS):
            self.arrived()
        if offset == FR:
            level = len(self._fifo)
            if not level:
                return FR_TXFE | FR_RXFE
            return FR_TXFE | (FR_RXFF if level >= self._depth() else 0)
        if offset == DR:
            return self._receive()
        if offset == RIS:
            return self._raised()
        if offset == MIS:
            return self._raised() & self._held[IMSC]
        return self._held[offset] if offset in self._held else super()._load(offset)

    def _store(self, offset: int, value: int) -> None:
        if offset == DR:
            self._sink(_CHARACTERS[value & 0xFF])
            if not self._sent:
                self._sent = INT_TX
                self._redrive()
        elif offset == ICR:
            self._sent &= ~value
            self._redrive()
        elif offset in _WRITABLE:
            self._held[offset] = value & _WRITABLE[offset]
            if offset == LCR_H and self._held_back and self._held[IMSC] & (INT_RX | INT_RT):
                self._held_back = False
                self.arrived()
            elif offset in (IMSC, IFLS, LCR_H):
                self._redrive()

    def _receive(self) -> int:
        with self._lock:
            if not self._fifo:
                return 0
            character = self._fifo.popleft()
            if not self._fifo:
                self._fill()
            self._drive()
            return character

    def _fill(self) -> None:
        if self._held_back:
            return
        room = self._depth() - len(self._fifo)
        if self._source is not None and room > 0:
            self._fifo.extend(self._source(room))

    def _redrive(self) -> None:
        with self._lock:
            self._drive()

    def _drive(self) -> None:
        self._line.set(bool(self._raised() & self._held[IMSC]))

    def _depth(self) -> int:
        return FIFO_DEPTH if self._held[LCR_H] & LCR_H_FEN else 1

    def _raised(self) -> int:
        level = len(self._fifo)
        if not level:
            return self._sent
        if not self._held[LCR_H] & LCR_H_FEN:
            return self._sent | INT_RX
        full = level >= _TRIGGERS[self._held[IFLS] >> 3 & 7]
        return self._sent | INT_RT | (INT_RX if full else 0)
