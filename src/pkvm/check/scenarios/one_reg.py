# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_GET_ONE_REG, KVM_SET_ONE_REG and KVM_GET_REG_LIST, before the first run and after."""

from __future__ import annotations

from functools import partial

from pkvm.arm64 import registers as r
from pkvm.check.scenarios.bench import CODE, Bench, BenchVm
from pkvm.check.scenarios.observation import Outcome
from pkvm.kvm import Vcpu
from pkvm.kvm.registers import register_id
from pkvm.uapi import kvm as uapi
from pkvm.uapi.kvm import Ioctl

TITLE = "register access before and after the first run"
_CORE = ("x0", "x5", "x28", "x30", "pc", "pstate", "sp_el0", "sp_el1", "elr_el1", "spsr_el1", "v0",
         "v31", "fpsr", "fpcr")  # fmt: skip
_SYSTEM = (
    "SCTLR_EL1", "VBAR_EL1", "TTBR0_EL1", "TCR_EL1", "CPACR_EL1", "MAIR_EL1", "TPIDR_EL1",
    "CNTKCTL_EL1", "MPIDR_EL1", "MIDR_EL1", "REVIDR_EL1", "CTR_EL0", "CLIDR_EL1", "CSSELR_EL1",
    "ACTLR_EL1", "ID_AA64PFR0_EL1", "ID_AA64PFR1_EL1", "ID_AA64DFR0_EL1", "ID_AA64ISAR0_EL1",
    "ID_AA64ISAR1_EL1", "ID_AA64MMFR0_EL1", "ID_AA64MMFR1_EL1", "ID_AA64MMFR2_EL1", "ID_PFR0_EL1",
    "MDSCR_EL1", "DBGBVR0_EL1", "OSLSR_EL1", "PMCR_EL0", "VTTBR_EL2",
)  # fmt: skip
_FIRMWARE = {
    0: "PSCI_VERSION", 1: "ARCH_WORKAROUND_1", 2: "ARCH_WORKAROUND_2", 3: "ARCH_WORKAROUND_3",
    4: "no such register",
}  # fmt: skip
_BITMAPS = {0: "STD_BMAP", 1: "STD_HYP_BMAP", 2: "VENDOR_HYP_BMAP", 3: "VENDOR_HYP_BMAP_2"}
_FW_FEATURES = 0x16 << 16


def _get(bench: Bench, vcpu: Vcpu, says: str, register: int) -> None:
    bench.call("KVM_GET_ONE_REG", says, lambda: vcpu.get_one_reg(register))


def _set(bench: Bench, vcpu: Vcpu, says: str, register: int, value: int) -> None:
    bench.call("KVM_SET_ONE_REG", f"{says}, {value:#x}", lambda: vcpu.set_one_reg(register, value))


def _system(name: str) -> int:
    return uapi.sysreg(r.BY_NAME[name].one_reg)


def _read_all(bench: Bench, vcpu: Vcpu, when: str) -> None:
    for name in _CORE:
        _get(bench, vcpu, f"{when}, {name}", register_id(name))
    for name in _SYSTEM:
        _get(bench, vcpu, f"{when}, {name}", _system(name))


def good_before_run_protected(bench: Bench) -> None:
    """What a protected vCPU holds before it runs."""
    vm = bench.vm()
    _read_all(bench, vm.vcpu(), "before")


def good_before_run(bench: Bench) -> None:
    """Likewise a non-protected one."""
    vm = bench.vm(protected=False)
    _read_all(bench, vm.vcpu(), "before")


def good_firmware_registers(bench: Bench) -> None:
    """KVM's own registers, which say what it tells its guests."""
    for protected in (True, False):
        vcpu = bench.vm(protected=protected).vcpu()
        kind = "protected" if protected else "non-protected"
        base = uapi.REG_ARM64 | uapi.REG_SIZE_U64
        for number, name in _FIRMWARE.items():
            _get(bench, vcpu, f"{kind}, {name}", base | uapi.REG_ARM_FW | number)
        for number, name in _BITMAPS.items():
            _get(bench, vcpu, f"{kind}, {name}", base | _FW_FEATURES | number)
            _set(bench, vcpu, f"{kind}, {name}", base | _FW_FEATURES | number, 0)
            _get(bench, vcpu, f"{kind}, {name}", base | _FW_FEATURES | number)


def good_list(bench: Bench) -> None:
    """The list of registers: how many there are of each kind."""
    for protected in (True, False):
        vm = bench.vm(protected=protected)
        vcpu = vm.vcpu()
        kind = "protected" if protected else "non-protected"
        registers = vcpu.reg_list()
        bench.record("KVM_GET_REG_LIST", f"{kind}, all", Outcome(str(len(registers))))
        for name, coprocessor in (
            ("core", 0x10), ("demux", 0x11), ("system", 0x13), ("firmware", 0x14), ("SVE", 0x15),
            ("firmware features", 0x16),
        ):  # fmt: skip
            count = sum(1 for register in registers if register >> 16 & 0xFFF == coprocessor)
            bench.record("KVM_GET_REG_LIST", f"{kind}, {name}", Outcome(str(count)))
        short = bytearray(8)
        bench.ioctl("KVM_GET_REG_LIST", f"{kind}, no room", vcpu.fd, Ioctl.GET_REG_LIST, short)
        vm.guest(vcpu).start(kind)
        count = len(vcpu.reg_list())
        bench.record("KVM_GET_REG_LIST", f"{kind}, after the run", Outcome(str(count)))


def good_after_run_protected(bench: Bench) -> None:
    """A protected vCPU's registers are the VMM's to read and to write after it has run."""
    _after_run(bench, bench.vm())


def good_after_run(bench: Bench) -> None:
    """Likewise a non-protected one's."""
    _after_run(bench, bench.vm(protected=False))


def _hidden(_: int) -> str:
    return "read"


def _after_run(bench: Bench, vm: BenchVm) -> None:
    guest = vm.agent()
    vcpu = guest.vcpu
    guest.execute(0x9E67_0003, x=(0x1234,), says="FMOV D3, X0", show=0)
    for name in ("x28", "x0", "pstate", "sp_el0", "spsr_el1", "v3", "fpsr", "fpcr"):
        show = _hidden if name in ("x28", "x0") else hex
        bench.call("KVM_GET_ONE_REG", f"after, {name}", partial(vcpu.get_reg, name), show)
    for name in ("CPACR_EL1", "TCR_EL1", "MPIDR_EL1", "MIDR_EL1", "ID_AA64PFR0_EL1",
                 "ID_AA64DFR0_EL1", "ID_AA64MMFR0_EL1", "CTR_EL0", "CLIDR_EL1"):  # fmt: skip
        _get(bench, vcpu, f"after, {name}", _system(name))
    vbar = vcpu.get_one_reg(_system("VBAR_EL1"))
    bench.call("KVM_GET_ONE_REG", "after, VBAR_EL1", lambda: f"code+{vbar - CODE:#x}")
    _set(bench, vcpu, "after, VBAR_EL1", _system("VBAR_EL1"), 0x1234_5000)
    guest.mrs("VBAR_EL1", r.BY_NAME["VBAR_EL1"])
    vcpu.set_one_reg(_system("VBAR_EL1"), vbar)
    _set(bench, vcpu, "after, TPIDR_EL1", _system("TPIDR_EL1"), 0x77)
    guest.mrs("TPIDR_EL1", r.BY_NAME["TPIDR_EL1"])
    bench.call("KVM_SET_ONE_REG", "after, v5", lambda: vcpu.set_reg("v5", 0x5EC2E7))
    guest.execute(0x9E66_00A0, says="FMOV X0, D5")
    for name, value in (("MPIDR_EL1", 0x8000_0001), ("MIDR_EL1", 0), ("ID_AA64PFR0_EL1", 0x11),
                        ("CTR_EL0", 0), ("CLIDR_EL1", 0), ("ACTLR_EL1", 1)):  # fmt: skip
        _set(bench, vcpu, f"after, {name}", _system(name), value)


def good_set_before_run_protected(bench: Bench) -> None:
    """What the VMM sets before the run is what the guest finds."""
    _set_before_run(bench, bench.vm())


def good_set_before_run(bench: Bench) -> None:
    """Likewise of a non-protected vCPU."""
    _set_before_run(bench, bench.vm(protected=False))


def _set_before_run(bench: Bench, vm: BenchVm) -> None:
    vcpu = vm.vcpu()
    for name, value in (("x0", 0x1000), ("x14", 0x1414), ("x15", 0x1515), ("sp_el0", 0x5000),
                        ("v1", 0x1111)):  # fmt: skip
        bench.call("KVM_SET_ONE_REG", f"{name}, {value:#x}", partial(vcpu.set_reg, name, value))
    for name, value in (("TPIDR_EL0", 0x99), ("CONTEXTIDR_EL1", 0x42)):
        _set(bench, vcpu, name, _system(name), value)
    for name in ("ID_AA64PFR0_EL1", "ID_AA64DFR0_EL1", "MIDR_EL1", "CTR_EL0", "MPIDR_EL1"):
        register = _system(name)
        same = bench.call("KVM_GET_ONE_REG", name, partial(vcpu.get_one_reg, register)) or 0
        for says, value in (("the same", same), ("another", same ^ 1 << 63)):
            change = partial(vcpu.set_one_reg, register, value)
            bench.call("KVM_SET_ONE_REG", f"{name}, {says}", change)
    guest = vm.guest(vcpu)
    guest.start()
    words = guest.agent.boot_state()
    for number in (0, 14, 15):
        bench.record("guest entered", f"X{number}", Outcome(guest=hex(words[number])))
    guest.mrs("TPIDR_EL0", r.BY_NAME["TPIDR_EL0"])
    guest.execute(0x9E66_0020, says="FMOV X0, D1")


def bad_ids(bench: Bench) -> None:
    """ONE_REG ids that name nothing, or have the wrong size."""
    for protected in (True, False):
        vcpu = bench.vm(protected=protected).vcpu()
        kind = "protected" if protected else "non-protected"
        for says, register in (
            ("0", 0),
            ("another architecture", 0x2030_0000_0010_0000),
            ("PC as 32 bits", uapi.core_reg(0x100, 4)),
            ("X0 as 32 bits", uapi.core_reg(0, 4)),
            ("the middle of X0", uapi.core_reg(4)),
            ("V0 as 64 bits", uapi.core_reg(uapi.REG_FP_BASE)),
            ("behind the last", uapi.core_reg(0x360)),
            ("no such system register", uapi.sysreg(0xFFFF)),
            ("system register as 32 bits", _system("VBAR_EL1") & ~(1 << 52)),
            ("unknown coprocessor", uapi.REG_ARM64 | uapi.REG_SIZE_U64 | 0x55 << 16),
            ("SVE state", uapi.REG_ARM64 | 8 << 52 | 0x15 << 16),
            ("demux, CCSIDR of level 1", uapi.REG_ARM64 | uapi.REG_SIZE_U32 | 0x11 << 16),
        ):
            _get(bench, vcpu, f"{kind}, {says}", register)
        for mode in (0x0, 0x4, 0x5, 0x8, 0x9, 0x10, 0x13, 0x1F):
            change = partial(vcpu.set_reg, "pstate", 0x3C0 | mode)
            bench.call("KVM_SET_ONE_REG", f"{kind}, PSTATE mode {mode:#x}", change)
        for name, request in (("KVM_GET_REGS", 0x8360_AE81), ("KVM_SET_REGS", 0x4360_AE82)):
            bench.ioctl(name, kind, vcpu.fd, request, bytearray(0x360))
