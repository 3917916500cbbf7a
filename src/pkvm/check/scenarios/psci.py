# SPDX-License-Identifier: GPL-2.0-or-later
"""PSCI, function by function, by HVC and SMC, in every version that the VMM may choose."""

from __future__ import annotations

from functools import partial

from pkvm.arm64.psci import Function
from pkvm.check.scenarios.bench import Bench, Guest
from pkvm.guests.protocol import Op
from pkvm.kvm import Vcpu
from pkvm.uapi.kvm import REG_PSCI_VERSION

TITLE = "PSCI"
_WAIT_S = 0.1
_MORE = {
    0x8400_000B: "CPU_FREEZE", 0x8400_000C: "CPU_DEFAULT_SUSPEND", 0x8400_000D: "NODE_HW_STATE",
    0x8400_0010: "STAT_RESIDENCY", 0x8400_0011: "STAT_COUNT", 0x8400_0016: "after the last",
    0x8400_001F: "the range's last", 0xC400_0008: "SYSTEM_OFF, 64 bits",
    0xC400_0000: "PSCI_VERSION, 64 bits", 0xC400_000A: "PSCI_FEATURES, 64 bits",
    0xC400_0002: "CPU_OFF, 64 bits",
}  # fmt: skip
_ENDS = (Function.SYSTEM_OFF, Function.SYSTEM_RESET, Function.CPU_OFF)
_WAITS = (Function.CPU_SUSPEND_32, Function.CPU_SUSPEND_64)


def _call(guest: Guest, name: str, *x: int) -> None:
    guest.hvc(*x, says=name, show=4)


def good_functions_protected(bench: Bench) -> None:
    """Every function that neither ends nor waits."""
    _functions(bench.vm().agent())


def good_functions(bench: Bench) -> None:
    """Likewise in a non-protected VM."""
    _functions(bench.vm(protected=False).agent())


def _functions(guest: Guest) -> None:
    for function in Function:
        if function not in _ENDS + _WAITS and function not in _SYSTEM:
            _call(guest, function.name, function)
    for number, name in _MORE.items():
        _call(guest, name, number)
    guest.smc(Function.PSCI_VERSION, says="PSCI_VERSION")
    guest.smc(Function.AFFINITY_INFO_64, 0, says="AFFINITY_INFO")
    _call(guest, "PSCI_VERSION, upper half set", 1 << 32 | Function.PSCI_VERSION)


_SYSTEM = (
    Function.SYSTEM_RESET2_32, Function.SYSTEM_RESET2_64, Function.SYSTEM_OFF2_32,
    Function.SYSTEM_OFF2_64, Function.SYSTEM_SUSPEND_32, Function.SYSTEM_SUSPEND_64,
)  # fmt: skip


def good_features(bench: Bench) -> None:
    """PSCI_FEATURES of everything, in a protected VM."""
    guest = bench.vm().agent()
    for function in (*Function, 0x8000_0000, 0x8000_0001, 0x8600_0000, *_MORE, 0):
        name = function.name if isinstance(function, Function) else hex(function)
        guest.hvc(Function.PSCI_FEATURES, function, says=f"PSCI_FEATURES of {name}", show=1)


def good_affinity(bench: Bench) -> None:
    """AFFINITY_INFO of levels and of CPUs that are not there."""
    vm = bench.vm()
    vm.vcpu(1, power_off=True)
    vm.vcpu(17, power_off=True)
    guest = vm.agent()
    for target, level in (
        (0, 0), (1, 0), (2, 0), (0x101, 0), (0x1_0000, 0), (0, 1), (0x100, 1), (0x200, 1), (0, 2),
        (0x1_0000, 2), (0, 3), (0, 4), (0, 1 << 32), (1 << 31, 0), (1 << 32, 0), (1 << 40, 0),
    ):  # fmt: skip
        guest.hvc(Function.AFFINITY_INFO_64, target, level, says="AFFINITY_INFO", show=1)
    guest.hvc(Function.AFFINITY_INFO_32, 1 << 32, 0, says="AFFINITY_INFO, 32 bits", show=1)


def good_system_events_protected(bench: Bench) -> None:
    """The calls that end a machine."""
    _system_events(bench, protected=True)


def good_system_events(bench: Bench) -> None:
    """Likewise in a non-protected VM."""
    _system_events(bench, protected=False)


def _system_events(bench: Bench, protected: bool) -> None:
    vm = bench.vm(protected=protected)
    other = vm.vcpu(1, power_off=True)
    guest = vm.agent()
    for says, x in (
        ("SYSTEM_RESET2", (Function.SYSTEM_RESET2_64, 0, 0)),
        ("SYSTEM_RESET2, vendor's type", (Function.SYSTEM_RESET2_64, 1 << 31, 0x55)),
        ("SYSTEM_RESET2, 32 bits", (Function.SYSTEM_RESET2_32, 0, 0)),
        ("SYSTEM_RESET2, type 1", (Function.SYSTEM_RESET2_64, 1, 0)),
        ("SYSTEM_OFF2", (Function.SYSTEM_OFF2_64, 0, 0)),
        ("SYSTEM_OFF2, type 1", (Function.SYSTEM_OFF2_64, 1, 0)),
        ("SYSTEM_OFF2, type 2", (Function.SYSTEM_OFF2_64, 2, 0)),
        ("SYSTEM_OFF2, cookie", (Function.SYSTEM_OFF2_64, 0, 1)),
        ("SYSTEM_SUSPEND", (Function.SYSTEM_SUSPEND_64, 0, 0)),
        ("SYSTEM_RESET", (Function.SYSTEM_RESET,)),
        ("SYSTEM_OFF", (Function.SYSTEM_OFF,)),
    ):
        _call(guest, says, *x)
        if bench.error is not None:
            _go_on(bench, guest)
    bench.call("KVM_GET_MP_STATE", "of the other vCPU", lambda: other.mp_state)


def _go_on(bench: Bench, guest: Guest) -> None:
    """After a system event every vCPU is stopped; the VMM starts this one again."""
    vcpu = guest.vcpu
    bench.call("KVM_GET_MP_STATE", "after the event", lambda: vcpu.mp_state)

    bench.call("KVM_SET_MP_STATE", "RUNNABLE", partial(setattr, vcpu, "mp_state", 0))
    guest.resume("after the event", show=1)


def good_suspend(bench: Bench) -> None:
    """CPU_SUSPEND and WFI without an interrupt to come: until the VMM kicks."""
    for protected in (True, False):
        guest = bench.vm(protected=protected).agent()
        for name, x in (
            ("CPU_SUSPEND", (Function.CPU_SUSPEND_64, 0, 0, 0)),
            ("CPU_SUSPEND, 32 bits", (Function.CPU_SUSPEND_32, 1 << 16, 0, 0)),
        ):
            bench.kick_after(_WAIT_S, guest.vcpu)
            _call(guest, name, *x)
            guest.resume("after the kick", show=1)
        bench.kick_after(_WAIT_S, guest.vcpu)
        guest.op(Op.WFI, show=0)
        guest.resume("after the kick", show=0)
        guest.op(Op.WFE, show=0)


def good_versions(bench: Bench) -> None:
    """Every version that KVM_REG_ARM_PSCI_VERSION may say."""
    for protected in (True, False):
        kind = "protected" if protected else "non-protected"
        for version in (0x2, 0x1_0000, 0x1_0001, 0x1_0002, 0x1_0003):
            vm = bench.vm(protected=protected)
            vcpu = vm.vcpu()
            _set_version(bench, vcpu, version, kind)
            guest = vm.guest(vcpu)
            guest.start(f"{kind}, PSCI {version:#x}")
            guest.hvc(Function.PSCI_VERSION, says="PSCI_VERSION", show=1)
            for function in (
                Function.CPU_SUSPEND_64,
                Function.SYSTEM_RESET2_64,
                Function.SYSTEM_OFF2_64,
            ):
                says = f"PSCI_FEATURES of {function.name}"
                guest.hvc(Function.PSCI_FEATURES, function, says=says, show=1)
            vcpu.close()
            vm.vm.close()


def bad_versions(bench: Bench) -> None:
    """Versions that KVM has not, and a change after the first run."""
    vm = bench.vm()
    guest = vm.agent()
    for version in (0, 1, 3, 0x1_0004, 0x2_0000, 1 << 32 | 2, (1 << 64) - 1, 0x1_0000):
        _set_version(bench, guest.vcpu, version, "after the run")
    bench.call("KVM_GET_ONE_REG", "PSCI version", lambda: guest.vcpu.get_one_reg(REG_PSCI_VERSION))
    guest.hvc(Function.PSCI_VERSION, says="PSCI_VERSION", show=1)


def _set_version(bench: Bench, vcpu: Vcpu, version: int, says: str) -> None:
    bench.call(
        "KVM_SET_ONE_REG",
        f"PSCI version {version:#x}, {says}",
        lambda: vcpu.set_one_reg(REG_PSCI_VERSION, version),
    )
