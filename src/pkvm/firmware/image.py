# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest firmware image, as the host's boot firmware leaves it in memory.

For now the format is the plain one of the RFC: a flat binary, entered at its
first byte, MMU off, at the base of the firmware slot. It is placed at the start
of the reserved-memory region (compatible `linux,pkvm-guest-firmware-memory`),
and the region, rounded up to pages, is what INFO reports as `firmware_size`.
"""

from __future__ import annotations

from pkvm import guests

PAGE_SIZE = 4096
MAX_BYTES = 2 << 20
"""Largest image accepted: the firmware slot of our own VMM and of Android's is 2 MiB."""


class FirmwareImageError(ValueError):
    """The file cannot be a guest firmware image; the text says why and what to do."""


def builtin() -> bytes:
    """The firmware that ships with pkvm (sources in guests/firmware)."""
    return guests.image("firmware")


def check(image: bytes) -> bytes:
    """`image` itself if it can be a firmware image. Raises FirmwareImageError otherwise."""
    if not image:
        raise FirmwareImageError("the firmware image is empty; give a flat AArch64 binary")
    if len(image) > MAX_BYTES:
        raise FirmwareImageError(
            f"the firmware image has {len(image)} bytes; at most {MAX_BYTES} (2 MiB) fit its slot"
        )
    if image[:4] == b"\x7fELF":
        raise FirmwareImageError(
            "the firmware image is an ELF file; convert it: objcopy -O binary FILE FILE.bin"
        )
    return image


def region_bytes(image: bytes) -> int:
    """Bytes of the reserved-memory region that holds `image`: whole pages."""
    return -(-len(image) // PAGE_SIZE) * PAGE_SIZE
