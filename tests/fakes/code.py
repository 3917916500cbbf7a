# SPDX-License-Identifier: GPL-2.0-or-later
"""Small AArch64 payloads, entered by the firmware."""

from __future__ import annotations

import struct


def words(*instructions: int) -> bytes:
    return struct.pack(f"<{len(instructions)}I", *instructions)


def psci(function: int) -> bytes:
    """x0 = function; hvc #0; b ."""
    return words(
        0xD280_0000 | (function & 0xFFFF) << 5,  # movz x0, #low
        0xF2A0_0000 | (function >> 16) << 5,  # movk x0, #high, lsl #16
        0xD400_0002,
        0x1400_0000,
    )


POWER_OFF = psci(0x8400_0008)
RESET = psci(0x8400_0009)
SPIN = words(0x1400_0000)
