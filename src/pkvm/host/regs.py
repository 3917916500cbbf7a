# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_GET_ONE_REG, KVM_SET_ONE_REG, KVM_GET_REG_LIST: which registers, and where they stand.

Core registers are offsets into struct kvm_regs; system registers go by their
encoding. Errors are in Linux's order (arch/arm64/kvm/guest.c behaves so).
"""

from __future__ import annotations

import errno

from pkvm.arm64.registers import (
    MPIDR_EL1,
    PSTATE_EL0T,
    PSTATE_EL1H,
    PSTATE_EL1T,
    PSTATE_MODE_MASK,
    mpidr_of_vcpu_id,
)
from pkvm.host.vcpu import Vcpu
from pkvm.hyp.abi import CONTEXT_SYSREGS, HostVcpu
from pkvm.uapi import kvm as uapi

_HOST_ONLY_SPSR = HostVcpu.SPSR_EL1 + 8
"""SPSR_abt, _und, _irq and _fiq, which only AArch32 has: words of the page that EL2 never reads."""
_ARCH_MASK = 0xFF00_0000 << 32
_SIZE_SHIFT = 52
_COPROC_MASK = 0x0FFF_0000
_CORE_INDEX_MASK = 0xFFFF
_CORE_WORDS = 0x360 // 4
"""struct kvm_regs in 32-bit words."""
_MODES = (PSTATE_EL0T, PSTATE_EL1T, PSTATE_EL1H)


def _places() -> dict[int, tuple[int, int]]:
    """ONE_REG id -> (offset in the vCPU's page, bytes)."""
    places = {uapi.reg_x(n): (HostVcpu.X + 8 * n, 8) for n in range(31)}
    places[uapi.REG_SP] = (HostVcpu.SP_EL0, 8)
    places[uapi.REG_PC] = (HostVcpu.PC, 8)
    places[uapi.REG_PSTATE] = (HostVcpu.PSTATE, 8)
    places[uapi.REG_SP_EL1] = (HostVcpu.SP_EL1, 8)
    places[uapi.REG_ELR_EL1] = (HostVcpu.ELR_EL1, 8)
    places[uapi.REG_SPSR_EL1] = (HostVcpu.SPSR_EL1, 8)
    for n in range(4):
        places[uapi.core_reg(0x128 + 8 * n)] = (_HOST_ONLY_SPSR + 8 * n, 8)
    for n in range(32):
        places[uapi.reg_v(n)] = (HostVcpu.FP + 16 * n, 16)
    places[uapi.REG_FPSR] = (HostVcpu.FP + 512, 4)
    places[uapi.REG_FPCR] = (HostVcpu.FP + 516, 4)
    for index, register in enumerate(CONTEXT_SYSREGS):
        places[uapi.sysreg(register.one_reg)] = (HostVcpu.SYSREGS + 8 * index, 8)
    return places


PLACES = _places()
_MPIDR = uapi.sysreg(MPIDR_EL1.one_reg)
REGISTERS = (*PLACES, _MPIDR, uapi.REG_PSCI_VERSION)
"""Every id of KVM_GET_REG_LIST, in its order."""


def get_one_reg(vcpu: Vcpu, register: int) -> bytes:
    """The value of a register, as many bytes as its id says. Raises ENOENT and EINVAL for ids
    that name nothing."""
    constant = _constant(vcpu, register)
    if constant is not None:
        return constant.to_bytes(8, "little")
    offset, size = _place(register)
    vcpu.sync()
    return vcpu.vm.host.bus.read(vcpu.page + offset, size)


def set_one_reg(vcpu: Vcpu, register: int, value: bytes) -> None:
    """Set a register. Errors as `get_one_reg`, and EINVAL for a PSTATE that is not AArch64 EL1 or
    EL0, and for another value of a register that cannot be changed."""
    if register == uapi.REG_PSCI_VERSION:
        _set_psci_version(vcpu, int.from_bytes(value, "little"))
        return
    constant = _constant(vcpu, register)
    if constant is not None:
        if int.from_bytes(value, "little") != constant:
            raise OSError(errno.EINVAL, f"register {register:#x} is fixed at {constant:#x}")
        return
    offset, _ = _place(register)
    if register == uapi.REG_PSTATE:
        mode = int.from_bytes(value, "little") & PSTATE_MODE_MASK
        if mode not in _MODES:
            raise OSError(errno.EINVAL, f"PSTATE mode {mode:#x} is not AArch64 EL1 or EL0")
    vcpu.sync()
    vcpu.vm.host.bus.write(vcpu.page + offset, value)
    vcpu.mark_dirty()


def _set_psci_version(vcpu: Vcpu, version: int) -> None:
    """KVM_REG_ARM_PSCI_VERSION. Raises EINVAL for a version that the host has not."""
    if version not in vcpu.vm.host.policy.psci_versions:
        raise OSError(errno.EINVAL, f"this host has no PSCI {version >> 16}.{version & 0xFFFF}")
    vcpu.vm.psci_version = version


def size_of(register: int) -> int:
    """Bytes that a ONE_REG id says its register has. Raises ENOENT and EINVAL as the kernel does
    before it touches the caller's buffer."""
    if register & _ARCH_MASK != uapi.REG_ARM64:
        raise OSError(errno.EINVAL, f"{register:#x} is not an arm64 register id")
    if register in (_MPIDR, uapi.REG_PSCI_VERSION):
        return 8
    return _place(register)[1]


def _place(register: int) -> tuple[int, int]:
    place = PLACES.get(register)
    if place is not None:
        return place
    size = 1 << (register >> _SIZE_SHIFT & 0xF)
    index = register & _CORE_INDEX_MASK
    if register & _COPROC_MASK == uapi.REG_ARM_CORE and index + size // 4 < _CORE_WORDS:
        raise OSError(errno.EINVAL, f"{register:#x} is not a whole member of struct kvm_regs")
    raise OSError(errno.ENOENT, f"there is no register {register:#x}")


def _constant(vcpu: Vcpu, register: int) -> int | None:
    """The value of a register that does not stand in the page, None for the others."""
    if register == _MPIDR:
        return mpidr_of_vcpu_id(vcpu.id)
    if register == uapi.REG_PSCI_VERSION:
        return vcpu.vm.psci_version
    return None
