# SPDX-License-Identifier: GPL-2.0-or-later
"""A vCPU's exits, class by class: what the host does about each (facts §5.4).

Every handler gets the vCPU and what VCPU_RUN returned, and returns True when
KVM_RUN is to return to the VMM; kvm_run then says why.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable

from pkvm.arm64 import esr as syndrome
from pkvm.arm64.bits import MASK64
from pkvm.arm64.esr import CM, EC, FSC_MASK, FSC_PERMISSION, HPFAR_FIPA_MASK, ISV, S1PTW, WNR
from pkvm.arm64.registers import PSTATE_EL0T, PSTATE_MODE_MASK, SCTLR_E0E, SCTLR_EE
from pkvm.host import donation, faults, guest_calls, sysregs
from pkvm.host.host import IPA_BITS
from pkvm.host.memslots import Access
from pkvm.host.vcpu import SCTLR_OFFSET, PendingMmio, Vcpu
from pkvm.host.vgic.mmio import frame_at
from pkvm.hyp.abi import ExitCode, HostVcpu, HypRequest, RunResult, VcpuFlag
from pkvm.uapi.kvm import ExitReason, Run

_MMIO = struct.Struct("<I20xQQIB")
"""kvm_run from exit_reason to the end of kvm_run.mmio, whose data is taken as one number."""
_pack_mmio = _MMIO.pack_into
_MMIO_AT = Run.EXIT_REASON
_MMIO_EXIT = int(ExitReason.MMIO)
_ESR = RunResult.ESR
_IABT = int(EC.IABT_LOW)
_INCREMENT_PC = int(VcpuFlag.INCREMENT_PC)
_PENDING_EXCEPTION = int(VcpuFlag.PENDING_EXCEPTION)
_SMC_IMMEDIATE = 0xFFFF
_MMIO_DATA = Run.UNION + 8
_MMIO_DATA_END = _MMIO_DATA + 8
_FSC_KIND = 0x3C
_XZR = 31
_W_MASK = (1 << 32) - 1
_SAS_SHIFT = syndrome.SAS_SHIFT
_EC_SHIFT = syndrome.EC_SHIFT


Results = tuple[int, ...]
"""The registers that VCPU_RUN returned (`hyp.abi.RunResult`). Of a protected vCPU they hold no
more than facts §5.4 lets."""
Handler = Callable[[Vcpu, Results], bool]


def trap(vcpu: Vcpu, results: Results) -> bool:
    """Serve an exit of code TRAP, by its class; True to return to the VMM.

    Raises OSError for what ends KVM_RUN with an errno, and KickedError out of a wait.
    """
    return _TRAPS.get(results[_ESR] >> _EC_SHIFT, _unknown)(vcpu, results)


def other(vcpu: Vcpu, results: Results) -> bool:
    """Serve an exit of another code (`hyp.abi.ExitCode`); False, the guest goes on.

    Raises OSError; for ILLEGAL it is EINVAL with KVM_EXIT_FAIL_ENTRY.
    """
    code = results[RunResult.CODE]
    if code in (ExitCode.IRQ, ExitCode.EL1_SERROR):
        if vcpu.gic is not None:
            vcpu.vm.host.timers.interrupted(vcpu.gic)
        return False
    if code == ExitCode.HYP_REQ:
        return _hyp_request(vcpu, results)
    raise fail_entry(vcpu, code)


def fail_entry(vcpu: Vcpu, reason: int) -> OSError:
    """The error of a KVM_RUN that cannot enter the guest, with KVM_EXIT_FAIL_ENTRY."""
    vcpu.initialised = False
    Run.FAIL_ENTRY.pack_into(vcpu.run, Run.UNION, reason, 0)
    vcpu.exit_with(ExitReason.FAIL_ENTRY)
    return OSError(
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
    size, is_write, big_endian, esr = mmio
    if not is_write:
        answer = vcpu.run[_MMIO_DATA : _MMIO_DATA + size]
        data = int.from_bytes(answer, "big" if big_endian else "little")
        if vcpu.vm.isolated:
            vcpu.x0 = data
        else:
            _load_register(vcpu, size, esr, data)
    vcpu.flags |= _INCREMENT_PC


def _load_register(vcpu: Vcpu, size: int, esr: int, data: int) -> None:
    """Complete a load of `size` bytes: extended as the syndrome says (SSE, SF)."""
    register = (esr & syndrome.SRT_MASK) >> syndrome.SRT_SHIFT
    if register == _XZR:
        return
    if esr & syndrome.SSE and data >> 8 * size - 1:
        data -= 1 << 8 * size
    data &= MASK64 if esr & syndrome.SF else _W_MASK
    vcpu.set_word(HostVcpu.X + 8 * register, data)
    vcpu.mark_x_dirty()


def _hyp_request(vcpu: Vcpu, results: Results) -> bool:
    """EL2 needs table pages, or a page of the guest's, before it can go on with the guest's call.
    Raises OSError: EFAULT for a page where the VM has no memory."""
    kind, vm = results[RunResult.REQ_TYPE], vcpu.vm
    if kind == HypRequest.MEMCACHE:
        vm.topup(results[RunResult.REQ_PAGES])
    elif kind == HypRequest.MAP:
        ipa = results[RunResult.REQ_IPA]
        slot = vm.slots.at(ipa)
        if slot is None:
            raise OSError(
                errno.EFAULT, f"the guest shares IPA {ipa:#x}, where the VM has no memory"
            )
        donation.touch(vm, slot, ipa)
    return False


def _abort(vcpu: Vcpu, results: Results) -> bool:
    """A stage-2 abort: MMIO, memory that a non-protected guest has not touched yet, or nothing."""
    _, _, esr, x0, far, hpfar, pstate, sctlr = results
    vm = vcpu.vm
    vcpu.fault_far = far
    access = vm.slots.accesses.get((esr, far, hpfar)) or _device_access(
        vcpu, results, esr, far, hpfar
    )
    if access is None:
        return False
    ipa, size, is_write, mask = access
    if not vm.isolated:
        x0, sctlr = _registers(vcpu, esr)
    big_endian = sctlr != 0 and _is_big_endian(pstate, sctlr)
    if is_write:
        data = x0 & mask
        if big_endian:
            data = int.from_bytes(data.to_bytes(size, "big"), "little")
    else:
        # What was there stays there, and is the answer of a VMM that gives none.
        data = int.from_bytes(vcpu.run[_MMIO_DATA:_MMIO_DATA_END], "little")
    vcpu.mmio = (size, is_write, big_endian, esr)
    _pack_mmio(vcpu.run, _MMIO_AT, _MMIO_EXIT, ipa, data, size, is_write)
    return True


def _device_access(vcpu: Vcpu, results: Results, esr: int, far: int, hpfar: int) -> Access | None:
    """The load or store that the VMM is to emulate, remembered until a slot changes; None if there
    is none, and the abort is dealt with."""
    vm = vcpu.vm
    ipa = (hpfar & HPFAR_FIPA_MASK) << 8 | far & 0xFFF
    slot = vm.slots.at(ipa)
    if slot is not None:
        if vm.protected:
            if vm.touch_pages:
                donation.touch(vm, slot, ipa)
            else:
                # It has all memory of its slots from the start: nothing can be done.
                vcpu.tell(_PENDING_EXCEPTION)
            return None
        if not (slot.readonly and esr & FSC_MASK & _FSC_KIND == FSC_PERMISSION):
            faults.share(vm, slot, ipa, write=bool(esr & WNR) and esr >> _EC_SHIFT != _IABT)
            return None
    if esr & S1PTW or esr >> _EC_SHIFT == _IABT or ipa >> IPA_BITS:
        # No access to emulate, or no address that the VM could have a device at.
        vcpu.tell(_PENDING_EXCEPTION)
        return None
    if not esr & ISV:
        if vm.protected:
            vcpu.tell(_PENDING_EXCEPTION)
        elif esr & CM:
            vcpu.tell(_INCREMENT_PC)
        else:
            raise OSError(
                errno.ENOSYS, f"the guest's access to IPA {ipa:#x} is by an instruction that its "
                "syndrome does not describe"
            )  # fmt: skip
        return None
    size = 1 << (esr >> _SAS_SHIFT & 3)
    access = (ipa, size, bool(esr & WNR), (1 << 8 * size) - 1)
    if vm.gic_start <= ipa < vm.gic_end and _gic_access(vcpu, results, access):
        return None
    vm.slots.remember((esr, far, hpfar), access)
    return access


def _gic_access(vcpu: Vcpu, results: Results, access: Access) -> bool:
    """Emulate an access to the interrupt controller; False if none of its frames is there."""
    ipa, size, is_write, mask = access
    found = frame_at(vcpu.vm.gic, ipa)
    if found is None:
        return False
    frame, offset = found
    esr, data, sctlr = results[_ESR], results[RunResult.X0], results[RunResult.SCTLR_EE]
    if not vcpu.vm.isolated:
        data, sctlr = _registers(vcpu, esr)
    data = data & mask if is_write else frame.read(offset, size)
    if _is_big_endian(results[RunResult.PSTATE], sctlr):
        data = int.from_bytes(data.to_bytes(size, "big"), "little")
    if is_write:
        frame.write(offset, size, data)
    elif vcpu.vm.isolated:
        vcpu.x0 = data
    else:
        _load_register(vcpu, size, esr, data)
    vcpu.tell(_INCREMENT_PC)
    return True


def _registers(vcpu: Vcpu, esr: int) -> tuple[int, int]:
    """Of a non-protected vCPU: the register that a load or store names, and SCTLR_EL1."""
    register = (esr & syndrome.SRT_MASK) >> syndrome.SRT_SHIFT
    x0 = 0 if register == _XZR else vcpu.word(HostVcpu.X + 8 * register)
    return x0, vcpu.word(SCTLR_OFFSET)


def _is_big_endian(pstate: int, sctlr: int) -> bool:
    """Whether the guest's data accesses are big-endian, by SCTLR_EL1.EE or E0E."""
    at_el0 = pstate & PSTATE_MODE_MASK == PSTATE_EL0T
    return bool(sctlr & (SCTLR_E0E if at_el0 else SCTLR_EE))


def _wfx(vcpu: Vcpu, results: Results) -> bool:
    """WFI waits for an interrupt, a kick or a wake-up; WFE lets the other vCPUs have the CPU."""
    vcpu.tell(_INCREMENT_PC)
    host = vcpu.vm.host
    if results[_ESR] & syndrome.WFX_TI_WFE:
        host.sched.yield_turn(vcpu.runner)
    else:
        host.timers.wait(vcpu)
    return False


def _hvc(vcpu: Vcpu, results: Results) -> bool:
    """The preferred return address of HVC is the next instruction already."""
    return guest_calls.protected_call(vcpu, results) if vcpu.vm.isolated else guest_calls.hvc(vcpu)


def _smc(vcpu: Vcpu, results: Results) -> bool:
    """As HVC, but the instruction is to be stepped over, and its immediate must be 0."""
    vcpu.tell(_INCREMENT_PC)
    if results[_ESR] & _SMC_IMMEDIATE:
        guest_calls.answer(vcpu, MASK64)
        return False
    return guest_calls.call(vcpu)


def _sys64(vcpu: Vcpu, results: Results) -> bool:
    """What the host does not emulate is UNDEFINED."""
    if not sysregs.access(vcpu, results):
        vcpu.tell(_PENDING_EXCEPTION)
    return False


def _unknown(vcpu: Vcpu, results: Results) -> bool:
    """An exception class that no host expects here: UNDEFINED, as Linux does it."""
    vcpu.vm.host.say(f"unknown exception class: ESR_EL2 {results[_ESR]:#x}")
    vcpu.tell(_PENDING_EXCEPTION)
    return False


_TRAPS: dict[int, Handler] = {
    int(EC.WFX): _wfx,
    int(EC.HVC64): _hvc,
    int(EC.SMC64): _smc,
    int(EC.SYS64): _sys64,
    int(EC.IABT_LOW): _abort,
    int(EC.DABT_LOW): _abort,
}
