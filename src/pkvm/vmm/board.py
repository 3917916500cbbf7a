# SPDX-License-Identifier: GPL-2.0-or-later
"""The board that the guest sees: intermediate physical addresses (IPA), sizes in bytes, SPIs.

What QEMU's `virt` machine has too stands where it has it, so that software made
for that machine runs here: RAM, PL011, PL031, GICv3, virtio-mmio.
"""

from __future__ import annotations

from dataclasses import dataclass

from pkvm.vmm.errors import LoadError

PAGE_SIZE = 4096

FIRMWARE_BASE = 0x0000_0000
FIRMWARE_BYTES = 2 << 20
FIRMWARE_SLOT = 1
GICD_BASE = 0x0800_0000
GICD_BYTES = 0x1_0000
"""The interrupt controller's distributor."""
GICR_BASE = 0x080A_0000
GICR_BYTES = 0x2_0000
"""Its redistributors: one of these for each CPU."""
UART_BASE = 0x0900_0000
UART_SPI = 1
RTC_BASE = 0x0901_0000
RTC_SPI = 2
VIRTIO_BASE = 0x0A00_0000
VIRTIO_STRIDE = 0x200
"""Each virtio-mmio slot has this many bytes of registers, one behind the other."""
VIRTIO_SLOTS = 32
VIRTIO_SPI = 16
"""SPI of slot 0; slot n has VIRTIO_SPI + n."""
MAILBOX_BASE = 0x0B00_0000
DEVICE_BYTES = 0x1000
"""Every device but virtio-mmio and the interrupt controller has one page of registers."""

RAM_BASE = 0x4000_0000
RAM_SLOT = 0
DTB_BASE = RAM_BASE
DTB_BYTES = 2 << 20
"""Room for the device tree, at the start of RAM. No image may use it."""
IMAGE_BASE = RAM_BASE + DTB_BYTES
"""Where a flat image is loaded and entered; a kernel goes text_offset above it."""

IPA_BITS = 40
MIN_RAM_BYTES = 4 << 20
DEFAULT_RAM_BYTES = 16 << 20
LINUX_RAM_BYTES = 256 << 20
"""The default where a kernel boots."""
MAX_RAM_BYTES = (1 << IPA_BITS) - RAM_BASE
MAX_VCPUS = 8
MIN_BOUNCE_BYTES = 1 << 20
SEED_LIMIT = 256


@dataclass(frozen=True, slots=True)
class Board:
    """What can be chosen about a board. Raises LoadError for what cannot be."""

    ram_bytes: int = DEFAULT_RAM_BYTES
    cpus: int = 1
    command_line: str = ""
    gic: bool = False
    """Whether there are a GICv3, the timers' interrupts, the devices' interrupts, and the real-time
    clock. Without it a board has what a bare program needs."""
    virtio_slots: tuple[int, ...] = ()
    """Numbers of the virtio-mmio slots that have a device; they need the GIC."""
    bounce_bytes: int = 0
    """Size of the pool at the end of RAM through which a guest passes what its virtio devices are
    to see (`restricted-dma-pool`); 0 for none. A multiple of a page."""
    rng_seed: bytes = b""
    """Entropy for the guest's random number generator (`rng-seed`); b"" for none."""
    kaslr_seed: int | None = None
    """64 bits that choose where the kernel puts itself; None leaves it where it is linked."""

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
        try:
            line = self.command_line.encode()
        except UnicodeEncodeError:
            raise LoadError("the command line is not text in UTF-8") from None
        if b"\0" in line or len(line) > 4096:
            raise LoadError("the command line has a NUL, or more than 4096 bytes")
        self._check_devices()
        if len(self.rng_seed) > SEED_LIMIT:
            raise LoadError(f"an rng-seed of more than {SEED_LIMIT} bytes cannot be used")

    def _check_devices(self) -> None:
        slots = self.virtio_slots
        if len(set(slots)) != len(slots) or not all(0 <= n < VIRTIO_SLOTS for n in slots):
            raise LoadError(f"a board has {VIRTIO_SLOTS} virtio slots, for one device each")
        if slots and not self.gic:
            raise LoadError("virtio devices need the board's interrupt controller: add --gic")
        bounce = self.bounce_bytes
        room = self.ram_bytes - DTB_BYTES - MIN_BOUNCE_BYTES
        if bounce and not (MIN_BOUNCE_BYTES <= bounce <= room and bounce % PAGE_SIZE == 0):
            raise LoadError(
                f"a bounce pool of {bounce} bytes cannot be: choose a multiple of 4K from "
                f"{MIN_BOUNCE_BYTES >> 20}M up, and less than the guest's memory"
            )

    @property
    def ram_end(self) -> int:
        """IPA behind the last byte of RAM."""
        return RAM_BASE + self.ram_bytes

    @property
    def bounce_base(self) -> int:
        """IPA of the bounce pool: the end of what images may use."""
        return self.ram_end - self.bounce_bytes


def virtio_base(slot: int) -> int:
    """IPA of the registers of virtio-mmio slot `slot`."""
    return VIRTIO_BASE + slot * VIRTIO_STRIDE


def virtio_spi(slot: int) -> int:
    """SPI of virtio-mmio slot `slot`."""
    return VIRTIO_SPI + slot
