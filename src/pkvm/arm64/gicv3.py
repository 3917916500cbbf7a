# SPDX-License-Identifier: GPL-2.0-or-later
"""The GICv3's memory-mapped part, as data (GIC architecture, IHI 0069, 12.8-12.11).

Offsets of the distributor (GICD) and of a redistributor (GICR: the RD frame,
then the SGI frame), their fields, and the ranges of interrupt numbers. The CPU
interface is in `pkvm.arm64.gic`.
"""

from __future__ import annotations

from pkvm.arm64.bits import Field, Layout

# Interrupt numbers (INTIDs)
NR_SGIS = 16
NR_PRIVATE = 32
"""SGIs and PPIs: every CPU has its own."""
FIRST_SPI = 32
SPI_LIMIT = 1020
"""INTIDs from here to 1023 name no interrupt."""
VIRTUAL_TIMER_INTID = 27
PHYSICAL_TIMER_INTID = 30
"""Where the timers' outputs of EL1 usually are (Arm BSA, Linux's KVM)."""

FRAME_BYTES = 0x1_0000
DISTRIBUTOR_BYTES = FRAME_BYTES
REDISTRIBUTOR_BYTES = 2 * FRAME_BYTES
SGI_FRAME = FRAME_BYTES
"""Offset of the SGI frame in a redistributor."""

# GICD
GICD_CTLR = 0x0000
GICD_TYPER = 0x0004
GICD_IIDR = 0x0008
GICD_TYPER2 = 0x000C
GICD_STATUSR = 0x0010
GICD_IROUTER = 0x6000
"""From INTID 0 on, 8 bytes each; those below 32 do not exist."""
GICD_IROUTER_END = 0x8000

# GICD, and the SGI frame of GICR for the private interrupts
IGROUPR = 0x0080
ISENABLER = 0x0100
ICENABLER = 0x0180
ISPENDR = 0x0200
ICPENDR = 0x0280
ISACTIVER = 0x0300
ICACTIVER = 0x0380
IPRIORITYR = 0x0400
ITARGETSR = 0x0800
ICFGR = 0x0C00
IGRPMODR = 0x0D00
NSACR = 0x0E00
ITARGETSR_END = ICFGR
ICFGR_END = IGRPMODR

# GICR, RD frame
GICR_CTLR = 0x0000
GICR_IIDR = 0x0004
GICR_TYPER = 0x0008
GICR_STATUSR = 0x0010
GICR_WAKER = 0x0014
GICR_PROPBASER = 0x0070
GICR_PENDBASER = 0x0078
GICR_INVLPIR = 0x00A0
GICR_INVALLR = 0x00B0
GICR_SYNCR = 0x00C0

# Identification, in each frame
IDREGS = 0xFFD0
IDREGS_END = 0x1_0000
PIDR2 = 0xFFE8
PIDR2_GICV3 = 0x3B
"""ArchRev 3 in bits [7:4]."""

CTLR = Layout(
    "GICD_CTLR",
    Field("EnableGrp0", 0, 0),
    Field("EnableGrp1", 1, 1),
    Field("ARE", 4, 4),
    Field("DS", 6, 6),
    Field("RWP", 31, 31),
)
"""With DS set: one security state."""
CTLR_ENABLE_GROUP0 = CTLR["EnableGrp0"].mask
CTLR_ENABLE_GROUP1 = CTLR["EnableGrp1"].mask

TYPER = Layout(
    "GICD_TYPER",
    Field("ITLinesNumber", 4, 0),
    Field("MBIS", 16, 16),
    Field("LPIS", 17, 17),
    Field("IDbits", 23, 19),
    Field("A3V", 24, 24),
    Field("No1N", 25, 25),
)
"""There are 32 * (ITLinesNumber + 1) INTIDs, of IDbits + 1 bits."""

REDISTRIBUTOR_TYPER = Layout(
    "GICR_TYPER",
    Field("PLPIS", 0, 0),
    Field("Last", 4, 4),
    Field("Processor_Number", 23, 8),
    Field("Affinity_Value", 63, 32),
)
"""Last: no redistributor follows in the same run of frames."""
GICR_CTLR_CES = 1 << 1
GICR_CTLR_IR = 1 << 2

AFFINITY_MASK = 0xFF_FFFF
"""IROUTER's affinity, levels 2 to 0: affinity 3 is 0 here, and no interrupt is for any CPU."""


def sgi_targets(value: int) -> tuple[int, int]:
    """What an ICC_SGI*R `value` aims at: the affinity (MPIDR levels 2 to 1, level 0 zero) and the
    mask of CPUs by affinity 0, bit n for affinity 0 of 16 * RS + n."""
    level1 = value >> 16 & 0xFF
    level2 = value >> 32 & 0xFF
    selector = value >> 44 & 0xF
    return level2 << 16 | level1 << 8, (value & 0xFFFF) << 16 * selector
