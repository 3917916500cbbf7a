# SPDX-License-Identifier: GPL-2.0-or-later
"""SMCCC and PSCI for guests: what the host answers to HVC and SMC.

The calls of a guest whose registers the host sees all come here, as on any KVM
host. Of another one's only those come that need the host: EL2 has decided them
and shows the host the function and, for CPU_ON, the target (facts §5.4).
"""

from __future__ import annotations

from pkvm.arm64 import psci, smccc
from pkvm.arm64.bits import MASK64
from pkvm.arm64.psci import Function
from pkvm.arm64.registers import SCTLR_EE, mpidr_of_vcpu_id
from pkvm.host import guest_services, stolen_time
from pkvm.host.vcpu import SCTLR_OFFSET, Vcpu
from pkvm.hyp.abi import HostVcpu, RunResult
from pkvm.uapi.kvm import REG_VENDOR_HYP_BMAP, ExitReason, MpState, Run, SystemEvent, VcpuFeature

SMCCC_VERSION_1_1 = 0x1_0001
_MPIDR_AFFINITY = 0xFF_00FF_FFFF
_SMC64 = 1 << 30
_MASK32 = (1 << 32) - 1
_RESET2_VENDOR = 1 << 31
"""First vendor-specific reset type of SYSTEM_RESET2; of the others only 0 is defined."""
_NO_MIGRATION = 2
"""MIGRATE_INFO_TYPE: the trusted OS, of which there is none, needs no migration."""
_HIBERNATE_OFF = 1
"""SYSTEM_OFF2's one type, which 0 means too."""
_EVENT_FLAG_OFF2 = 1
"""KVM_SYSTEM_EVENT_SHUTDOWN_FLAG_PSCI_OFF2."""
_EVENT_FLAG_RESET2 = 1
"""KVM_SYSTEM_EVENT_RESET_FLAG_PSCI_RESET2."""

_PSCI_OFFERED = frozenset(
    {
        Function.PSCI_VERSION, Function.CPU_SUSPEND_32, Function.CPU_SUSPEND_64, Function.CPU_OFF,
        Function.CPU_ON_32, Function.CPU_ON_64, Function.AFFINITY_INFO_32,
        Function.AFFINITY_INFO_64, Function.MIGRATE_INFO_TYPE, Function.SYSTEM_OFF,
        Function.SYSTEM_RESET, Function.PSCI_FEATURES, Function.SYSTEM_RESET2_32,
        Function.SYSTEM_RESET2_64, Function.SYSTEM_OFF2_32, Function.SYSTEM_OFF2_64,
        smccc.Function.SMCCC_VERSION,
    }
)  # fmt: skip
_HAS_PSCI_0_2 = 1 << VcpuFeature.PSCI_0_2
_PSCI_MASK = 0xBFFF_FFE0
_PSCI_0_1 = frozenset(int(function) for function in psci.Function01)
_WORKAROUNDS = (
    smccc.Function.ARCH_WORKAROUND_1,
    smccc.Function.ARCH_WORKAROUND_2,
    smccc.Function.ARCH_WORKAROUND_3,
)
_RESET2 = (Function.SYSTEM_RESET2_32, Function.SYSTEM_RESET2_64)
_OFF2 = (Function.SYSTEM_OFF2_32, Function.SYSTEM_OFF2_64)
_SINCE: dict[int, int] = {
    **dict.fromkeys(_RESET2, psci.VERSION_1_1),
    **dict.fromkeys(_OFF2, psci.VERSION_1_3),
}
"""The version of PSCI that brought a function; 0.2 has the others."""
_RANDOM = (smccc.Function.TRNG_RND32, smccc.Function.TRNG_RND64)
_EVENTS = {
    Function.SYSTEM_OFF: (SystemEvent.SHUTDOWN, 0),
    Function.SYSTEM_RESET: (SystemEvent.RESET, 0),
    Function.SYSTEM_RESET2_32: (SystemEvent.RESET, _EVENT_FLAG_RESET2),
    Function.SYSTEM_RESET2_64: (SystemEvent.RESET, _EVENT_FLAG_RESET2),
    Function.SYSTEM_OFF2_32: (SystemEvent.SHUTDOWN, _EVENT_FLAG_OFF2),
    Function.SYSTEM_OFF2_64: (SystemEvent.SHUTDOWN, _EVENT_FLAG_OFF2),
}


def protected_call(vcpu: Vcpu, results: tuple[int, ...]) -> bool:
    """Serve a call that EL2 handed over with these results of VCPU_RUN; True if KVM_RUN
    returns with a system event.

    Raises KickedError out of a CPU_SUSPEND.
    """
    function = results[RunResult.X0] & _MASK32 & ~smccc.SVE_HINT
    vcpu.x0 = psci.SUCCESS
    if function in (Function.CPU_ON_32, Function.CPU_ON_64):
        target = _vcpu_at(vcpu, results[RunResult.X1])
        if target is None:
            vcpu.x0 = psci.INTERNAL_FAILURE
        else:
            _start(target)
    elif function == Function.CPU_OFF:
        _stop(vcpu)
    elif function in (Function.CPU_SUSPEND_32, Function.CPU_SUSPEND_64):
        vcpu.vm.host.timers.wait(vcpu)
    elif function in _RESET2 and 0 < results[RunResult.X1] < _RESET2_VENDOR:
        vcpu.x0 = psci.INVALID_PARAMS
    elif function in _RANDOM:
        guest_services.entropy_for_el2(vcpu.vm.host, vcpu.page)
    elif function == smccc.Function.MEM_RELINQUISH:
        vcpu.vm.relinquished(results[RunResult.X1], results[RunResult.X2])
    elif function in _EVENTS:
        vcpu.x0 = psci.INTERNAL_FAILURE
        _system_event(vcpu, *_EVENTS[Function(function)])
        return True
    else:
        vcpu.x0 = psci.NOT_SUPPORTED
    return False


def call(vcpu: Vcpu) -> bool:
    """Serve the HVC or SMC of a guest whose registers the host sees; True if KVM_RUN returns with a
    system event. Linux speaks SMCCC 1.1 to it, which has no SVE hint.

    Raises KickedError out of a CPU_SUSPEND.
    """
    x0, x1, x2, x3 = (vcpu.word(HostVcpu.X + 8 * n) for n in range(4))
    function = x0 & _MASK32
    if not function & _SMC64:
        x1, x2, x3 = x1 & _MASK32, x2 & _MASK32, x3 & _MASK32
    if not (vcpu.vm.vcpu_features or 0) & _HAS_PSCI_0_2 and _is_psci(function):
        answer(vcpu, _psci_0_1(vcpu, function, x1, x2, x3))
    elif function == smccc.Function.VENDOR_UID and vcpu.vm.has_service(function):
        answer(vcpu, *smccc.VENDOR_HYP_UID)
    elif function in (Function.CPU_ON_32, Function.CPU_ON_64):
        answer(vcpu, _cpu_on(vcpu, x1, x2, x3))
    elif function in (Function.AFFINITY_INFO_32, Function.AFFINITY_INFO_64):
        answer(vcpu, _affinity_info(vcpu, x1, x2))
    elif function == Function.CPU_OFF:
        _stop(vcpu)
    elif function in (Function.CPU_SUSPEND_32, Function.CPU_SUSPEND_64):
        answer(vcpu, psci.SUCCESS)
        vcpu.vm.host.timers.wait(vcpu)
    elif function in _EVENTS and vcpu.vm.psci_version >= _SINCE.get(function, 0):
        if _is_no_type(function, x1, x2):
            answer(vcpu, psci.INVALID_PARAMS)
            return False
        answer(vcpu, psci.INTERNAL_FAILURE)
        _system_event(vcpu, *_EVENTS[Function(function)])
        return True
    else:
        answer(vcpu, *_constant(vcpu, function, x1))
    return False


def hvc(vcpu: Vcpu) -> bool:
    """As `call`; by HVC alone a guest gets the workarounds for the CPU's speculation, of which this
    one needs none."""
    x0 = vcpu.word(HostVcpu.X)
    if x0 & _MASK32 in _WORKAROUNDS and vcpu.vm.host.policy.services:
        vcpu.set_word(HostVcpu.X, smccc.SUCCESS)
        vcpu.mark_x_dirty()
        return False
    return call(vcpu)


def _is_psci(function: int) -> bool:
    """Whether a function id is of PSCI's range, or of KVM's for PSCI 0.1."""
    return function & _PSCI_MASK == Function.PSCI_VERSION or function in _PSCI_0_1


def _psci_0_1(vcpu: Vcpu, function: int, x1: int, x2: int, x3: int) -> int:
    """The PSCI of a guest whose vCPUs were made without the feature PSCI_0_2."""
    if function == psci.Function01.CPU_OFF:
        _stop(vcpu)
        return psci.SUCCESS
    if function == psci.Function01.CPU_ON:
        result = _cpu_on(vcpu, x1 & _MASK32, x2, x3)
        return psci.INVALID_PARAMS if result == psci.ALREADY_ON else result
    return psci.NOT_SUPPORTED


def _is_no_type(function: int, x1: int, x2: int) -> bool:
    """Whether the arguments of a system event name no type of it."""
    if function in _RESET2:
        return 0 < x1 < _RESET2_VENDOR
    return function in _OFF2 and (x1 > _HIBERNATE_OFF or x2 != 0)


def answer(vcpu: Vcpu, x0: int, x1: int = 0, x2: int = 0, x3: int = 0) -> None:
    """Give a guest whose registers the host sets X0-X3."""
    for n, value in enumerate((x0, x1, x2, x3)):
        vcpu.set_word(HostVcpu.X + 8 * n, value)
    vcpu.mark_x_dirty()


def _constant(vcpu: Vcpu, function: int, x1: int) -> tuple[int, ...]:
    """The calls that only ask."""
    vm = vcpu.vm
    policy = vm.host.policy
    if function == Function.PSCI_VERSION:
        return (vm.psci_version,)
    if function == Function.PSCI_FEATURES and vm.psci_version >= psci.VERSION_1_0:
        return (_psci_features(vm.psci_version, x1 & _MASK32),)
    if function == Function.MIGRATE_INFO_TYPE:
        return (_NO_MIGRATION,)
    if function == smccc.Function.SMCCC_VERSION:
        return (SMCCC_VERSION_1_1,)
    if function == smccc.Function.KVM_FEATURES and vm.has_service(function):
        return (policy.features & vm.services[REG_VENDOR_HYP_BMAP],)
    if policy.services and vm.has_service(function):
        return _service(vcpu, function, x1)
    return (smccc.NOT_SUPPORTED,)


def _service(vcpu: Vcpu, function: int, x1: int) -> tuple[int, ...]:
    """What KVM has for its guests beside PSCI. SMCCC_ARCH_FEATURES knows of stolen time alone: this
    CPU needs no workaround."""
    if function == smccc.Function.SMCCC_ARCH_FEATURES:
        known = x1 & _MASK32 == smccc.Function.PV_TIME_FEATURES
        return (smccc.SUCCESS if known else smccc.NOT_SUPPORTED,)
    stolen = stolen_time.call(vcpu, function, x1 & _MASK32)
    if stolen is not None:
        return (stolen,)
    return guest_services.answer(vcpu.vm.host, function, x1) or (smccc.NOT_SUPPORTED,)


def _psci_features(version: int, function: int) -> int:
    """PSCI_FEATURES, of 1.0 and later."""
    if function not in _PSCI_OFFERED or version < _SINCE.get(function, 0):
        return psci.NOT_SUPPORTED
    # The types of SYSTEM_OFF2 that there are, a bit each.
    return _HIBERNATE_OFF if function in _OFF2 else psci.SUCCESS


def _cpu_on(vcpu: Vcpu, mpidr: int, entry: int, context: int) -> int:
    """PSCI CPU_ON where it is the host's; the target takes its caller's endianness."""
    target = _vcpu_at(vcpu, mpidr)
    if target is None or mpidr & ~_MPIDR_AFFINITY:
        return psci.INVALID_PARAMS
    if target.mp_state != MpState.STOPPED:
        return psci.ALREADY_ON
    target.mp_state = MpState.RUNNABLE
    target.reset(entry, context, vcpu.word(SCTLR_OFFSET) & SCTLR_EE)
    _start(target)
    return psci.SUCCESS


def _affinity_info(vcpu: Vcpu, mpidr: int, level: int) -> int:
    """PSCI AFFINITY_INFO where it is the host's: ON if any vCPU of the group is."""
    if mpidr & ~_MPIDR_AFFINITY or level > 3:
        return psci.INVALID_PARAMS
    mask = _MPIDR_AFFINITY & MASK64 << 8 * level
    group = [
        other
        for other in vcpu.vm.vcpus.values()
        if not ((mpidr_of_vcpu_id(other.id) ^ mpidr) & mask)
    ]
    if not group:
        return psci.INVALID_PARAMS
    is_on = any(other.mp_state == MpState.RUNNABLE for other in group)
    return psci.Affinity.ON if is_on else psci.Affinity.OFF


def _vcpu_at(vcpu: Vcpu, mpidr: int) -> Vcpu | None:
    """The vCPU of the same VM with this affinity."""
    for other in vcpu.vm.vcpus.values():
        if not (mpidr_of_vcpu_id(other.id) ^ mpidr) & _MPIDR_AFFINITY:
            return other
    return None


def _stop(vcpu: Vcpu) -> None:
    vcpu.mp_state = MpState.STOPPED
    vcpu.vm.host.timers.stop(vcpu)


def _start(target: Vcpu) -> None:
    target.mp_state = MpState.RUNNABLE
    target.vm.host.sched.wake(target.runner)


def _system_event(vcpu: Vcpu, kind: SystemEvent, flags: int) -> None:
    """KVM_EXIT_SYSTEM_EVENT; every vCPU of the VM stops."""
    for other in vcpu.vm.vcpus.values():
        other.mp_state = MpState.STOPPED
    Run.SYSTEM_EVENT.pack_into(vcpu.run, Run.UNION, kind, 1, flags, *[0] * 15)
    vcpu.exit_with(ExitReason.SYSTEM_EVENT)
