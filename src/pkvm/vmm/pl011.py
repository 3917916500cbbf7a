# SPDX-License-Identifier: GPL-2.0-or-later
"""PL011, Arm's UART (DDI 0183), without its interrupt: what the guest sends appears at once.

Every access is defined. A register is 32 bits wide at an offset divisible by 4;
an access within those bytes reads or writes that part of it, what lies beyond
reads as zero and is not written. A write that does not start at the register's
first byte is ignored, as is every register that does not exist (RAZ/WI).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

DR, RSR, FR, ILPR, IBRD, FBRD, LCR_H, CR, IFLS, IMSC, RIS, MIS, ICR, DMACR = (
    0x000, 0x004, 0x018, 0x020, 0x024, 0x028, 0x02C, 0x030, 0x034, 0x038, 0x03C, 0x040, 0x044,
    0x048,
)  # fmt: skip
FR_RXFE = 1 << 4
FR_TXFE = 1 << 7
INT_RX = 1 << 4
INT_TX = 1 << 5

_IDENTIFICATION = {
    0xFE0 + 4 * n: value for n, value in enumerate((0x11, 0x10, 0x34, 0x00, 0x0D, 0xF0, 0x05, 0xB1))
}
"""UARTPeriphID0-3 (revision r1p5) and UARTPCellID0-3."""
_WRITABLE = {
    ILPR: 0xFF, IBRD: 0xFFFF, FBRD: 0x3F, LCR_H: 0xFF, CR: 0xFF87, IFLS: 0x3F, IMSC: 0x7FF,
    DMACR: 0x7,
}  # fmt: skip
"""Registers that hold what is written to them, and the bits that they have."""


class Pl011:
    """The device: `sink` gets each byte that the guest sends as it sends it; `source` is asked for
    input when the guest looks for some and none is left, and returns b"" when it has none."""

    def __init__(
        self, sink: Callable[[bytes], object], source: Callable[[], bytes] | None = None
    ) -> None:
        self._sink = sink
        self._source = source
        self._received: deque[int] = deque()
        self._held = dict.fromkeys(_WRITABLE, 0) | {CR: 0x300, IFLS: 0x12}
        self._sent_flag = 0

    def feed(self, data: bytes) -> None:
        """Let these bytes arrive at the receiver. Any thread may."""
        self._received.extend(data)

    def read(self, offset: int, size: int) -> int:
        """An access of `size` bytes at `offset` within the device's page."""
        byte = offset & 3
        width = 8 * min(size, 4 - byte)
        return self._register(offset & ~3) >> 8 * byte & (1 << width) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """A store of the low `size` bytes of `value` at `offset` within the device's page."""
        if offset & 3:
            return
        if offset == DR:
            self._sent_flag = INT_TX
            self._sink(bytes((value & 0xFF,)))
        elif offset == ICR:
            self._sent_flag &= ~value
        elif offset in _WRITABLE:
            self._held[offset] = value & _WRITABLE[offset] & (1 << 8 * size) - 1

    def _register(self, offset: int) -> int:
        if offset == DR:
            return self._received.popleft() if self._has_input() else 0
        if offset == FR:
            return FR_TXFE if self._has_input() else FR_TXFE | FR_RXFE
        if offset == RIS:
            return self._raised()
        if offset == MIS:
            return self._raised() & self._held[IMSC]
        if offset in _IDENTIFICATION:
            return _IDENTIFICATION[offset]
        return self._held.get(offset, 0)

    def _raised(self) -> int:
        return self._sent_flag | (INT_RX if self._has_input() else 0)

    def _has_input(self) -> bool:
        if not self._received and self._source is not None:
            self._received.extend(self._source())
        return bool(self._received)
