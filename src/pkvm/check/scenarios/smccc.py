# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls of the SMC Calling Convention: the architecture's, KVM's own, and those that nobody knows.

Page sharing is a topic of its own; here stand its neighbours, and the forms of a call.
"""

from __future__ import annotations

from functools import partial

from pkvm.arm64.smccc import Function
from pkvm.check.scenarios.bench import RAM, Bench, Guest

TITLE = "SMCCC and vendor calls"
_FEATURES_OF = {
    0x8000_0000: "SMCCC_VERSION", 0x8000_0001: "SMCCC_ARCH_FEATURES", 0x8000_0002: "ARCH_SOC_ID",
    0x8000_8000: "ARCH_WORKAROUND_1", 0x8000_7FFF: "ARCH_WORKAROUND_2",
    0x8000_3FFF: "ARCH_WORKAROUND_3", 0x8000_3FFE: "ARCH_WORKAROUND_4",
    0xC500_0020: "PV_TIME_FEATURES", 0x8400_0050: "TRNG_VERSION", 0x8400_0000: "PSCI_VERSION",
    0x8600_0000: "KVM_FEATURES", 0: "0",
}  # fmt: skip
_OWNERS = {
    0x8100_0000: "CPU service", 0xC100_0001: "CPU service, 64 bits", 0x8200_0000: "SiP service",
    0xC200_0001: "SiP service, 64 bits", 0x8300_0000: "OEM service", 0x8400_0100: "standard",
    0x8400_FF01: "standard, UID", 0x8500_0000: "standard hypervisor", 0x8500_FF01: "its UID",
    0x8600_FF00: "vendor's call count", 0x8600_FF03: "vendor's revision",
    0xC600_00FF: "unknown vendor call", 0xC600_FFFF: "the vendor's last",
    0xB000_0000: "trusted application", 0xBF00_0000: "trusted OS", 0x0: "0, a yielding call",
    0x4600_0000: "yielding vendor call", 0xFFFF_FFFF: "all ones", 0x8600_007F: "pKVM's last",
    0x8600_0040: "DISCOVER_IMPL_VER", 0xC600_0041: "DISCOVER_IMPL_CPUS",
}  # fmt: skip
_VENDOR = (
    Function.VENDOR_UID, Function.KVM_FEATURES, Function.HYP_MEMINFO, Function.MMIO_GUARD_INFO,
    Function.MMIO_GUARD_ENROLL, Function.MMIO_GUARD_MAP, Function.MMIO_GUARD_UNMAP,
    Function.MEM_RELINQUISH, Function.MMIO_RGUARD_MAP, Function.MMIO_RGUARD_UNMAP,
)  # fmt: skip


def good_architecture_protected(bench: Bench) -> None:
    """Version and features, of the architecture's own calls."""
    _architecture(bench.vm().agent())


def good_architecture(bench: Bench) -> None:
    """Likewise in a non-protected VM."""
    _architecture(bench.vm(protected=False).agent())


def _architecture(guest: Guest) -> None:
    guest.hvc(Function.SMCCC_VERSION, says="SMCCC_VERSION")
    guest.smc(Function.SMCCC_VERSION, says="SMCCC_VERSION")
    for number, name in _FEATURES_OF.items():
        guest.hvc(Function.SMCCC_ARCH_FEATURES, number, says=f"SMCCC_ARCH_FEATURES of {name}")
    for number in (0x8000_8000, 0x8000_7FFF, 0x8000_3FFF):
        guest.hvc(number, says=_FEATURES_OF[number], show=1)
    guest.hvc(0x8000_0002, 0, says="ARCH_SOC_ID", show=1)


def good_vendor_protected(bench: Bench) -> None:
    """KVM's own calls, in a protected VM."""
    _vendor(bench.vm().agent())


def good_vendor(bench: Bench) -> None:
    """Likewise in a non-protected VM."""
    _vendor(bench.vm(protected=False).agent())


def _vendor(guest: Guest) -> None:
    for function in _VENDOR:
        guest.hvc(function, says=function.name)
    guest.smc(Function.VENDOR_UID, says="VENDOR_UID")
    guest.smc(Function.KVM_FEATURES, says="KVM_FEATURES")
    guest.smc(Function.HYP_MEMINFO, says="HYP_MEMINFO")
    for says, x in (
        ("X1 set", (Function.HYP_MEMINFO, 1)),
        ("X2 set", (Function.HYP_MEMINFO, 0, 1)),
        ("X3 set", (Function.HYP_MEMINFO, 0, 0, 1)),
        ("X4 set", (Function.HYP_MEMINFO, 0, 0, 0, 1)),
        ("32 bits", (Function.HYP_MEMINFO & ~(1 << 30),)),
        ("upper half set", (1 << 32 | Function.HYP_MEMINFO,)),
        ("SVE hint", (1 << 16 | Function.HYP_MEMINFO,)),
        ("yielding", (Function.HYP_MEMINFO & ~(1 << 31),)),
    ):
        guest.hvc(*x, says=f"HYP_MEMINFO, {says}")
    guest.hvc(Function.KVM_FEATURES, 1, 2, 3, says="KVM_FEATURES, arguments")
    guest.hvc(1 << 16 | Function.KVM_FEATURES, says="KVM_FEATURES, SVE hint")
    guest.hvc(Function.MEM_SHARE & ~(1 << 30), RAM, says="MEM_SHARE, 32 bits")
    guest.smc(Function.MEM_SHARE, RAM, says="MEM_SHARE")
    guest.hvc(Function.MEM_UNSHARE & ~(1 << 30), RAM, says="MEM_UNSHARE, 32 bits")


def good_ptp(bench: Bench) -> None:
    """KVM's clock: whether it answers, not what."""
    for protected in (True, False):
        guest = bench.vm(protected=protected).agent()
        for counter in (0, 1, 2):
            says = f"KVM_PTP of counter {counter}"
            bench.call(
                "guest HVC", says, partial(guest.agent.hvc, Function.KVM_PTP, counter), _answers
            )


def _answers(x: tuple[int, ...]) -> str:
    return "not supported" if x[0] == (1 << 64) - 1 else "answers"


def good_trng(bench: Bench) -> None:
    """Random numbers: how many bits come back, not which."""
    for protected in (True, False):
        guest = bench.vm(protected=protected).agent()
        guest.hvc(Function.TRNG_VERSION, says="TRNG_VERSION")
        guest.hvc(Function.TRNG_UUID, says="TRNG_UUID")
        for number in (Function.TRNG_RND32, Function.TRNG_RND64, Function.TRNG_UUID, 0x8400_0054):
            guest.hvc(Function.TRNG_FEATURES, number, says="TRNG_FEATURES", show=1)
        for function, bits in (
            (Function.TRNG_RND64, 0), (Function.TRNG_RND64, 64), (Function.TRNG_RND64, 128),
            (Function.TRNG_RND64, 192), (Function.TRNG_RND64, 193), (Function.TRNG_RND32, 0),
            (Function.TRNG_RND32, 32), (Function.TRNG_RND32, 96), (Function.TRNG_RND32, 97),
        ):  # fmt: skip
            says = f"{function.name} of {bits} bits"
            bench.call("guest HVC", says, partial(guest.agent.hvc, function, bits), _bits)


def _bits(x: tuple[int, ...]) -> str:
    if x[0]:
        return hex(x[0])
    filled = [f"X{n}" for n in (1, 2, 3) if x[n]]
    return f"0, bits in {' '.join(filled)}"


def bad_unknown_protected(bench: Bench) -> None:
    """Calls of every owner that nobody serves."""
    _unknown(bench.vm().agent())


def bad_unknown(bench: Bench) -> None:
    """Likewise in a non-protected VM."""
    _unknown(bench.vm(protected=False).agent())


def _unknown(guest: Guest) -> None:
    for number, name in _OWNERS.items():
        guest.hvc(number, 1, 2, 3, says=name)
    guest.execute(0xD400_0022, x=(0x8400_0000,), says="HVC #1 of PSCI_VERSION")
    guest.execute(0xD41F_FFE2, x=(0x8400_0000,), says="HVC #65535 of PSCI_VERSION")
    guest.execute(0xD400_0023, x=(0x8400_0000,), says="SMC #1 of PSCI_VERSION")


def good_pv_time(bench: Bench) -> None:
    """Stolen time, which the VMM has set up nowhere."""
    for protected in (True, False):
        guest = bench.vm(protected=protected).agent()
        for number in (Function.PV_TIME_FEATURES, Function.PV_TIME_ST):
            guest.hvc(Function.PV_TIME_FEATURES, number, says="PV_TIME_FEATURES", show=1)
        guest.hvc(Function.PV_TIME_ST, says="PV_TIME_ST", show=1)
