# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_RUN: enter the guest, serve its exits, return when the VMM is needed (KVM API 4.10).

Order of what KVM_RUN does, as Linux has it: refuse an uninitialised vCPU
(ENOEXEC), finish the MMIO exit that the VMM answered, honour `immediate_exit`,
then run. A vCPU that is powered off waits before it touches EL2, so that it
makes no difference when its thread arrives.
"""

from __future__ import annotations

import errno

from pkvm.host import events, exits, firmware_address, stolen_time
from pkvm.host.scheduler import KickedError
from pkvm.host.vcpu import Vcpu
from pkvm.host.vm import Vm
from pkvm.hyp.abi import ExitCode, RunResult
from pkvm.uapi.kvm import ExitReason, MpState, Run, VcpuFeature

_PMU_V3 = 1 << VcpuFeature.PMU_V3
_AARCH32 = 1 << VcpuFeature.EL1_32BIT
_TRAP = int(ExitCode.TRAP)
_STOPPED = MpState.STOPPED
_IMMEDIATE_EXIT = Run.IMMEDIATE_EXIT
_EXIT_REASON = Run.EXIT_REASON >> 2
_UNKNOWN = int(ExitReason.UNKNOWN)
_CODE = RunResult.CODE
_SIGN = 1 << 63
_WRAP = 1 << 64


def kvm_run(vcpu: Vcpu) -> None:
    """KVM_RUN. Called and left with the kernel lock and the vCPU's mutex held; returns when
    kvm_run holds an exit.

    Raises ENOEXEC for a vCPU that is not initialised, EPERM for a secondary vCPU of a protected
    VM without POWER_OFF, EINTR for a kick or `immediate_exit`, EINVAL with KVM_EXIT_FAIL_ENTRY
    when EL2 does not run the vCPU, and what memory or EL2 refused.
    """
    if not vcpu.initialised:
        raise OSError(errno.ENOEXEC, f"vCPU {vcpu.id} has had no KVM_ARM_VCPU_INIT")
    vm = vcpu.vm
    vm.ran = True
    if vm.primary is not vcpu:
        _check_role(vcpu)
    answered = vcpu.mmio is not None
    if vcpu.mmio is not None:
        exits.complete_mmio(vcpu, vcpu.mmio)
    if vcpu.serror_waits:
        events.deliver(vcpu)
    if vcpu.run[_IMMEDIATE_EXIT]:
        vcpu.exit_with(ExitReason.INTR)
        raise OSError(errno.EINTR, "immediate_exit is set")
    vcpu.run_words[_EXIT_REASON] = _UNKNOWN
    host = vm.host
    sched = host.sched
    runner = vcpu.runner
    enter = host.el2.run
    irqs, gic = vcpu.irqs, vcpu.gic
    sched.begin(runner)
    try:
        while True:
            if runner.kicked:
                sched.leave_kicked(runner)
                raise KickedError
            if vcpu.mp_state is _STOPPED:
                sched.sleep(runner)
            elif sched.turn is not runner:
                sched.take_turn(runner)
            else:
                if host.loaded is not vcpu:
                    _load(vcpu)
                if vm.primary is None and vm.elects_primary:
                    vm.primary = vcpu
                nr_lrs = gic.flush(look=not answered) if irqs and gic is not None else 0
                answered = False
                results = sched.execute(runner, enter, vcpu.flags, vcpu.x0, nr_lrs)
                if results is not None:
                    if nr_lrs and gic is not None:
                        gic.fold(nr_lrs)
                    # An exit for user space, or to be served here; the others are rare.
                    if results[_CODE] == _TRAP:
                        vcpu.flags = 0
                        if exits.trap(vcpu, results):
                            return
                    elif _exited(vcpu, results):
                        return
            sched.breathe(runner)
    except KickedError:
        vcpu.exit_with(ExitReason.INTR)
        raise OSError(errno.EINTR, "KVM_RUN was interrupted") from None
    finally:
        sched.end(runner, keep_turn=vcpu.mmio is not None)


def _exited(vcpu: Vcpu, results: exits.Results) -> bool:
    """Serve an exit that is no trap; True if it is for the VMM. Raises KickedError, OSError."""
    code = results[_CODE]
    if code < 0 or code & _SIGN:
        raise _refused(vcpu, code)
    vcpu.flags = 0
    return exits.other(vcpu, results)


def _load(vcpu: Vcpu) -> None:
    """Make the vCPU known to EL2 if it is not, and load it. Raises OSError."""
    vm = vcpu.vm
    features = vm.vcpu_features or 0
    if features & _PMU_V3:
        raise OSError(errno.EINVAL, "the VM's PMU is not initialised, and this host has none")
    if features & _AARCH32:
        raise exits.fail_entry(vcpu, 0)
    if vm.gic is not None:
        vm.gic.map()
    if not vm.at_el2:
        _make_vm(vm)
    if not vcpu.at_el2:
        vm.init_vcpus_at_el2()
    if not vcpu.at_el2:
        vm.init_vcpu_at_el2(vcpu)
    _check_role(vcpu)
    vm.host.load(vcpu)
    if vcpu.has_stolen_time:
        stolen_time.record(vcpu)
    if vcpu.gic is not None:
        vm.host.timers.interrupted(vcpu.gic)


def _make_vm(vm: Vm) -> None:
    """The VM comes into being at EL2 with its first KVM_RUN. Raises OSError."""
    vm.init_at_el2(protected=vm.protected, created_vcpus=len(vm.vcpus))
    if vm.firmware_ipa is not None:
        try:
            firmware_address.name_to_el2(vm, vm.firmware_ipa)
        except OSError:
            vm.leave_el2()
            raise


def _check_role(vcpu: Vcpu) -> None:
    """A secondary vCPU of a protected VM must wait for the guest's CPU_ON (RFC 7.26.1)."""
    vm = vcpu.vm
    if vm.primary is None or vm.primary is vcpu or vcpu.power_off:
        return
    raise OSError(
        errno.EPERM,
        f"vCPU {vcpu.id} is a secondary of a protected VM and has no KVM_ARM_VCPU_POWER_OFF",
    )


def _refused(vcpu: Vcpu, code: int) -> OSError:
    number = _WRAP - code if code > 0 else -code
    return OSError(number, f"EL2 does not run vCPU {vcpu.id}: {errno.errorcode.get(number)}")
