# SPDX-License-Identifier: GPL-2.0-or-later
"""The CPU that a guest sees: its ID registers, as limits on the hardware's (facts §7.1).

A field that is not listed is 0. A listed one is the hardware's, at most the
maximum. In a signed field a negative value means "not implemented"; it wins.
SVE is not offered, so its field is not listed. Pointer authentication a VM has if
its vCPUs ask for it (KVM_ARM_VCPU_PTRAUTH_*), else its fields are 0: the
generic ones too, since PACGA traps like the others.
"""

from __future__ import annotations

from typing import NamedTuple

from pkvm.arm64 import registers as r
from pkvm.machine.cpu.engine import CpuEngine

FEATURE_PTRAUTH_ADDRESS = 1 << 5
FEATURE_PTRAUTH_GENERIC = 1 << 6
GUEST_FEATURES = FEATURE_PTRAUTH_ADDRESS | FEATURE_PTRAUTH_GENERIC
"""KVM_ARM_VCPU_* features that change what a guest sees of its CPU: all or none of them."""


class Limit(NamedTuple):
    """The most that bits [lo+3:lo] of an ID register may say."""

    lo: int
    maximum: int
    signed: bool = False

    def of(self, hardware: int) -> int:
        """The field, in place, for a hardware register."""
        value = hardware >> self.lo & 0xF
        if self.signed and value | self.maximum > 7:
            value = max(value, self.maximum)
        else:
            value = min(value, self.maximum)
        return value << self.lo


LIMITS: dict[r.SysReg, tuple[Limit, ...]] = {
    r.ID_AA64PFR0_EL1: (
        Limit(0, 1),  # EL0: AArch64 only, as at the others
        Limit(4, 1),  # EL1
        Limit(8, 1),  # EL2
        Limit(12, 1),  # EL3
        Limit(16, 1, signed=True),  # FP
        Limit(20, 1, signed=True),  # AdvSIMD
        Limit(24, 1),  # GIC
        Limit(28, 1),  # RAS
        Limit(48, 1),  # DIT
        Limit(56, 1),  # CSV2
        Limit(60, 1),  # CSV3
    ),
    r.ID_AA64PFR1_EL1: (Limit(0, 1), Limit(4, 2), Limit(40, 15)),  # BT, SSBS, MTE_frac
    r.ID_AA64ISAR1_EL1: (
        Limit(0, 2),  # DPB
        Limit(12, 1),  # JSCVT
        Limit(16, 1),  # FCMA
        Limit(20, 3),  # LRCPC
        Limit(32, 1),  # FRINTTS
        Limit(36, 1),  # SB
        Limit(40, 2),  # SPECRES
        Limit(44, 2),  # BF16
        Limit(48, 1),  # DGH
        Limit(52, 1),  # I8MM
    ),
    r.ID_AA64ISAR2_EL1: (Limit(60, 1),),  # ATS1A
    r.ID_AA64MMFR0_EL1: (
        Limit(0, 2),  # PARange: 40 bits
        Limit(4, 2),  # ASIDBits
        Limit(8, 1),  # BigEnd
        Limit(12, 1),  # SNSMem
        Limit(16, 1),  # BigEndEL0
        Limit(20, 1),  # TGran16
        Limit(24, 0, signed=True),  # TGran64
        Limit(28, 0, signed=True),  # TGran4
        Limit(44, 1),  # ExS
    ),
    r.ID_AA64MMFR1_EL1: (
        Limit(0, 2),  # HAFDBS
        Limit(4, 2),  # VMIDBits
        Limit(12, 2),  # HPDS
        Limit(20, 3),  # PAN
        Limit(24, 1),  # SpecSEI
        Limit(36, 1),  # ETS
        Limit(56, 1),  # CMOW
    ),
    r.ID_AA64MMFR2_EL1: (
        Limit(0, 1),  # CnP
        Limit(4, 1),  # UAO
        Limit(12, 1),  # IESB
        Limit(32, 1),  # AT
        Limit(36, 1),  # IDS
        Limit(48, 1),  # TTL
        Limit(52, 2),  # BBM
        Limit(60, 1),  # E0PD
    ),
}
PTRAUTH_LIMITS: dict[r.SysReg, tuple[Limit, ...]] = {
    r.ID_AA64ISAR1_EL1: (
        Limit(4, 1),  # APA
        Limit(8, 1),  # API
        Limit(24, 1),  # GPA
        Limit(28, 1),  # GPI
    ),
    r.ID_AA64ISAR2_EL1: (Limit(8, 1), Limit(12, 1)),  # GPA3, APA3
}
"""Further ones of a VM with pointer authentication."""
CONSTANTS = {
    r.ID_AA64MMFR4_EL1: 0x0F00_0000,  # E2H0: not programmable
    r.ID_AA64DFR0_EL1: 0x000F_00F0_0000_0000,  # no double lock, no MTPMU, no debug, no PMU
}
COPIED = (r.ID_AA64ISAR0_EL1,)


def has_ptrauth(engine: CpuEngine) -> bool:
    """Whether this CPU can authenticate pointers, addresses and others."""
    for register, limits in PTRAUTH_LIMITS.items():
        try:
            hardware = engine.read_sysreg(register)
        except KeyError:
            continue
        if any(limit.of(hardware) for limit in limits):
            return True
    return False


def guest_id_registers(engine: CpuEngine, *, ptrauth: bool = False) -> dict[r.SysReg, int]:
    """Value of every ID register that is not 0 to guests on this CPU, with or without pointer
    authentication; otherwise the same for all guests."""
    values = dict(CONSTANTS)
    for register in COPIED:
        values[register] = engine.read_sysreg(register)
    for register, limits in LIMITS.items():
        try:
            hardware = engine.read_sysreg(register)
        except KeyError:
            continue
        if ptrauth:
            limits += PTRAUTH_LIMITS.get(register, ())
        values[register] = sum(limit.of(hardware) for limit in limits)
    return values
