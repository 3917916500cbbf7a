# SPDX-License-Identifier: GPL-2.0-or-later
"""Trapped system-register accesses of guests (facts §7.2).

Four kinds, by register: answered here; read as zero with writes ignored; handled
by the host; reflected to the guest. What no table names is UNDEFINED in a
protected guest, and the host's business in a non-protected one.

Answered here, though upstream leaves some to the host: the ID registers, and
REVIDR, AIDR, CTR, CLIDR, CSSELR and CCSIDR, which are the hardware's own: they
hold no secret, and a guest is better off without the host's word for them.
MIDR and MPIDR never trap (VPIDR_EL2, VMPIDR_EL2).
"""

from __future__ import annotations

from enum import Enum

from pkvm.arm64 import registers as r
from pkvm.arm64.bits import MASK64
from pkvm.arm64.esr import SYS64_ISS, SYS64_READ, SYS64_RT_MASK, SYS64_RT_SHIFT
from pkvm.hyp import inject
from pkvm.hyp.id_registers import guest_id_registers
from pkvm.hyp.vcpu import Vcpu
from pkvm.machine.cpu.engine import CpuEngine

XZR = 31
_KEY_MASK = sum(
    field.mask for name, field in SYS64_ISS.fields.items() if name not in ("Rt", "read")
)
"""The register's encoding within the ISS."""
_CRM_MASK = SYS64_ISS["CRm"].mask
_LAST_ID_CRM = SYS64_ISS["CRm"].put(7)
_OP2_MASK = SYS64_ISS["op2"].mask
_ID_SPACE = r.SysReg(3, 0, 0, 0, 0).iss
"""ID registers: op0 = 3, op1 = 0, CRn = 0, CRm 1-7, any op2."""

RAZ_WI = (
    r.DBGBVR0_EL1, r.DBGBCR0_EL1, r.DBGWVR0_EL1, r.DBGWCR0_EL1, r.MDSCR_EL1, r.OSLAR_EL1,
    r.OSLSR_EL1, r.OSDLR_EL1, r.ERRIDR_EL1, r.ERRSELR_EL1, r.ERXFR_EL1, r.ERXCTLR_EL1,
    r.ERXSTATUS_EL1, r.ERXADDR_EL1, r.ERXMISC0_EL1, r.ERXMISC1_EL1,
)  # fmt: skip
HARDWARE = (
    r.REVIDR_EL1, r.AIDR_EL1, r.CTR_EL0, r.CLIDR_EL1, r.CSSELR_EL1, r.CCSIDR_EL1,
)  # fmt: skip
"""Read as the hardware has them; of these only CSSELR can be written."""
HOST_HANDLED = (
    r.ICC_PMR_EL1, r.ICC_DIR_EL1, r.ICC_RPR_EL1, r.ICC_SGI1R_EL1, r.ICC_ASGI1R_EL1,
    r.ICC_SGI0R_EL1, r.ICC_CTLR_EL1, r.CNTP_TVAL_EL0, r.CNTP_CTL_EL0, r.CNTP_CVAL_EL0,
)  # fmt: skip
REFLECTED = (r.CCSIDR2_EL1, r.GMID_EL1, r.SMIDR_EL1)
"""Not there; with FEAT_IDST that is an EC 0x18 exception at EL1, else UNDEFINED."""
ICC_SRE_VALUE = 7
"""SRE, DFB and DIB: the system-register interface, and nothing else."""
_CSSELR_MASK = 0xF
_IDS = 36
"""Position of ID_AA64MMFR2_EL1.IDS."""


class Verdict(Enum):
    """What became of a trapped access."""

    SERVED = "sysreg"
    """Done, or an exception was given to the guest as the architecture has it."""
    HOST = "host"
    """The host handles this register."""
    UNDEFINED = "undef"
    """No table names it; nothing has been done."""


class SystemRegisters:
    """The tables for one CPU."""

    def __init__(self, engine: CpuEngine) -> None:
        self._engine = engine
        values = guest_id_registers(engine)
        self._id_values = _by_encoding(values)
        self._id_values_with_ptrauth = _by_encoding(guest_id_registers(engine, ptrauth=True))
        self._raz_wi = {register.iss for register in RAZ_WI}
        self._hardware = {register.iss: register for register in HARDWARE}
        self._host = {register.iss for register in HOST_HANDLED}
        self._reflected = {register.iss for register in REFLECTED}
        self._reflects = bool(values.get(r.ID_AA64MMFR2_EL1, 0) >> _IDS & 0xF)

    def access(self, vcpu: Vcpu, esr: int) -> Verdict:
        """Serve the vCPU's access that trapped with ESR_EL2 `esr` (EC 0x18), if it is EL2's to
        serve."""
        key = esr & _KEY_MASK
        is_read = esr & SYS64_READ
        if key & ~(_CRM_MASK | _OP2_MASK) == _ID_SPACE and 0 < key & _CRM_MASK <= _LAST_ID_CRM:
            if not is_read:
                return Verdict.UNDEFINED
            values = self._id_values_with_ptrauth if vcpu.vm.features else self._id_values
            return self._read_as(esr, values.get(key, 0))
        if key in self._raz_wi:
            return self._read_as(esr, 0) if is_read else self._skip()
        if key in self._hardware:
            return self._access_hardware(esr, self._hardware[key])
        if key == r.ICC_SRE_EL1.iss:
            return self._read_as(esr, ICC_SRE_VALUE) if is_read else self._skip()
        if key in self._host:
            return Verdict.HOST
        if key in self._reflected and self._reflects:
            inject.reflect(self._engine, esr)
            return Verdict.SERVED
        return Verdict.UNDEFINED

    def access_open(self, esr: int) -> Verdict:
        """The same for a vCPU whose CPU the host decides: EL2 serves what is the hardware's."""
        key = esr & _KEY_MASK
        if key in self._hardware:
            return self._access_hardware(esr, self._hardware[key])
        if key == r.ICC_SRE_EL1.iss:
            return self._read_as(esr, ICC_SRE_VALUE) if esr & SYS64_READ else self._skip()
        return Verdict.HOST

    def _access_hardware(self, esr: int, register: r.SysReg) -> Verdict:
        if esr & SYS64_READ:
            return self._read_as(esr, self._engine.read_sysreg(register))
        if register is not r.CSSELR_EL1:
            return Verdict.UNDEFINED
        rt = (esr & SYS64_RT_MASK) >> SYS64_RT_SHIFT
        value = 0 if rt == XZR else self._engine.x[rt]
        self._engine.write_sysreg(register, value & _CSSELR_MASK)
        return self._skip()

    def _read_as(self, esr: int, value: int) -> Verdict:
        """The guest reads `value`, and goes on after the instruction."""
        rt = (esr & SYS64_RT_MASK) >> SYS64_RT_SHIFT
        if rt != XZR:
            self._engine.x[rt] = value
        return self._skip()

    def _skip(self) -> Verdict:
        self._engine.pc = (self._engine.pc + 4) & MASK64
        return Verdict.SERVED


def _by_encoding(values: dict[r.SysReg, int]) -> dict[int, int]:
    return {register.iss: value for register, value in values.items()}
