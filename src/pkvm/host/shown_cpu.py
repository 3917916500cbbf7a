# SPDX-License-Identifier: GPL-2.0-or-later
"""The CPU as Linux's KVM shows it, to the VMM by ONE_REG and to a guest that is not protected: the
ID registers, as far as guests may use them, and registers that the host alone keeps for a vCPU
(debug, AArch32's), which the CPU never sees.

A protected guest reads what EL2 lets it, whatever the host shows here.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pkvm.arm64 import registers as r
from pkvm.arm64.registers import SysReg

if TYPE_CHECKING:
    from pkvm.host.vcpu import Vcpu
    from pkvm.host.vm import Vm

ReadRegister = Callable[[SysReg], int]
"""What MRS of an ID register gives the host. Raises KeyError for one that the CPU has not."""

_ID_SPACE = tuple(SysReg(3, 0, 0, crm, op2) for crm in range(1, 8) for op2 in range(8))
_ID_PFR1_EL1 = SysReg(3, 0, 0, 1, 1)
_ID_DFR0_EL1 = SysReg(3, 0, 0, 1, 2)
_HIDDEN: Mapping[SysReg, int] = {
    r.ID_AA64PFR0_EL1: 0xF << 12 | 0xF << 24,  # EL3, GIC
    r.ID_AA64DFR0_EL1: 0xF << 8,  # PMUVer
    _ID_PFR1_EL1: 0xF << 4 | 0xF << 28,  # Security, GIC
    _ID_DFR0_EL1: 0xF << 4 | 0xF << 24,  # CopSDbg, PerfMon
}
"""Fields that guests do not get, or that KVM makes itself."""
_CSV3 = 1 << 60
"""ID_AA64PFR0_EL1: speculation leaks nothing that a fault would have kept; no engine speculates."""
_GIC = {r.ID_AA64PFR0_EL1: 1 << 24, _ID_PFR1_EL1: 1 << 28}
"""The system registers of a GICv3, in the AArch64 and the AArch32 register."""
IMPLEMENTATION = (r.MIDR_EL1, r.REVIDR_EL1, r.AIDR_EL1, r.CLIDR_EL1, r.CTR_EL0)
ID_REGISTERS = (*_ID_SPACE, *IMPLEMENTATION)

_DEBUG = tuple(SysReg(2, 0, 0, n, op2) for n in range(16) for op2 in (4, 5, 6, 7))
"""Breakpoints and watchpoints: value and control of each."""
_UNKNOWN = -1
_DBGVCR32_EL2 = SysReg(2, 4, 0, 7, 0)
_DISR_EL1 = SysReg(3, 0, 12, 1, 1)
_MDRAR_EL1 = SysReg(2, 0, 1, 0, 0)
_MDCCSR_EL0 = SysReg(2, 3, 0, 1, 0)
_KEPT: Mapping[SysReg, int] = {
    **dict.fromkeys(_DEBUG, 0),
    r.MDCCINT_EL1: 0,
    r.MDSCR_EL1: 0,
    _DBGVCR32_EL2: 0,
    _DISR_EL1: 0,
    r.CSSELR_EL1: _UNKNOWN,
    SysReg(3, 4, 3, 0, 0): _UNKNOWN,  # DACR32_EL2
    SysReg(3, 4, 5, 0, 1): _UNKNOWN,  # IFSR32_EL2
    SysReg(3, 4, 5, 3, 0): 0x700,  # FPEXC32_EL2
}
"""Registers by their value after a reset; _UNKNOWN is `Policy.unknown_register`."""
_FIXED: Mapping[SysReg, int] = {r.OSLSR_EL1: 8}
"""OSLSR: there is an OS lock, and it is open."""
SYSTEM_REGISTERS = (*_KEPT, *_FIXED, *ID_REGISTERS)
"""What ONE_REG has beside the registers of EL2's page."""
_READ_AS_ZERO = frozenset({r.ACTLR_EL1, r.OSDLR_EL1, _MDRAR_EL1, _MDCCSR_EL0})
_IGNORED = frozenset({r.ACTLR_EL1, r.OSDLR_EL1, r.OSLAR_EL1})
_DC_BY_SET_AND_WAY = frozenset(SysReg(1, 0, 7, crm, 2) for crm in (6, 10, 14))
"""DC ISW, CSW and CISW: this machine's caches are coherent."""
_GUEST_HAS = frozenset({*_DEBUG, r.MDCCINT_EL1, r.MDSCR_EL1})
"""Of the kept ones those that trap."""


def no_registers(register: SysReg) -> int:
    """A `ReadRegister` of a CPU that tells nothing. Raises KeyError."""
    raise KeyError(register)


class ShownCpu:
    """The ID registers of the host's CPU, read once."""

    def __init__(self, read: ReadRegister) -> None:
        self._read = read
        self._values: dict[SysReg, int] = {}

    def value(self, vm: Vm, register: SysReg) -> int:
        """An ID register of a VM's vCPUs."""
        value = self._values.get(register)
        if value is None:
            value = self._values[register] = self._sanitised(register)
        if register in _GIC and (vm.gic is not None or not vm.ran):
            value |= _GIC[register]
        return value

    def _sanitised(self, register: SysReg) -> int:
        try:
            value = self._read(register)
        except KeyError:
            return 0
        value &= ~_HIDDEN.get(register, 0)
        return value | _CSV3 if register == r.ID_AA64PFR0_EL1 else value


def reset(vcpu: Vcpu) -> None:
    """KVM_ARM_VCPU_INIT."""
    unknown = vcpu.vm.host.policy.unknown_register
    vcpu.kept = {
        register: unknown if value == _UNKNOWN else value for register, value in _KEPT.items()
    }


def get(vcpu: Vcpu, register: SysReg) -> int | None:
    """The value of one of SYSTEM_REGISTERS; None for any other."""
    if register in vcpu.kept:
        return vcpu.kept[register]
    if register in _FIXED:
        return _FIXED[register]
    if register in ID_REGISTERS:
        return vcpu.vm.host.shown_cpu.value(vcpu.vm, register)
    return None


def set_by_vmm(vcpu: Vcpu, register: SysReg, value: int) -> None:
    """KVM_SET_ONE_REG of one of SYSTEM_REGISTERS: what a CPU is cannot be changed here. Raises
    EBUSY where Linux may have let it before the VM ran, else EINVAL."""
    if register in vcpu.kept:
        vcpu.kept[register] = value
    elif value != get(vcpu, register):
        late = register in _ID_SPACE and vcpu.vm.ran
        number = errno.EBUSY if late else errno.EINVAL
        raise OSError(number, f"{register.name} is what it is")


def guest_reads(vcpu: Vcpu, register: SysReg) -> int | None:
    """What a non-protected guest reads by MRS; None: UNDEFINED."""
    if register in _READ_AS_ZERO:
        return 0
    if register in _FIXED or register in _GUEST_HAS or register in _ID_SPACE:
        return get(vcpu, register)
    return None


def guest_writes(vcpu: Vcpu, register: SysReg, value: int) -> bool:
    """MSR, or a cache operation, of a non-protected guest; False: UNDEFINED."""
    if register in _GUEST_HAS:
        vcpu.kept[register] = value
        return True
    return register in _IGNORED or register in _DC_BY_SET_AND_WAY
