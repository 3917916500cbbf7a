# SPDX-License-Identifier: GPL-2.0-or-later
"""A vCPU's exits, class by class: what the host does about each (facts §5.4).

Every handler gets the vCPU and what EL2 published in its page, and returns
True when KVM_RUN is to return to the VMM; kvm_run then says why.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import NamedTuple

from pkvm.arm64 import esr as syndrome
from pkvm.arm64.bits import MASK64
from pkvm.arm64.esr import EC, FSC_MASK, FSC_PERMISSION, HPFAR_FIPA_MASK, ISV, S1PTW, WNR
from pkvm.arm64.registers import PSTATE_EL0T, PSTATE_MODE_MASK, SCTLR_E0E, SCTLR_EE
from pkvm.host import faults, guest_calls
from pkvm.host.vcpu import SCTLR_OFFSET, PendingMmio, Vcpu
from pkvm.hyp.abi import ExitCode, HostVcpu, HypRequest, VcpuFlag
from pkvm.uapi.kvm import ExitReason, Run

_PUBLISHED = struct.Struct("<Q256xQQQQ64xQ")
"""X0, PSTATE, ESR, FAR, HPFAR, SCTLR_EE: one load instead of six."""
_INCREMENT_PC = int(VcpuFlag.INCREMENT_PC)
_PENDING_EXCEPTION = int(VcpuFlag.PENDING_EXCEPTION)
_SMC_IMMEDIATE = 0xFFFF
_MMIO_DATA = Run.UNION + 8
_FSC_KIND = 0x3C
_XZR = 31
_W_MASK = (1 << 32) - 1
_NO_DATA = bytes(8)
_EC_SHIFT = syndrome.EC_SHIFT


class Published(NamedTuple):
    """What EL2 tells the host with a trap; for a protected vCPU no more than facts §5.4."""

    x0: int
    pstate: int
    esr: int
    far: int
    hpfar: int
    sctlr_ee: int


Handler = Callable[[Vcpu, Published], bool]


def handle(vcpu: Vcpu, code: int) -> bool:
    """Serve the exit `code` (`hyp.abi.ExitCode`) of a VCPU_RUN; True to return to the VMM.

    Raises OSError for what ends KVM_RUN with an errno, and KickedError out of a wait.
    """
    if code == ExitCode.TRAP:
        published = Published(*_PUBLISHED.unpack(vcpu.vm.host.bus.read(vcpu.page, _PUBLISHED.size)))
        return _TRAPS.get(published.esr >> _EC_SHIFT, _unknown)(vcpu, published)
    if code in (ExitCode.IRQ, ExitCode.EL1_SERROR):
        return False
    if code == ExitCode.HYP_REQ:
        return _hyp_request(vcpu)
    vcpu.initialised = False
    Run.FAIL_ENTRY.pack_into(vcpu.run, Run.UNION, code, 0)
    vcpu.exit_with(ExitReason.FAIL_ENTRY)
    raise OSError(
        errno.EINVAL,
        "EL2 does not run this vCPU: it is powered off, in AArch32 state or raised an exception "
        "that nobody may handle; KVM_ARM_VCPU_INIT comes first",
    )


def complete_mmio(vcpu: Vcpu, mmio: PendingMmio) -> None:
    """The VMM comes back from an MMIO exit: pass its answer on and step over the instruction.

    EL2 puts a protected vCPU's X0 where it belongs; a non-protected one's registers are the
    host's to write.
    """
    vcpu.mmio = None
    if not mmio.is_write:
        data = int.from_bytes(
            vcpu.run[_MMIO_DATA : _MMIO_DATA + mmio.size],
            "big" if mmio.big_endian else "little",
        )
        if vcpu.vm.protected:
            vcpu.set_word(HostVcpu.X, data)
        else:
            _load_register(vcpu, mmio, data)
    vcpu.tell(_INCREMENT_PC)


def _load_register(vcpu: Vcpu, mmio: PendingMmio, data: int) -> None:
    """Complete a load: extended as the syndrome says (SSE, SF)."""
    register = (mmio.esr & syndrome.SRT_MASK) >> syndrome.SRT_SHIFT
    if register == _XZR:
        return
    if mmio.esr & syndrome.SSE and data >> 8 * mmio.size - 1:
        data -= 1 << 8 * mmio.size
    data &= MASK64 if mmio.esr & syndrome.SF else _W_MASK
    vcpu.set_word(HostVcpu.X + 8 * register, data)
    vcpu.mark_dirty()


def _store_value(vcpu: Vcpu, published: Published) -> tuple[int, int]:
    """(the register that an MMIO store writes, SCTLR_EL1's endianness bits)."""
    if vcpu.vm.protected:
        return published.x0, published.sctlr_ee
    register = (published.esr & syndrome.SRT_MASK) >> syndrome.SRT_SHIFT
    value = 0 if register == _XZR else vcpu.word(HostVcpu.X + 8 * register)
    return value, vcpu.word(SCTLR_OFFSET)


def _hyp_request(vcpu: Vcpu) -> bool:
    """EL2 needs table pages before it can go on with the guest's call."""
    if vcpu.word(HostVcpu.REQ_TYPE) == HypRequest.MEMCACHE:
        vcpu.vm.topup(vcpu.word(HostVcpu.REQ_PAGES))
    return False


def _abort(vcpu: Vcpu, published: Published) -> bool:
    """A stage-2 abort: memory that a non-protected guest has not touched yet, MMIO, or nothing."""
    esr = published.esr
    ipa = (published.hpfar & HPFAR_FIPA_MASK) << 8 | published.far & 0xFFF
    vm = vcpu.vm
    slot = vm.slots.at(ipa)
    is_fetch = esr >> _EC_SHIFT == EC.IABT_LOW
    if slot is not None and not vm.protected:
        denied = esr & FSC_MASK & _FSC_KIND == FSC_PERMISSION
        if not denied:
            faults.share(vm, slot, ipa)
            return False
    elif slot is not None:
        # A protected guest has all memory of its slots from the start: nothing can be done.
        vcpu.tell(_PENDING_EXCEPTION)
        return False
    if is_fetch or not esr & ISV or esr & S1PTW:
        vcpu.tell(_PENDING_EXCEPTION)
        return False
    size = 1 << (esr >> syndrome.SAS_SHIFT & 3)
    is_write = bool(esr & WNR)
    value, sctlr = _store_value(vcpu, published)
    at_el0 = published.pstate & PSTATE_MODE_MASK == PSTATE_EL0T
    big_endian = bool(sctlr & (SCTLR_E0E if at_el0 else SCTLR_EE))
    data = _NO_DATA
    if is_write:
        value &= (1 << 8 * size) - 1
        data = value.to_bytes(size, "big" if big_endian else "little")
    vcpu.mmio = PendingMmio(size, is_write, big_endian, esr)
    Run.MMIO.pack_into(vcpu.run, Run.UNION, ipa, data, size, is_write)
    vcpu.exit_with(ExitReason.MMIO)
    return True


def _wfx(vcpu: Vcpu, published: Published) -> bool:
    """WFI waits for a kick or a wake-up; WFE lets the other vCPUs have the CPU."""
    vcpu.tell(_INCREMENT_PC)
    sched = vcpu.vm.host.sched
    if published.esr & syndrome.WFX_TI_WFE:
        sched.yield_turn(vcpu.runner)
    else:
        sched.sleep(vcpu.runner)
    return False


def _hvc(vcpu: Vcpu, published: Published) -> bool:
    """The preferred return address of HVC is the next instruction already."""
    return guest_calls.protected_call(vcpu) if vcpu.vm.protected else guest_calls.call(vcpu)


def _smc(vcpu: Vcpu, published: Published) -> bool:
    """As HVC, but the instruction is to be stepped over, and its immediate must be 0."""
    vcpu.tell(_INCREMENT_PC)
    if published.esr & _SMC_IMMEDIATE:
        guest_calls.answer(vcpu, MASK64)
        return False
    return guest_calls.call(vcpu)


def _sys64(vcpu: Vcpu, published: Published) -> bool:
    """The host emulates no system register: UNDEFINED."""
    vcpu.tell(_PENDING_EXCEPTION)
    return False


def _unknown(vcpu: Vcpu, published: Published) -> bool:
    """An exception class that no host expects here: UNDEFINED, as Linux does it."""
    vcpu.vm.host.say(f"unknown exception class: ESR_EL2 {published.esr:#x}")
    vcpu.tell(_PENDING_EXCEPTION)
    return False


_TRAPS: dict[int, Handler] = {
    EC.WFX: _wfx,
    EC.HVC64: _hvc,
    EC.SMC64: _smc,
    EC.SYS64: _sys64,
    EC.IABT_LOW: _abort,
    EC.DABT_LOW: _abort,
}
