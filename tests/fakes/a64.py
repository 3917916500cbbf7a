# SPDX-License-Identifier: GPL-2.0-or-later
"""A few A64 instructions as words (Arm ARM C6.2), for guests of a dozen instructions."""

from __future__ import annotations

from collections.abc import Iterable

from pkvm.arm64.registers import SysReg

HVC = 0xD400_0002
SMC = 0xD400_0003
WFI = 0xD503_207F
WFE = 0xD503_205F
ERET = 0xD69F_03E0
ISB = 0xD503_3FDF
NOP = 0xD503_201F
LOOP = 0x1400_0000
"""b . """
UDF = 0
LDP_X0_X1_X2 = 0xA940_0440
"""ldp x0, x1, [x2]: an access without a valid syndrome (ISV)."""
STP_X0_X1_X2 = 0xA900_0440
BRK = 0xD420_0000
PACGA_X5_X1_X2 = 0x9AC2_3025
CNTB_X5 = 0x0420_E3E5
"""SVE: count bytes of a vector."""
A32_LOOP = 0xEAFF_FFFE
A32_LDR_R0_R1 = 0xE591_0000
A32_SVC = 0xEF00_0000


def mov(rd: int, value: int) -> list[int]:
    """movz and three movk: always four instructions."""
    return [
        (0xF280_0000 if half else 0xD280_0000)
        | half << 21
        | (value >> 16 * half & 0xFFFF) << 5
        | rd
        for half in range(4)
    ]


def mrs(rt: int, register: SysReg) -> int:
    return 0xD520_0000 | _system(register) | rt


def msr(register: SysReg, rt: int) -> int:
    return 0xD500_0000 | _system(register) | rt


def system(register: SysReg, rt: int) -> int:
    """SYS (DC, TLBI, AT): op0 is 1."""
    return msr(register, rt)


def load(rt: int, rn: int, *, size: int, signed: bool = False, to_w: bool = False) -> int:
    """ldr of 1 << size bytes at [rn]; `signed` extends to 64 bits, or to 32 with `to_w`."""
    opc = (3 if to_w else 2) if signed else 1
    return size << 30 | 0x3900_0000 | opc << 22 | rn << 5 | rt


def store(rt: int, rn: int, *, size: int) -> int:
    return size << 30 | 0x3900_0000 | rn << 5 | rt


def br(rn: int) -> int:
    return 0xD61F_0000 | rn << 5


def move(rd: int, rm: int) -> int:
    """mov of X registers."""
    return 0xAA00_03E0 | rm << 16 | rd


def code(words: Iterable[int]) -> bytes:
    return b"".join(word.to_bytes(4, "little") for word in words)


def _system(register: SysReg) -> int:
    op0, op1, crn, crm, op2 = register
    return op0 << 19 | op1 << 16 | crn << 12 | crm << 8 | op2 << 5
