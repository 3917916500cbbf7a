# SPDX-License-Identifier: GPL-2.0-or-later
"""The virtual CPU interface of a GICv3, as data (GIC architecture, IHI 0069, 12.4).

EL2 sees it as the ICH_*_EL2 registers: list registers, each holding one virtual
interrupt; a guest sees it as ICC_*_EL1 (named ICV_* in the manual). Of what the
architecture leaves open, the machine has: 4 list registers, 5 bits of priority
and as many of preemption, INTIDs of 16 bits, affinity 3 always 0.
"""

from __future__ import annotations

from pkvm.arm64.bits import Field, Layout

LIST_REGISTERS = 4
PRIORITY_BITS = 5
PRIORITY_MASK = 0xFF & ~((1 << 8 - PRIORITY_BITS) - 1)
"""The implemented bits of an 8-bit priority; 0 is the highest."""
IDLE_PRIORITY = 0xFF
"""The running priority while no interrupt is active."""
INTID_MASK = 0xFFFF
SPURIOUS = 1023
FIRST_SPECIAL = 1020
"""INTIDs from here to 1023 name no interrupt."""
FIRST_LPI = 8192
"""INTIDs from here on are LPIs, which have no active state."""

# ICH_LR<n>_EL2
LR = Layout(
    "ICH_LR_EL2",
    Field("State", 63, 62, {1: "pending", 2: "active", 3: "pending and active"}),
    Field("HW", 61, 61),
    Field("Group", 60, 60),
    Field("Priority", 55, 48),
    Field("pINTID", 44, 32),
    Field("vINTID", 31, 0),
)
LR_PENDING = 1 << 62
LR_ACTIVE = 1 << 63
LR_STATE = LR_PENDING | LR_ACTIVE
LR_HW = LR["HW"].mask
LR_GROUP1 = LR["Group"].mask
LR_PRIORITY_SHIFT = 48
LR_EOI = 1 << 41
"""With HW clear: a maintenance interrupt when the interrupt is deactivated."""
LR_PINTID = LR["pINTID"].mask
LR_VINTID = LR["vINTID"].mask

# ICH_HCR_EL2
HCR_EN = 1 << 0
HCR_UIE = 1 << 1
HCR_LRENPIE = 1 << 2
HCR_NPIE = 1 << 3
HCR_VGRP0EIE = 1 << 4
HCR_VGRP0DIE = 1 << 5
HCR_VGRP1EIE = 1 << 6
HCR_VGRP1DIE = 1 << 7
HCR_MAINTENANCE = 0xFE
"""Every enable of a maintenance interrupt but the list registers' own."""
HCR_EOICOUNT_SHIFT = 27
HCR_EOICOUNT = 0x1F << HCR_EOICOUNT_SHIFT

# ICH_MISR_EL2: why a maintenance interrupt is asserted
MISR_EOI = 1 << 0
MISR_U = 1 << 1
MISR_LRENP = 1 << 2
MISR_NP = 1 << 3
MISR_VGRP0E = 1 << 4
MISR_VGRP0D = 1 << 5
MISR_VGRP1E = 1 << 6
MISR_VGRP1D = 1 << 7

VMCR = Layout(
    "ICH_VMCR_EL2",
    Field("VENG0", 0, 0),
    Field("VENG1", 1, 1),
    Field("VFIQEn", 3, 3),
    Field("VCBPR", 4, 4),
    Field("VEOIM", 9, 9),
    Field("VBPR1", 20, 18),
    Field("VBPR0", 23, 21),
    Field("VPMR", 31, 24),
)
BPR0_MINIMUM = 7 - PRIORITY_BITS
BPR1_MINIMUM = BPR0_MINIMUM + 1

VTR = Layout(
    "ICH_VTR_EL2",
    Field("ListRegs", 4, 0),
    Field("TDS", 19, 19),
    Field("nV4", 20, 20),
    Field("A3V", 21, 21),
    Field("SEIS", 22, 22),
    Field("IDbits", 25, 23, {0: "16", 1: "24"}),
    Field("PREbits", 28, 26),
    Field("PRIbits", 31, 29),
)
VTR_VALUE = VTR.encode(
    ListRegs=LIST_REGISTERS - 1, nV4=1, PREbits=PRIORITY_BITS - 1, PRIbits=PRIORITY_BITS - 1
)
"""ICH_VTR_EL2 of the machine; counts are less one."""

# ICC_CTLR_EL1
CTLR_CBPR = 1 << 0
CTLR_EOIMODE = 1 << 1
CTLR_PRIBITS = PRIORITY_BITS - 1 << 8

SGIR = Layout(
    "ICC_SGI0R_EL1, ICC_SGI1R_EL1, ICC_ASGI1R_EL1",
    Field("TargetList", 15, 0),
    Field("Aff1", 23, 16),
    Field("INTID", 27, 24),
    Field("Aff2", 39, 32),
    Field("IRM", 40, 40, {1: "all but the sender"}),
    Field("RS", 47, 44),
    Field("Aff3", 55, 48),
)
"""What a guest writes to send an SGI."""
