# SPDX-License-Identifier: GPL-2.0-or-later
"""Exception syndromes: ESR_ELx, fault status codes, HPFAR_EL2 (Arm ARM D24.2)."""

from __future__ import annotations

from enum import IntEnum

from pkvm.arm64.bits import Field, Layout


class EC(IntEnum):
    """Exception class, ESR_ELx[31:26]."""

    UNKNOWN = 0x00
    WFX = 0x01
    FP_ASIMD = 0x07
    PAUTH = 0x09
    ILLEGAL_STATE = 0x0E
    SVC64 = 0x15
    HVC64 = 0x16
    SMC64 = 0x17
    SYS64 = 0x18
    SVE = 0x19
    IABT_LOW = 0x20
    IABT_CUR = 0x21
    PC_ALIGN = 0x22
    DABT_LOW = 0x24
    DABT_CUR = 0x25
    SP_ALIGN = 0x26
    SERROR = 0x2F
    BREAKPOINT_LOW = 0x30
    BRK64 = 0x3C


_EC_NAMES = {int(ec): ec.name for ec in EC}

EC_SHIFT = 26
IL = 1 << 25
"""Instruction length: 1 for a 32-bit instruction."""
ISS_MASK = (1 << 25) - 1

ESR = Layout("ESR_EL2", Field("EC", 31, 26, _EC_NAMES), Field("IL", 25, 25), Field("ISS", 24, 0))

ABORT_ISS = Layout(
    "ISS of a data or instruction abort",
    Field("ISV", 24, 24),
    Field("SAS", 23, 22, {1: "halfword", 2: "word", 3: "doubleword"}),
    Field("SSE", 21, 21),
    Field("SRT", 20, 16),
    Field("SF", 15, 15),
    Field("AR", 14, 14),
    Field("FnV", 10, 10),
    Field("EA", 9, 9),
    Field("CM", 8, 8),
    Field("S1PTW", 7, 7),
    Field("WnR", 6, 6),
    Field("FSC", 5, 0),
)
ISV = ABORT_ISS["ISV"].mask
SAS_SHIFT = 22
SSE = ABORT_ISS["SSE"].mask
SRT_SHIFT = 16
SRT_MASK = ABORT_ISS["SRT"].mask
SF = ABORT_ISS["SF"].mask
CM = ABORT_ISS["CM"].mask
S1PTW = ABORT_ISS["S1PTW"].mask
WNR = ABORT_ISS["WnR"].mask
FSC_MASK = ABORT_ISS["FSC"].mask

FSC_TYPE_MASK = 0x3C
"""The kind of fault; below it is the level."""
FSC_ADDRESS_SIZE = 0x00
"""Address size fault at level 0; add the level."""
FSC_TRANSLATION = 0x04
"""Translation fault at level 0; add the level."""
FSC_ACCESS_FLAG = 0x08
"""Access flag fault; add the level."""
FSC_PERMISSION = 0x0C
"""Permission fault; add the level."""
FSC_EXTERNAL = 0x10
"""Synchronous external abort, not on a table walk."""
FSC_EXTERNAL_ON_WALK = 0x14
"""Synchronous external abort on a table walk at level 0; add the level."""

SYS64_ISS = Layout(
    "ISS of a trapped MSR, MRS or system instruction",
    Field("op0", 21, 20),
    Field("op2", 19, 17),
    Field("op1", 16, 14),
    Field("CRn", 13, 10),
    Field("Rt", 9, 5),
    Field("CRm", 4, 1),
    Field("read", 0, 0),
)
SYS64_RT_SHIFT = 5
SYS64_RT_MASK = SYS64_ISS["Rt"].mask
SYS64_READ = 1

WFX_TI_WFE = 1
"""ISS bit 0 of EC WFX: WFE rather than WFI."""

HPFAR_FIPA_MASK = 0xFFFF_FFFF_FFF0
"""HPFAR_EL2.FIPA, bits [47:4], holds IPA[55:12]."""


def hpfar_to_ipa(hpfar: int) -> int:
    """The page-aligned IPA that HPFAR_EL2 holds (bytes)."""
    return (hpfar & HPFAR_FIPA_MASK) << 8


def ipa_to_hpfar(ipa: int) -> int:
    """HPFAR_EL2 for a faulting IPA (bytes); the page offset is dropped."""
    return (ipa >> 8) & HPFAR_FIPA_MASK
