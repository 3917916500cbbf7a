# SPDX-License-Identifier: GPL-2.0-or-later
"""Events that a VMM gives a vCPU whose registers the host sees: KVM_SET_VCPU_EVENTS (KVM API 4.32).

The host makes the guest take the exception by setting its registers, as the architecture would
(Arm ARM D1.3): nothing of it needs EL2.
"""

from __future__ import annotations

import errno

from pkvm.arm64 import registers as r
from pkvm.arm64.bits import MASK64
from pkvm.arm64.esr import EC, EC_SHIFT, FSC_EXTERNAL, IL
from pkvm.host.argument import Argument
from pkvm.host.vcpu import Vcpu
from pkvm.hyp.abi import CONTEXT_SYSREGS, HostVcpu
from pkvm.uapi.kvm import GUEST_DEBUG, VCPU_EVENTS

_VBAR, _ESR, _FAR = (
    HostVcpu.SYSREGS + 8 * CONTEXT_SYSREGS.index(register)
    for register in (r.VBAR_EL1, r.ESR_EL1, r.FAR_EL1)
)
_SYNCHRONOUS, _SERROR = 0x000, 0x180
_FROM_SP0, _FROM_SPX, _FROM_EL0 = 0x000, 0x200, 0x400
"""Vectors, and what state an exception is taken from."""
_PSTATE_A = 1 << 8
_KEPT_PSTATE = r.PSTATE_NZCV | r.PSTATE_PAN | r.PSTATE_DIT


def get(vcpu: Vcpu, argument: Argument) -> int:
    """KVM_GET_VCPU_EVENTS. An SError that was given once stays pending here, as Linux has it on a
    CPU whose HCR_EL2 the host does not get back. Raises ENOEXEC, EINVAL."""
    _check(vcpu)
    argument.write(VCPU_EVENTS.pack(vcpu.serror_given, 0, 0, 0, *[0] * 12))
    return 0


def set_events(vcpu: Vcpu, argument: Argument) -> int:
    """KVM_SET_VCPU_EVENTS: an external abort is taken at once; an SError when the guest is entered
    with it unmasked. Raises ENOEXEC; EINVAL for a syndrome, which takes FEAT_RAS."""
    _check(vcpu)
    serror, has_syndrome, abort, *_ = VCPU_EVENTS.unpack(argument.read(VCPU_EVENTS.size))
    if serror and has_syndrome:
        raise OSError(errno.EINVAL, "an SError with a syndrome takes FEAT_RAS")
    if serror:
        vcpu.serror_given = vcpu.serror_waits = True
    if abort:
        vcpu.mmio = None  # the access that is under way is what failed
        ec = EC.DABT_LOW if _at_el0(vcpu) else EC.DABT_CUR
        _take(vcpu, _SYNCHRONOUS, ec << EC_SHIFT | IL | FSC_EXTERNAL, vcpu.fault_far)
    return 0


def deliver(vcpu: Vcpu) -> None:
    """Before an entry of a vCPU for which an SError waits: let the guest take it if it may."""
    vcpu.sync()
    if vcpu.word(HostVcpu.PSTATE) & _PSTATE_A:
        return
    vcpu.serror_waits = False
    _take(vcpu, _SERROR, EC.SERROR << EC_SHIFT | IL, None)


def set_guest_debug(vcpu: Vcpu, argument: Argument) -> int:
    """KVM_SET_GUEST_DEBUG (KVM API 4.87): off. Raises EINVAL for all else."""
    control, *_ = GUEST_DEBUG.unpack(argument.read(GUEST_DEBUG.size))
    if control or vcpu.vm.isolated:
        raise OSError(errno.EINVAL, "guests cannot be debugged here")
    return 0


def _check(vcpu: Vcpu) -> None:
    if not vcpu.initialised:
        raise OSError(errno.ENOEXEC, f"vCPU {vcpu.id} has had no KVM_ARM_VCPU_INIT")
    if vcpu.vm.isolated:
        raise OSError(errno.EINVAL, "a protected vCPU takes no events of the host's")


def _at_el0(vcpu: Vcpu) -> bool:
    vcpu.sync()
    return vcpu.word(HostVcpu.PSTATE) & r.PSTATE_MODE_MASK == r.PSTATE_EL0T


def _take(vcpu: Vcpu, vector: int, esr: int, far: int | None) -> None:
    """Have the guest take an exception to EL1 from where it is."""
    vcpu.sync()
    pstate = vcpu.word(HostVcpu.PSTATE)
    mode = pstate & r.PSTATE_MODE_MASK
    origin = {r.PSTATE_EL0T: _FROM_EL0, r.PSTATE_EL1T: _FROM_SP0}.get(mode, _FROM_SPX)
    vcpu.set_word(HostVcpu.ELR_EL1, vcpu.word(HostVcpu.PC))
    vcpu.set_word(HostVcpu.SPSR_EL1, pstate)
    vcpu.set_word(_ESR, esr)
    if far is not None:
        vcpu.set_word(_FAR, far)
    vcpu.set_word(HostVcpu.PC, (vcpu.word(_VBAR) + origin + vector) & MASK64)
    vcpu.set_word(HostVcpu.PSTATE, pstate & _KEPT_PSTATE | r.PSTATE_DAIF | r.PSTATE_EL1H)
    vcpu.mark_dirty()
