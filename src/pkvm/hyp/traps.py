# SPDX-License-Identifier: GPL-2.0-or-later
"""What EL2 programs into the CPU before a guest runs: traps, identity, stage-2 (facts §7.3).

CPUs here have neither FEAT_RAS nor FEAT_EVT nor FEAT_MTE, and no guest gets
SVE, a PMU or debug hardware; pointer authentication those that ask for it.
"""

from __future__ import annotations

from pkvm.arm64 import registers as r
from pkvm.hyp.vcpu import Vcpu

WAIT_TRAPS = r.hcr("TWI", "TWE")
"""The only bits of HCR_EL2 that the host decides, by VCPU_LOAD."""
HCR_GUEST = r.hcr(
    "VM", "SWIO", "PTW", "FMO", "IMO", "AMO", "FB", "TID1", "TID3", "TSC", "TIDCP", "TACR", "TSW",
    "RW", "TLOR",
) | 1 << 10  # fmt: skip
"""Every guest's; BSU = inner shareable. Not TID2, which upstream sets on CPUs without FEAT_EVT: the
cache registers and CTR_EL0 are the hardware's in either case (`sysregs.HARDWARE`), and a booting
Linux reads CTR_EL0 a hundred thousand times."""
HCR_PTRAUTH = r.hcr("API", "APK")
"""Pointer authentication and its keys do not trap."""
HCR_PROTECTED = HCR_GUEST | r.hcr("TERR", "TEA", "TID5")

MDCR_GUEST = r.MDCR.encode(TPMCR=1, TPM=1, TDA=1, TDOSA=1, TDRA=1, TPMS=1)
"""Debug, PMU and SPE registers trap."""

CPTR_GUEST = r.CPTR_RES1 | r.CPTR_TZ | r.CPTR_TTA
"""FP and SIMD run; SVE and trace registers trap."""

CNTHCTL_GUEST = 1
"""EL1PCTEN without EL1PCEN: the counter can be read, the physical timer traps."""


def hcr_of(vcpu: Vcpu) -> int:
    """HCR_EL2 while `vcpu` runs."""
    base = HCR_PROTECTED if vcpu.vm.protected else HCR_GUEST
    if vcpu.vm.features:
        base |= HCR_PTRAUTH
    return base | vcpu.wait_traps


def control_registers(vcpu: Vcpu, midr: int) -> tuple[tuple[r.SysReg, int], ...]:
    """(register, value) of all of EL2's control registers, in the order of writing."""
    stage2 = vcpu.vm.stage2
    return (
        (r.HCR_EL2, hcr_of(vcpu)),
        (r.MDCR_EL2, MDCR_GUEST),
        (r.CPTR_EL2, CPTR_GUEST),
        (r.CNTHCTL_EL2, CNTHCTL_GUEST),
        (r.CNTVOFF_EL2, 0),
        (r.VPIDR_EL2, midr),
        (r.VMPIDR_EL2, vcpu.mpidr),
        (r.VTCR_EL2, stage2.vtcr),
        (r.VTTBR_EL2, stage2.vttbr),
    )
