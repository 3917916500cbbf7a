# SPDX-License-Identifier: GPL-2.0-or-later
"""System registers: encodings, the control bits that EL2 uses, PSTATE, reset values.

Encodings are those of MRS/MSR (Arm ARM D22.3, C5.3). The list holds what pkvm
touches by name; `SysReg.from_iss` makes any other from a trapped access.
"""

from __future__ import annotations

from typing import NamedTuple

from pkvm.arm64.bits import Field, Layout


class SysReg(NamedTuple):
    """A system register's encoding: op0, op1, CRn, CRm, op2."""

    op0: int
    op1: int
    crn: int
    crm: int
    op2: int

    @classmethod
    def from_iss(cls, iss: int) -> SysReg:
        """The register that a trapped access (ESR_EL2.ISS of EC 0x18) was about."""
        return cls(iss >> 20 & 3, iss >> 14 & 7, iss >> 10 & 15, iss >> 1 & 15, iss >> 17 & 7)

    @property
    def iss(self) -> int:
        """The encoding in place in the ISS of EC 0x18; Rt and direction are 0."""
        return self.op0 << 20 | self.op2 << 17 | self.op1 << 14 | self.crn << 10 | self.crm << 1

    @property
    def one_reg(self) -> int:
        """The 16-bit index that KVM_GET/SET_ONE_REG uses for a 64-bit system register."""
        return self.op0 << 14 | self.op1 << 11 | self.crn << 7 | self.crm << 3 | self.op2

    @property
    def name(self) -> str:
        """The manual's name, or the S<op0>_<op1>_C<n>_C<m>_<op2> form."""
        known = _NAMES.get(self)
        return known or f"S{self.op0}_{self.op1}_C{self.crn}_C{self.crm}_{self.op2}"


# Identification
MIDR_EL1 = SysReg(3, 0, 0, 0, 0)
MPIDR_EL1 = SysReg(3, 0, 0, 0, 5)
REVIDR_EL1 = SysReg(3, 0, 0, 0, 6)
ID_PFR0_EL1 = SysReg(3, 0, 0, 1, 0)
ID_AA64PFR0_EL1 = SysReg(3, 0, 0, 4, 0)
ID_AA64PFR1_EL1 = SysReg(3, 0, 0, 4, 1)
ID_AA64PFR2_EL1 = SysReg(3, 0, 0, 4, 2)
ID_AA64ZFR0_EL1 = SysReg(3, 0, 0, 4, 4)
ID_AA64DFR0_EL1 = SysReg(3, 0, 0, 5, 0)
ID_AA64DFR1_EL1 = SysReg(3, 0, 0, 5, 1)
ID_AA64ISAR0_EL1 = SysReg(3, 0, 0, 6, 0)
ID_AA64ISAR1_EL1 = SysReg(3, 0, 0, 6, 1)
ID_AA64ISAR2_EL1 = SysReg(3, 0, 0, 6, 2)
ID_AA64MMFR0_EL1 = SysReg(3, 0, 0, 7, 0)
ID_AA64MMFR1_EL1 = SysReg(3, 0, 0, 7, 1)
ID_AA64MMFR2_EL1 = SysReg(3, 0, 0, 7, 2)
ID_AA64MMFR3_EL1 = SysReg(3, 0, 0, 7, 3)
ID_AA64MMFR4_EL1 = SysReg(3, 0, 0, 7, 4)
CCSIDR_EL1 = SysReg(3, 1, 0, 0, 0)
CLIDR_EL1 = SysReg(3, 1, 0, 0, 1)
CCSIDR2_EL1 = SysReg(3, 1, 0, 0, 2)
GMID_EL1 = SysReg(3, 1, 0, 0, 4)
SMIDR_EL1 = SysReg(3, 1, 0, 0, 6)
AIDR_EL1 = SysReg(3, 1, 0, 0, 7)
CSSELR_EL1 = SysReg(3, 2, 0, 0, 0)
CTR_EL0 = SysReg(3, 3, 0, 0, 1)
DCZID_EL0 = SysReg(3, 3, 0, 0, 7)

# EL1 state
SCTLR_EL1 = SysReg(3, 0, 1, 0, 0)
ACTLR_EL1 = SysReg(3, 0, 1, 0, 1)
CPACR_EL1 = SysReg(3, 0, 1, 0, 2)
TTBR0_EL1 = SysReg(3, 0, 2, 0, 0)
TTBR1_EL1 = SysReg(3, 0, 2, 0, 1)
TCR_EL1 = SysReg(3, 0, 2, 0, 2)
AFSR0_EL1 = SysReg(3, 0, 5, 1, 0)
AFSR1_EL1 = SysReg(3, 0, 5, 1, 1)
ESR_EL1 = SysReg(3, 0, 5, 2, 0)
FAR_EL1 = SysReg(3, 0, 6, 0, 0)
PAR_EL1 = SysReg(3, 0, 7, 4, 0)
MAIR_EL1 = SysReg(3, 0, 10, 2, 0)
AMAIR_EL1 = SysReg(3, 0, 10, 3, 0)
VBAR_EL1 = SysReg(3, 0, 12, 0, 0)
CONTEXTIDR_EL1 = SysReg(3, 0, 13, 0, 1)
TPIDR_EL1 = SysReg(3, 0, 13, 0, 4)
CNTKCTL_EL1 = SysReg(3, 0, 14, 1, 0)
MDSCR_EL1 = SysReg(2, 0, 0, 2, 2)
MDCCINT_EL1 = SysReg(2, 0, 0, 2, 0)
TPIDR_EL0 = SysReg(3, 3, 13, 0, 2)
TPIDRRO_EL0 = SysReg(3, 3, 13, 0, 3)
CNTFRQ_EL0 = SysReg(3, 3, 14, 0, 0)
CNTPCT_EL0 = SysReg(3, 3, 14, 0, 1)
CNTVCT_EL0 = SysReg(3, 3, 14, 0, 2)
CNTP_TVAL_EL0 = SysReg(3, 3, 14, 2, 0)
CNTP_CTL_EL0 = SysReg(3, 3, 14, 2, 1)
CNTP_CVAL_EL0 = SysReg(3, 3, 14, 2, 2)
CNTV_TVAL_EL0 = SysReg(3, 3, 14, 3, 0)
CNTV_CTL_EL0 = SysReg(3, 3, 14, 3, 1)
CNTV_CVAL_EL0 = SysReg(3, 3, 14, 3, 2)

# EL2 and EL3
VPIDR_EL2 = SysReg(3, 4, 0, 0, 0)
VMPIDR_EL2 = SysReg(3, 4, 0, 0, 5)
HCR_EL2 = SysReg(3, 4, 1, 1, 0)
MDCR_EL2 = SysReg(3, 4, 1, 1, 1)
CPTR_EL2 = SysReg(3, 4, 1, 1, 2)
ESR_EL2 = SysReg(3, 4, 5, 2, 0)
FAR_EL2 = SysReg(3, 4, 6, 0, 0)
HPFAR_EL2 = SysReg(3, 4, 6, 0, 4)
VTTBR_EL2 = SysReg(3, 4, 2, 1, 0)
VTCR_EL2 = SysReg(3, 4, 2, 1, 2)
CNTHCTL_EL2 = SysReg(3, 4, 14, 1, 0)
CNTVOFF_EL2 = SysReg(3, 4, 14, 0, 3)
SCR_EL3 = SysReg(3, 6, 1, 1, 0)
CPTR_EL3 = SysReg(3, 6, 1, 1, 2)

# Debug, RAS and the interrupt controller's CPU interface: named by EL2's policy
DBGBVR0_EL1 = SysReg(2, 0, 0, 0, 4)
DBGBCR0_EL1 = SysReg(2, 0, 0, 0, 5)
DBGWVR0_EL1 = SysReg(2, 0, 0, 0, 6)
DBGWCR0_EL1 = SysReg(2, 0, 0, 0, 7)
OSLAR_EL1 = SysReg(2, 0, 1, 0, 4)
OSLSR_EL1 = SysReg(2, 0, 1, 1, 4)
OSDLR_EL1 = SysReg(2, 0, 1, 3, 4)
ERRIDR_EL1 = SysReg(3, 0, 5, 3, 0)
ERRSELR_EL1 = SysReg(3, 0, 5, 3, 1)
ERXFR_EL1 = SysReg(3, 0, 5, 4, 0)
ERXCTLR_EL1 = SysReg(3, 0, 5, 4, 1)
ERXSTATUS_EL1 = SysReg(3, 0, 5, 4, 2)
ERXADDR_EL1 = SysReg(3, 0, 5, 4, 3)
ERXMISC0_EL1 = SysReg(3, 0, 5, 5, 0)
ERXMISC1_EL1 = SysReg(3, 0, 5, 5, 1)
ICC_PMR_EL1 = SysReg(3, 0, 4, 6, 0)
ICC_IAR0_EL1 = SysReg(3, 0, 12, 8, 0)
ICC_EOIR0_EL1 = SysReg(3, 0, 12, 8, 1)
ICC_HPPIR0_EL1 = SysReg(3, 0, 12, 8, 2)
ICC_BPR0_EL1 = SysReg(3, 0, 12, 8, 3)
ICC_AP0R0_EL1 = SysReg(3, 0, 12, 8, 4)
ICC_AP1R0_EL1 = SysReg(3, 0, 12, 9, 0)
ICC_DIR_EL1 = SysReg(3, 0, 12, 11, 1)
ICC_RPR_EL1 = SysReg(3, 0, 12, 11, 3)
ICC_SGI1R_EL1 = SysReg(3, 0, 12, 11, 5)
ICC_ASGI1R_EL1 = SysReg(3, 0, 12, 11, 6)
ICC_SGI0R_EL1 = SysReg(3, 0, 12, 11, 7)
ICC_IAR1_EL1 = SysReg(3, 0, 12, 12, 0)
ICC_EOIR1_EL1 = SysReg(3, 0, 12, 12, 1)
ICC_HPPIR1_EL1 = SysReg(3, 0, 12, 12, 2)
ICC_BPR1_EL1 = SysReg(3, 0, 12, 12, 3)
ICC_CTLR_EL1 = SysReg(3, 0, 12, 12, 4)
ICC_SRE_EL1 = SysReg(3, 0, 12, 12, 5)
ICC_IGRPEN0_EL1 = SysReg(3, 0, 12, 12, 6)
ICC_IGRPEN1_EL1 = SysReg(3, 0, 12, 12, 7)
PMCR_EL0 = SysReg(3, 3, 9, 12, 0)

_NAMES = {value: name for name, value in globals().items() if isinstance(value, SysReg)}
BY_NAME: dict[str, SysReg] = {name: register for register, name in _NAMES.items()}
"""Every named register, e.g. BY_NAME["VBAR_EL1"]."""

HCR = Layout(
    "HCR_EL2",
    *(
        Field(name, bit, bit)
        for name, bit in {
            "VM": 0, "SWIO": 1, "PTW": 2, "FMO": 3, "IMO": 4, "AMO": 5, "VF": 6, "VI": 7, "VSE": 8,
            "FB": 9, "DC": 12, "TWI": 13, "TWE": 14, "TID0": 15, "TID1": 16, "TID2": 17,
            "TID3": 18, "TSC": 19, "TIDCP": 20, "TACR": 21, "TSW": 22, "TVM": 26, "TGE": 27,
            "RW": 31, "E2H": 34, "TLOR": 35, "TERR": 36, "TEA": 37, "APK": 40, "API": 41,
            "FWB": 46, "FIEN": 47, "TID4": 49, "AMVOFFEN": 51, "TTLBOS": 55, "ATA": 56,
            "DCT": 57, "TID5": 58,
        }.items()
    ),
    Field("BSU", 11, 10),
)  # fmt: skip


def hcr(*names: str) -> int:
    """HCR_EL2 with these single-bit fields set, e.g. hcr("VM", "RW"). KeyError if unknown."""
    word = 0
    for name in names:
        word |= HCR[name].mask
    return word


HOST_HCR = hcr("RW", "API", "APK", "TSC", "VM")
"""HCR_EL2 while a host runs that is behind stage-2 (facts §A): its SMCs trap."""

MDCR = Layout(
    "MDCR_EL2",
    Field("TPMCR", 5, 5),
    Field("TPM", 6, 6),
    Field("TDE", 8, 8),
    Field("TDA", 9, 9),
    Field("TDOSA", 10, 10),
    Field("TDRA", 11, 11),
    Field("TPMS", 14, 14),
)
CPTR_RES1 = 0x32FF
"""CPTR_EL2 with HCR_EL2.E2H = 0, nothing trapped; bit 8 (TZ) clear."""
CPTR_TZ = 1 << 8
CPTR_TFP = 1 << 10
CPTR_TTA = 1 << 20

SCTLR_EL1_RESET = 0x00C5_0078
"""KVM's reset value (facts §6.1): MMU and caches off, little-endian."""
SCTLR_EL1_MMU_OFF = 0x3050_0800
"""What a kernel's CPU starts with: the MMU and the caches off, RES1 bits set, little-endian."""
SCTLR_EE = 1 << 25
SCTLR_E0E = 1 << 24
SCTLR_SPAN = 1 << 23

PSTATE_RESET = 0x3C5
"""EL1h, D, A, I and F masked."""
PSTATE_MODE_MASK = 0x1F
"""M[4:0]; bit 4 is nRW, 1 for AArch32."""
PSTATE_NRW = 1 << 4
PSTATE_EL0T = 0x0
PSTATE_EL1T = 0x4
PSTATE_EL1H = 0x5
PSTATE_DAIF = 0x3C0
PSTATE_PAN = 1 << 22
PSTATE_NZCV = 0xF << 28
PSTATE_DIT = 1 << 24


def mpidr_of_vcpu_id(vcpu_id: int) -> int:
    """MPIDR_EL1 of a vCPU (facts §6.1): Aff0 = id[3:0], Aff1 = id[11:4], Aff2 = id[19:12]."""
    return 1 << 31 | vcpu_id & 0xF | (vcpu_id >> 4 & 0xFF) << 8 | (vcpu_id >> 12 & 0xFF) << 16
