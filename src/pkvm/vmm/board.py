# SPDX-License-Identifier: GPL-2.0-or-later
"""The board that the guest sees: intermediate physical addresses (IPA) and sizes in bytes.

RAM and PL011 stand where QEMU's `virt` machine has them.
"""

from __future__ import annotations

from dataclasses import dataclass

from pkvm.vmm.errors import LoadError

PAGE_SIZE = 4096

FIRMWARE_BASE = 0x0000_0000
FIRMWARE_BYTES = 2 << 20
FIRMWARE_SLOT = 1
UART_BASE = 0x0900_0000
MAILBOX_BASE = 0x0B00_0000
DEVICE_BYTES = 0x1000
"""Every device has one page of registers."""

RAM_BASE = 0x4000_0000
RAM_SLOT = 0
DTB_BASE = RAM_BASE
DTB_BYTES = 2 << 20
"""Room for the device tree, at the start of RAM. No image may use it."""
IMAGE_BASE = RAM_BASE + DTB_BYTES
"""Where a flat image is loaded and entered."""

IPA_BITS = 40
MIN_RAM_BYTES = 4 << 20
DEFAULT_RAM_BYTES = 16 << 20
MAX_RAM_BYTES = (1 << IPA_BITS) - RAM_BASE
MAX_VCPUS = 8


@dataclass(frozen=True, slots=True)
class Board:
    """What can be chosen about a board. Raises LoadError for what cannot be."""

    ram_bytes: int = DEFAULT_RAM_BYTES
    cpus: int = 1
    command_line: str = ""

    def __post_init__(self) -> None:
        if not MIN_RAM_BYTES <= self.ram_bytes <= MAX_RAM_BYTES:
            raise LoadError(
                f"a guest with {self.ram_bytes} bytes of memory cannot be: choose between "
                f"{MIN_RAM_BYTES >> 20}M and {MAX_RAM_BYTES >> 30}G"
            )
        if self.ram_bytes % PAGE_SIZE:
            raise LoadError(
                f"{self.ram_bytes} bytes of memory are not whole pages: choose a multiple of 4K"
            )
        if not 1 <= self.cpus <= MAX_VCPUS:
            raise LoadError(f"a guest with {self.cpus} CPUs cannot be: choose 1 to {MAX_VCPUS}")
        if "\0" in self.command_line or len(self.command_line.encode()) > 4096:
            raise LoadError("the command line has a NUL, or more than 4096 bytes")

    @property
    def ram_end(self) -> int:
        """IPA behind the last byte of RAM."""
        return RAM_BASE + self.ram_bytes
