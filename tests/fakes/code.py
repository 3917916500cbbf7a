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
ECHO = (
    words(
        0xD2A1_2001,  # movz x1, #0x900, lsl #16: the UART
        0x5280_07C3,  # mov w3, #'>'
        0xB900_0023,  # str w3, [x1]
        0xB940_1822,  # 1: ldr w2, [x1, #FR]
        0x3727_FFE2,  # tbnz w2, #RXFE, 1b
        0xB940_0023,  # ldr w3, [x1]
        0xB900_0023,  # str w3, [x1]
        0x7100_107F,  # cmp w3, #4
        0x54FF_FF61,  # b.ne 1b
    )
    + POWER_OFF
)
"""Prints '>' and then what the UART receives, up to Ctrl-D."""
