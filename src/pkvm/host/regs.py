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
from pkvm.host import shown_cpu
from pkvm.host.policy import SERVICES
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
_USER32 = 0x10
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
_SHOWN = {uapi.sysreg(register.one_reg): register for register in shown_cpu.SYSTEM_REGISTERS}
_CCSIDRS = dict.fromkeys((uapi.REG_DEMUX_CCSIDR + number for number in range(14)), 2)
"""As Linux makes them up: 32-byte lines, one set, one way."""
_WORKAROUNDS = dict.fromkeys(uapi.REG_WORKAROUNDS, 0)
"""The CPU is not known to need any, nor to need none."""
_MORE = frozenset({*_SHOWN, *_CCSIDRS, *_WORKAROUNDS, *SERVICES})
_REGISTERS = (*PLACES, _MPIDR, uapi.REG_PSCI_VERSION)


def reg_list(vcpu: Vcpu) -> tuple[int, ...]:
    """Every id of KVM_GET_REG_LIST, in its order."""
    if not vcpu.vm.host.policy.shows_cpu:
        return _REGISTERS
    return (*_REGISTERS, *_WORKAROUNDS, *SERVICES, *_SHOWN, *_CCSIDRS)


def get_one_reg(vcpu: Vcpu, register: int) -> bytes:
    """The value of a register, as many bytes as its id says. Raises ENOENT and EINVAL for ids
    that name nothing."""
    constant = _constant(vcpu, register)
    if constant is not None:
        return constant.to_bytes(_size(register), "little")
    offset, size = _place(register)
    vcpu.sync()
    return vcpu.vm.host.bus.read(vcpu.page + offset, size)


def set_one_reg(vcpu: Vcpu, register: int, value: bytes) -> None:
    """Set a register. Errors as `get_one_reg`, and EINVAL for a PSTATE that is not AArch64 EL1 or
    EL0, and for another value of a register that cannot be changed."""
    if register == uapi.REG_PSCI_VERSION:
        _set_psci_version(vcpu, int.from_bytes(value, "little"))
        return
    if vcpu.vm.host.policy.shows_cpu and register in _MORE:
        _set_more(vcpu, register, int.from_bytes(value, "little"))
        return
    constant = _constant(vcpu, register)
    if constant is not None:
        if int.from_bytes(value, "little") != constant:
            raise OSError(errno.EINVAL, f"register {register:#x} is fixed at {constant:#x}")
        return
    offset, _ = _place(register)
    if register == uapi.REG_PSTATE:
        mode = int.from_bytes(value, "little") & PSTATE_MODE_MASK
        # A protected vCPU in AArch32 state does not run.
        aarch32 = mode == _USER32 and vcpu.vm.protected and vcpu.vm.host.policy.shows_cpu
        if mode not in _MODES and not aarch32:
            raise OSError(errno.EINVAL, f"PSTATE mode {mode:#x} is not AArch64 EL1 or EL0")
    vcpu.sync()
    vcpu.vm.host.bus.write(vcpu.page + offset, value)
    vcpu.mark_dirty()


def _set_psci_version(vcpu: Vcpu, version: int) -> None:
    """KVM_REG_ARM_PSCI_VERSION. Raises EINVAL for a version that the host has not."""
    if version not in vcpu.vm.host.policy.psci_versions:
        raise OSError(errno.EINVAL, f"this host has no PSCI {version >> 16}.{version & 0xFFFF}")
    vcpu.vm.psci_version = version


def _set_more(vcpu: Vcpu, register: int, value: int) -> None:
    """What the policy `shows_cpu` brings. Raises EINVAL for what cannot be so, EBUSY for services
    once the VM has run."""
    vm = vcpu.vm
    if register in _SHOWN:
        shown_cpu.set_by_vmm(vcpu, _SHOWN[register], value)
    elif register in SERVICES:
        if vm.ran and value != vm.services[register]:
            raise OSError(errno.EBUSY, "the VM has run: its guest may know its services")
        if value & ~SERVICES[register]:
            raise OSError(errno.EINVAL, f"this host has not all services of {value:#x}")
        vm.services[register] = value
    elif value != _constant(vcpu, register):
        raise OSError(errno.EINVAL, f"register {register:#x} is what it is")


def size_of(vcpu: Vcpu, register: int) -> int:
    """Bytes that a ONE_REG id says its register has. Raises ENOENT and EINVAL as the kernel does
    before it touches the caller's buffer."""
    if register & _ARCH_MASK != uapi.REG_ARM64:
        raise OSError(errno.EINVAL, f"{register:#x} is not an arm64 register id")
    if register in (_MPIDR, uapi.REG_PSCI_VERSION) or (
        vcpu.vm.host.policy.shows_cpu and register in _MORE
    ):
        return _size(register)
    return _place(register)[1]


def _size(register: int) -> int:
    return 1 << (register >> _SIZE_SHIFT & 0xF)


def _place(register: int) -> tuple[int, int]:
    place = PLACES.get(register)
    if place is not None:
        return place
    size = _size(register)
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
    if not vcpu.vm.host.policy.shows_cpu:
        return None
    shown = _SHOWN.get(register)
    if shown is not None:
        return shown_cpu.get(vcpu, shown)
    service = vcpu.vm.services.get(register)
    if service is not None:
        return service
    return _CCSIDRS.get(register, _WORKAROUNDS.get(register))
