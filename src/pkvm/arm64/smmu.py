# SPDX-License-Identifier: GPL-2.0-or-later
"""SMMUv3 as data: registers, stream table, commands and events (Arm IHI 0070).

Only what stage-2 translation of the Non-secure state needs. Structures in memory
are arrays of little-endian 64-bit words; a `Layout` describes one of them.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from pkvm.arm64.bits import Field, Layout
from pkvm.arm64.stage2 import VTTBR_BADDR_MASK, VTTBR_VMID_SHIFT

WINDOW_BYTES = 0x2_0000
"""Register page 0 and page 1, 64 KiB each (IHI 0070 6.1)."""


class Reg(IntEnum):
    """Offsets of registers (IHI 0070 6.2)."""

    IDR0 = 0x00
    IDR1 = 0x04
    IDR2 = 0x08
    IDR3 = 0x0C
    IDR4 = 0x10
    IDR5 = 0x14
    IIDR = 0x18
    AIDR = 0x1C
    CR0 = 0x20
    CR0ACK = 0x24
    CR1 = 0x28
    CR2 = 0x2C
    GBPA = 0x44
    IRQ_CTRL = 0x50
    IRQ_CTRLACK = 0x54
    GERROR = 0x60
    GERRORN = 0x64
    STRTAB_BASE = 0x80
    STRTAB_BASE_CFG = 0x88
    CMDQ_BASE = 0x90
    CMDQ_PROD = 0x98
    CMDQ_CONS = 0x9C
    EVENTQ_BASE = 0xA0
    EVENTQ_PROD = 0x1_00A8
    EVENTQ_CONS = 0x1_00AC


IDR0 = Layout(
    "SMMU_IDR0",
    Field("S2P", 0, 0),
    Field("S1P", 1, 1),
    Field("TTF", 3, 2, {2: "AArch64"}),
    Field("COHACC", 4, 4),
    Field("VMID16", 18, 18),
    Field("TTENDIAN", 22, 21, {2: "little"}),
    Field("STALL_MODEL", 25, 24, {1: "terminate only"}),
    Field("ST_LEVEL", 28, 27, {1: "two-level"}),
)
IDR1 = Layout(
    "SMMU_IDR1",
    Field("SIDSIZE", 5, 0),
    Field("EVENTQS", 20, 16),
    Field("CMDQS", 25, 21),
)
IDR5 = Layout("SMMU_IDR5", Field("OAS", 2, 0), Field("GRAN4K", 4, 4))
CR0 = Layout("SMMU_CR0", Field("SMMUEN", 0, 0), Field("EVENTQEN", 2, 2), Field("CMDQEN", 3, 3))
CR0_SMMUEN = CR0["SMMUEN"].mask
CR0_EVENTQEN = CR0["EVENTQEN"].mask
CR0_CMDQEN = CR0["CMDQEN"].mask
CR2_RECINVSID = 1 << 1
"""Record C_BAD_STREAMID."""
GBPA_ABORT = 1 << 20
"""While the SMMU is off: transactions end in an abort; else they bypass it."""
GBPA_UPDATE = 1 << 31
IRQ_CTRL_GERROR = 1 << 0
IRQ_CTRL_EVENTQ = 1 << 2
GERROR_CMDQ_ERR = 1 << 0
GERROR_EVENTQ_ABT_ERR = 1 << 2

STRTAB_BASE_CFG = Layout(
    "SMMU_STRTAB_BASE_CFG",
    Field("LOG2SIZE", 5, 0),
    Field("SPLIT", 10, 6),
    Field("FMT", 17, 16, {0: "linear", 1: "two-level"}),
)
FMT_LINEAR = 0
FMT_TWO_LEVEL = 1
SPLITS = (6, 8, 10)
"""Values of STRTAB_BASE_CFG.SPLIT; any other counts as 6."""
TABLE_ADDRESS = 0x000F_FFFF_FFFF_FFC0
"""STRTAB_BASE.ADDR and L1STD.L2Ptr, bits [51:6]."""
QUEUE_ADDRESS = 0x000F_FFFF_FFFF_FFE0
"""CMDQ_BASE.ADDR and EVENTQ_BASE.ADDR, bits [51:5]."""
QUEUE_LOG2SIZE = 0x1F
QUEUE_INDEX = 0xF_FFFF
"""CMDQ_PROD.WR and its like: the index, and above it the wrap flag."""
CONS_ERR_SHIFT = 24
"""CMDQ_CONS.ERR."""
OVERFLOW = 1 << 31
"""EVENTQ_PROD.OVFLG and EVENTQ_CONS.OVACKFLG."""


class Writable(NamedTuple):
    """Of a 32-bit register: which bits software writes, and the CR0 bits that must be 0 then."""

    mask: int
    guard: int = 0


WRITABLE: dict[int, Writable] = {
    Reg.CR0: Writable(CR0_SMMUEN | CR0_EVENTQEN | CR0_CMDQEN),
    Reg.CR1: Writable(0xFFF),
    Reg.CR2: Writable(0x7, CR0_SMMUEN),
    Reg.GBPA: Writable(GBPA_ABORT),
    Reg.IRQ_CTRL: Writable(IRQ_CTRL_GERROR | IRQ_CTRL_EVENTQ),
    Reg.GERRORN: Writable(GERROR_CMDQ_ERR | GERROR_EVENTQ_ABT_ERR),
    Reg.STRTAB_BASE: Writable(TABLE_ADDRESS & 0xFFFF_FFFF, CR0_SMMUEN),
    Reg.STRTAB_BASE + 4: Writable(TABLE_ADDRESS >> 32, CR0_SMMUEN),
    Reg.STRTAB_BASE_CFG: Writable(0x3_07FF, CR0_SMMUEN),
    Reg.CMDQ_BASE: Writable((QUEUE_ADDRESS | QUEUE_LOG2SIZE) & 0xFFFF_FFFF, CR0_CMDQEN),
    Reg.CMDQ_BASE + 4: Writable(QUEUE_ADDRESS >> 32, CR0_CMDQEN),
    Reg.CMDQ_PROD: Writable(QUEUE_INDEX),
    Reg.CMDQ_CONS: Writable(QUEUE_INDEX, CR0_CMDQEN),
    Reg.EVENTQ_BASE: Writable((QUEUE_ADDRESS | QUEUE_LOG2SIZE) & 0xFFFF_FFFF, CR0_EVENTQEN),
    Reg.EVENTQ_BASE + 4: Writable(QUEUE_ADDRESS >> 32, CR0_EVENTQEN),
    Reg.EVENTQ_PROD: Writable(OVERFLOW | QUEUE_INDEX, CR0_EVENTQEN),
    Reg.EVENTQ_CONS: Writable(OVERFLOW | QUEUE_INDEX),
}
"""By offset; what is not here is read-only."""

# Stream table (IHI 0070 5.1, 5.2)

STE_BYTES = 64
STE_WORDS = STE_BYTES // 8
L1STD_BYTES = 8
L1STD = Layout("level 1 stream table descriptor", Field("Span", 4, 0), Field("L2Ptr", 51, 6))


class Config(IntEnum):
    """STE.Config; 0 to 3 abort."""

    ABORT = 0
    BYPASS = 4
    STAGE1 = 5
    STAGE2 = 6
    NESTED = 7


STE0 = Layout(
    "STE word 0",
    Field("V", 0, 0),
    Field("Config", 3, 1, {int(value): value.name for value in Config}),
)
STE2 = Layout(
    "STE word 2",
    Field("S2VMID", 15, 0),
    Field("S2T0SZ", 37, 32),
    Field("S2SL0", 39, 38),
    Field("S2IR0", 41, 40),
    Field("S2OR0", 43, 42),
    Field("S2SH0", 45, 44),
    Field("S2TG", 47, 46),
    Field("S2PS", 50, 48),
    Field("S2AA64", 51, 51),
    Field("S2ENDI", 52, 52),
    Field("S2AFFD", 53, 53),
    Field("S2PTW", 54, 54),
    Field("S2S", 57, 57),
    Field("S2R", 58, 58),
)
STE2_VTCR_SHIFT = 32
STE2_VTCR_MASK = 0x7_FFFF
"""S2T0SZ to S2PS have the places of VTCR_EL2's fields, T0SZ to PS."""
STE3_S2TTB = 0x000F_FFFF_FFFF_FFF0


def stage2_ste(vttbr: int, vtcr: int, *, records: bool = True) -> tuple[int, int, int, int]:
    """The first four words of an STE that translates by the tree of these register values, and
    maybe records its faults; the other four are 0."""
    return (
        STE0.encode(V=1, Config=Config.STAGE2),
        0,
        STE2.encode(S2VMID=vttbr >> VTTBR_VMID_SHIFT, S2AA64=1, S2PTW=1, S2R=int(records))
        | (vtcr & STE2_VTCR_MASK) << STE2_VTCR_SHIFT,
        vttbr & VTTBR_BADDR_MASK & STE3_S2TTB,
    )


ABORT_STE = (STE0.encode(V=1, Config=Config.ABORT), 0, 0, 0)
"""An STE that lets nothing through, and records nothing."""
BYPASS_STE = (STE0.encode(V=1, Config=Config.BYPASS), 0, 0, 0)
"""An STE that lets everything through."""

# Commands (IHI 0070 4)

COMMAND_BYTES = 16


class Command(IntEnum):
    """Opcodes, bits [7:0] of a command's first word."""

    PREFETCH_CONFIG = 0x01
    PREFETCH_ADDR = 0x02
    CFGI_STE = 0x03
    CFGI_STE_RANGE = 0x04
    TLBI_S12_VMALL = 0x28
    TLBI_S2_IPA = 0x2A
    TLBI_NSNH_ALL = 0x30
    SYNC = 0x46


COMMAND_OPCODE = 0xFF
COMMAND_STREAM_SHIFT = 32
"""StreamID of CFGI_STE and CFGI_STE_RANGE, in word 0."""
COMMAND_VMID_SHIFT = 32
COMMAND_VMID_MASK = 0xFFFF
"""VMID of TLBI commands, in word 0."""
CFGI_LEAF = 1
"""In word 1 of CFGI_STE: leave level 1 descriptors cached."""
CFGI_RANGE = 0x1F
"""In word 1 of CFGI_STE_RANGE: log2 of the number of streams, less 1; 31 is CFGI_ALL."""
TLBI_ADDRESS = 0xFFFF_FFFF_FFFF_F000
"""In word 1 of TLBI_S2_IPA."""
TLBI_LEAF = 1
SYNC_CS_SHIFT = 12
SYNC_CS_NONE = 0


class CommandError(IntEnum):
    """CMDQ_CONS.ERR."""

    NONE = 0
    ILL = 1
    ABT = 2


# Events (IHI 0070 7.3)

EVENT_BYTES = 32
EVENT_WORDS = EVENT_BYTES // 8


class EventId(IntEnum):
    """Bits [7:0] of an event record's first word."""

    F_UUT = 0x01
    C_BAD_STREAMID = 0x02
    F_STE_FETCH = 0x03
    C_BAD_STE = 0x04
    F_WALK_EABT = 0x0B
    F_TRANSLATION = 0x10
    F_ADDR_SIZE = 0x11
    F_ACCESS = 0x12
    F_PERMISSION = 0x13


EVENT_ID = 0xFF
EVENT_STREAM_SHIFT = 32
EVENT1 = Layout(
    "event record word 1",
    Field("PnU", 33, 33),
    Field("InD", 34, 34),
    Field("RnW", 35, 35),
    Field("S2", 39, 39),
    Field("Class", 41, 40, {0: "CD", 1: "TTD", 2: "IN"}),
)
EVENT1_READ = EVENT1["RnW"].mask
CLASS_TTD = 1
CLASS_IN = 2
EVENT3_ADDRESS = 0x000F_FFFF_FFFF_F000
"""IPA, or the address of the fetch."""
