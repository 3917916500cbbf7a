# SPDX-License-Identifier: GPL-2.0-or-later
"""System registers as the guest sees them: identification, and what is trapped."""

from __future__ import annotations

from pkvm.arm64 import registers as r
from pkvm.arm64.registers import SysReg
from pkvm.check.scenarios.bench import RAM, Bench, Guest

TITLE = "identification and system registers"
_ID = (
    "MIDR_EL1", "MPIDR_EL1", "REVIDR_EL1", "AIDR_EL1", "CTR_EL0", "DCZID_EL0", "CLIDR_EL1",
    "CCSIDR_EL1", "CCSIDR2_EL1", "CSSELR_EL1", "GMID_EL1", "SMIDR_EL1",
)  # fmt: skip
_READ = (
    "CNTFRQ_EL0", "CNTP_CTL_EL0", "CNTV_CTL_EL0", "CNTV_CVAL_EL0", "CNTP_CVAL_EL0", "CNTKCTL_EL1",
    "SCTLR_EL1", "ACTLR_EL1", "CPACR_EL1", "AFSR0_EL1", "AFSR1_EL1", "AMAIR_EL1", "MAIR_EL1",
    "CONTEXTIDR_EL1", "TPIDR_EL0", "PAR_EL1", "MDSCR_EL1", "DBGBVR0_EL1",
    "DBGBCR0_EL1", "DBGWVR0_EL1", "DBGWCR0_EL1", "OSLSR_EL1", "OSDLR_EL1", "PMCR_EL0",
    "ERRIDR_EL1", "ERRSELR_EL1", "ERXFR_EL1", "ERXCTLR_EL1", "ERXSTATUS_EL1", "ERXADDR_EL1",
    "ERXMISC0_EL1", "ICC_SRE_EL1", "ICC_CTLR_EL1", "ICC_PMR_EL1", "ICC_IAR1_EL1", "ICC_HPPIR1_EL1",
    "ICC_RPR_EL1", "ICC_IGRPEN1_EL1", "ICC_SGI1R_EL1", "ICC_BPR1_EL1", "ICC_AP1R0_EL1",
    "VTTBR_EL2", "HCR_EL2", "SCR_EL3",
)  # fmt: skip
_HIDDEN = ("CNTVCT_EL0", "CNTPCT_EL0", "MDCCINT_EL1")
"""They hold a time, or what was there before."""
_MORE = {
    "CurrentEL": SysReg(3, 0, 4, 2, 2), "DAIF": SysReg(3, 3, 4, 2, 1),
    "SPSel": SysReg(3, 0, 4, 2, 0),
    "DBGBVR1_EL1": SysReg(2, 0, 0, 1, 4), "DBGWVR1_EL1": SysReg(2, 0, 0, 1, 6),
    "DBGAUTHSTATUS_EL1": SysReg(2, 0, 7, 14, 6), "DBGCLAIMSET_EL1": SysReg(2, 0, 7, 8, 6),
    "DBGPRCR_EL1": SysReg(2, 0, 1, 4, 4), "MDRAR_EL1": SysReg(2, 0, 1, 0, 0),
    "OSDTRRX_EL1": SysReg(2, 0, 0, 0, 2), "MDCCSR_EL0": SysReg(2, 3, 0, 1, 0),
    "LORID_EL1": SysReg(3, 0, 10, 4, 7), "LORC_EL1": SysReg(3, 0, 10, 4, 3),
    "ZCR_EL1": SysReg(3, 0, 1, 2, 0), "SMCR_EL1": SysReg(3, 0, 1, 2, 6),
    "TRFCR_EL1": SysReg(3, 0, 1, 2, 1), "PMSCR_EL1": SysReg(3, 0, 9, 9, 0),
    "APIAKEYLO_EL1": SysReg(3, 0, 2, 1, 0), "TCR2_EL1": SysReg(3, 0, 2, 0, 3),
    "PIR_EL1": SysReg(3, 0, 10, 2, 3), "SCXTNUM_EL1": SysReg(3, 0, 13, 0, 7),
    "SCXTNUM_EL0": SysReg(3, 3, 13, 0, 7), "DISR_EL1": SysReg(3, 0, 12, 1, 1),
    "RNDR": SysReg(3, 3, 2, 4, 0), "AMCR_EL0": SysReg(3, 3, 13, 2, 0),
    "AMUSERENR_EL0": SysReg(3, 3, 13, 2, 3), "PMUSERENR_EL0": SysReg(3, 3, 9, 14, 0),
    "PMCCNTR_EL0": SysReg(3, 3, 9, 13, 0), "PMCEID0_EL0": SysReg(3, 3, 9, 12, 6),
    "TPIDR2_EL0": SysReg(3, 3, 13, 0, 5), "RVBAR_EL1": SysReg(3, 0, 12, 0, 1),
    "RMR_EL1": SysReg(3, 0, 12, 0, 2), "ISR_EL1": SysReg(3, 0, 12, 1, 0),
    "S3_0_C11_C0_0": SysReg(3, 0, 11, 0, 0), "S3_0_C15_C0_0": SysReg(3, 0, 15, 0, 0),
    "S3_1_C15_C2_0": SysReg(3, 1, 15, 2, 0), "S3_1_C11_C0_2": SysReg(3, 1, 11, 0, 2),
    "SP_EL1": SysReg(3, 4, 4, 1, 0), "SCTLR_EL2": SysReg(3, 4, 1, 0, 0),
}  # fmt: skip


def _id_register(crm: int, op2: int) -> tuple[str, SysReg]:
    register = SysReg(3, 0, 0, crm, op2)
    return register.name, register


def good_id_registers_protected(bench: Bench) -> None:
    """Every register of the identification space, in a protected VM."""
    _id_registers(bench.vm().agent())


def good_id_registers(bench: Bench) -> None:
    """Likewise in a non-protected VM."""
    _id_registers(bench.vm(protected=False).agent())


def _id_registers(guest: Guest) -> None:
    for name in _ID:
        guest.mrs(name, r.BY_NAME[name])
    for crm in range(1, 8):
        for op2 in range(8):
            guest.mrs(*_id_register(crm, op2))


def good_registers_protected(bench: Bench) -> None:
    """Other registers: the guest's own, debug, RAS, GIC, those of features that are not there."""
    _registers(bench.vm().agent())


def good_registers(bench: Bench) -> None:
    """Likewise in a non-protected VM."""
    _registers(bench.vm(protected=False).agent())


def _registers(guest: Guest) -> None:
    for name in _HIDDEN:
        guest.mrs(name, r.BY_NAME[name], hide=True)
    for name in _READ:
        guest.mrs(name, r.BY_NAME[name])
    for name, register in _MORE.items():
        guest.mrs(name, register)


def bad_writes_protected(bench: Bench) -> None:
    """Writes to what is read-only or trapped."""
    _writes(bench.vm().agent())


def bad_writes(bench: Bench) -> None:
    """Likewise in a non-protected VM."""
    _writes(bench.vm(protected=False).agent())


def _writes(guest: Guest) -> None:
    for name, value in (
        ("ID_AA64PFR0_EL1", 0), ("MIDR_EL1", 0), ("CTR_EL0", 0), ("ACTLR_EL1", 1), ("OSLAR_EL1", 0),
        ("OSDLR_EL1", 1), ("MDSCR_EL1", 0), ("DBGBVR0_EL1", 0x1000), ("PMCR_EL0", 1),
        ("CNTFRQ_EL0", 1), ("CNTVCT_EL0", 1), ("CSSELR_EL1", 2), ("ICC_PMR_EL1", 0xF0),
        ("ICC_SRE_EL1", 7), ("ICC_SGI1R_EL1", 0), ("ICC_EOIR1_EL1", 5), ("ERRSELR_EL1", 1),
        ("VTTBR_EL2", 0), ("AFSR0_EL1", 5), ("CNTV_CVAL_EL0", 1 << 60), ("CNTP_CVAL_EL0", 1 << 60),
    ):  # fmt: skip
        guest.msr(name, r.BY_NAME[name], value)
    for name in ("OSLSR_EL1", "AFSR0_EL1", "CSSELR_EL1", "DBGBVR0_EL1", "CNTV_CVAL_EL0"):
        guest.mrs(name, r.BY_NAME[name])


def bad_instructions_protected(bench: Bench) -> None:
    """Instructions that a hypervisor may trap, and that do not exist."""
    _instructions(bench.vm().agent())


def bad_instructions(bench: Bench) -> None:
    """Likewise in a non-protected VM."""
    _instructions(bench.vm(protected=False).agent())


def _instructions(guest: Guest) -> None:
    for says, *words in (
        ("UDF #0", 0), ("UDF #1", 1), ("BRK #0", 0xD420_0000), ("HLT #0", 0xD440_0000),
        ("SVC #5", 0xD400_00A1), ("DCPS1", 0xD4A0_0001), ("DRPS", 0xD6BF_03E0),
        ("DC ISW", 0xD508_7640), ("DC CSW", 0xD508_7A40), ("DC CISW", 0xD508_7E40),
        ("IC IALLU", 0xD508_751F), ("IC IALLUIS", 0xD508_711F), ("TLBI VMALLE1", 0xD508_871F),
        ("TLBI VMALLE1IS", 0xD508_831F), ("AT S1E1R", 0xD508_7800), ("AT S12E1R", 0xD50C_7880),
        ("TLBI ALLE1", 0xD50C_879F), ("PACIA X0, X1", 0xDAC1_0020), ("PACIASP", 0xD503_233F),
        ("SB", 0xD503_30FF), ("ESB", 0xD503_221F), ("YIELD", 0xD503_203F), ("SEV", 0xD503_209F),
        ("MSR PAN, #1", 0xD500_419F), ("MSR SSBS, #1", 0xD503_413F), ("CFP RCTX", 0xD50B_7380),
        ("FMOV D0, X0", 0x9E67_0000), ("CASAL", 0xC8E0_FC41), ("LDADD", 0xF820_0041),
        ("RDVL X0, #1", 0x04BF_5020), ("CRC32X", 0x9AC0_4C00), ("AESE", 0x4E28_4800),
        ("SHA256SU0", 0x5E28_2800), ("SHA512SU0", 0xCEC0_8000),
    ):  # fmt: skip
        guest.execute(*words, x=(RAM, RAM + 64, RAM), says=str(says), show=0)
