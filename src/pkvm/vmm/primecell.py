# SPDX-License-Identifier: GPL-2.0-or-later
"""What Arm's PrimeCell peripherals have in common: 32-bit registers and identification.

Every access is defined. A register is 32 bits wide at an offset divisible by 4;
an access within those bytes reads or writes that part of it, what lies beyond
reads as zero and is not written. A write that does not start at the register's
first byte is ignored, as is every register that does not exist (RAZ/WI).
"""

from __future__ import annotations

PERIPHERAL_ID_AT = 0xFE0
CELL_ID = (0x0D, 0xF0, 0x05, 0xB1)


class PrimeCell:
    """Base of a device: `peripheral_id` is the four registers PeriphID0-3. A subclass
    has the other registers."""

    def __init__(self, peripheral_id: tuple[int, int, int, int]) -> None:
        self._identification = {
            PERIPHERAL_ID_AT + 4 * n: value for n, value in enumerate((*peripheral_id, *CELL_ID))
        }

    def read(self, offset: int, size: int) -> int:
        """An access of `size` bytes at `offset` within the device's page."""
        byte = offset & 3
        width = 8 * min(size, 4 - byte)
        return self._load(offset & ~3) >> 8 * byte & (1 << width) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """A store of the low `size` bytes of `value` at `offset` within the device's page."""
        if offset & 3 == 0:
            self._store(offset, value & (1 << 8 * min(size, 4)) - 1)

    def _load(self, offset: int) -> int:
        """The register at `offset`, a multiple of 4."""
        return self._identification.get(offset, 0)

    def _store(self, offset: int, value: int) -> None:
        """Write the register at `offset`."""
