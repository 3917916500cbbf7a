# SPDX-License-Identifier: GPL-2.0-or-later
"""vCPUs: features, KVM_ARM_VCPU_INIT once and again, ids, and those that come late."""

from __future__ import annotations

from functools import partial

from pkvm.check.scenarios.bench import CODE, Bench, BenchVm
from pkvm.guests.protocol import Info
from pkvm.kvm import Vcpu
from pkvm.uapi.kvm import VCPU_INIT, Ioctl, VcpuFeature

TITLE = "vCPU features, late and double vCPUs"
_PSCI = 1 << VcpuFeature.PSCI_0_2
_OTHERS = (
    (0, "none"), (1 << 0, "POWER_OFF"), (1 << 1, "EL1_32BIT"), (1 << 3, "PMU_V3"),
    (1 << 4, "SVE"), (1 << 5, "PTRAUTH_ADDRESS"), (1 << 6, "PTRAUTH_GENERIC"), (1 << 7, "HAS_EL2"),
    (1 << 8, "HAS_EL2_E2H0"), (1 << 9, "PMU_V3_STRICT"), (1 << 10, "bit 10"), (1 << 31, "bit 31"),
    (3 << 5, "PTRAUTH both"), (3 << 5 | 1 << 4 | 1 << 3, "PTRAUTH both, SVE, PMU_V3"),
)  # fmt: skip


def _init(
    bench: Bench, vcpu: Vcpu, says: str, words: int, target: int | None = None, second: int = 0
) -> None:
    """KVM_ARM_VCPU_INIT with these feature words: recorded."""
    if target is None:
        target = vcpu.vm.preferred_target()
    argument = bytearray(VCPU_INIT.pack(target, words, second, 0, 0, 0, 0, 0))
    bench.ioctl("KVM_ARM_VCPU_INIT", says, vcpu.fd, Ioctl.ARM_VCPU_INIT, argument)


def _vcpu(bench: Bench, vm: BenchVm, vcpu_id: int = 0) -> Vcpu:
    """KVM_CREATE_VCPU and nothing more; not recorded."""
    vcpu = vm.vm.create_vcpu(vcpu_id)
    bench.adopt(vcpu)
    return vcpu


def good_features_protected(bench: Bench) -> None:
    """Every feature that can be asked for, and whether such a vCPU runs."""
    _features(bench, protected=True)


def good_features(bench: Bench) -> None:
    """Likewise of a non-protected VM's."""
    _features(bench, protected=False)


def _features(bench: Bench, protected: bool) -> None:
    for bits, says in _OTHERS:
        vm = bench.vm(protected=protected)
        vcpu = _vcpu(bench, vm)
        _init(bench, vcpu, f"PSCI and {says}", _PSCI | bits)
        # Powered off it would wait; in AArch32 the agent's code means something else.
        if not bits & 1 and (protected or not bits & 2):
            _set_pc(bench, vcpu, CODE, says)
            vm.guest(vcpu).start(says)
        vcpu.close()
        vm.vm.close()


def _set_pc(bench: Bench, vcpu: Vcpu, pc: int, says: str) -> None:
    bench.call("KVM_SET_ONE_REG", f"PC, {says}", lambda: vcpu.set_reg("pc", pc))


def good_without_psci(bench: Bench) -> None:
    """A vCPU that asked for no PSCI 0.2."""
    for protected in (True, False):
        vm = bench.vm(protected=protected)
        vcpu = _vcpu(bench, vm)
        _init(bench, vcpu, "no feature", 0)
        vcpu.set_reg("pc", CODE)
        guest = vm.guest(vcpu)
        guest.start()
        guest.hvc(0x8400_0000, says="PSCI_VERSION", show=1)
        guest.hvc(0x95C1_BA5E, says="KVM_PSCI_FN_CPU_SUSPEND", show=1)
        guest.hvc(0x95C1_BA60, 9, 0, says="KVM_PSCI_FN_CPU_ON", show=1)


def bad_init_protected(bench: Bench) -> None:
    """Targets, words and orders that are refused."""
    _bad_init(bench, bench.vm())


def bad_init(bench: Bench) -> None:
    """Likewise of a non-protected VM's."""
    _bad_init(bench, bench.vm(protected=False))


def _bad_init(bench: Bench, vm: BenchVm) -> None:
    vcpu = _vcpu(bench, vm)
    bench.call("KVM_RUN", "no KVM_ARM_VCPU_INIT", vcpu.run)
    bench.call("KVM_GET_ONE_REG", "no KVM_ARM_VCPU_INIT", lambda: vcpu.get_reg("x0"))
    bench.call("KVM_SET_ONE_REG", "no KVM_ARM_VCPU_INIT", lambda: vcpu.set_reg("x0", 1))
    bench.call("KVM_GET_REG_LIST", "no KVM_ARM_VCPU_INIT", lambda: len(vcpu.reg_list()))
    bench.call("KVM_GET_MP_STATE", "no KVM_ARM_VCPU_INIT", lambda: vcpu.mp_state)
    for target in (0, 4, 6, 1 << 31, (1 << 32) - 1):
        _init(bench, vcpu, f"target {target:#x}", _PSCI, target)
    bench.call("KVM_ARM_PREFERRED_TARGET", "", vm.vm.preferred_target)
    _init(bench, vcpu, "second word", _PSCI, second=1)
    _init(bench, vcpu, "PSCI", _PSCI)
    _init(bench, vcpu, "again", _PSCI)
    _init(bench, vcpu, "again, POWER_OFF", _PSCI | 1)
    bench.call("KVM_GET_MP_STATE", "", lambda: vcpu.mp_state)
    _init(bench, vcpu, "again, without POWER_OFF", _PSCI)
    bench.call("KVM_GET_MP_STATE", "", lambda: vcpu.mp_state)
    _init(bench, vcpu, "again, another feature", _PSCI | 1 << 3)
    _init(bench, vcpu, "again, without PSCI", 0)
    second = _vcpu(bench, vm, 1)
    _init(bench, second, "second vCPU, other features", 0)
    _init(bench, second, "second vCPU, the same", _PSCI)


def bad_ids(bench: Bench) -> None:
    """vCPU ids: double ones, and those that are none."""
    for protected in (True, False):
        vm = bench.vm(protected=protected, code=False)
        for vcpu_id in (0, 0, 1, 511, 511, 512, 513, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32):
            says = f"{'protected' if protected else 'non-protected'}, {vcpu_id:#x}"
            bench.call("KVM_CREATE_VCPU", says, partial(vm.vm.create_vcpu, vcpu_id))


def bad_late_protected(bench: Bench) -> None:
    """A vCPU that comes after the protected VM has run: it initialises, and does not run."""
    _late(bench, bench.vm())


def good_late(bench: Bench) -> None:
    """A vCPU that comes late to a non-protected VM."""
    _late(bench, bench.vm(protected=False))


def _late(bench: Bench, vm: BenchVm) -> None:
    first = vm.agent()
    first.load(CODE, 4)
    vcpu = bench.call("KVM_CREATE_VCPU", "1, after the first run", lambda: vm.vm.create_vcpu(1))
    assert vcpu is not None
    bench.call("KVM_RUN", "vCPU 1, not initialised", vcpu.run)
    _init(bench, vcpu, "late", _PSCI)
    bench.call("KVM_GET_MP_STATE", "late", lambda: vcpu.mp_state)
    _set_pc(bench, vcpu, first.agent.info()[Info.SECONDARY], "late")
    second = vm.guest(vcpu)
    second.start("late")
    second.start("late, again")
    bench.call("KVM_CREATE_VCPU", "1 once more", lambda: vm.vm.create_vcpu(1))
    first.load(CODE, 4)


def good_init_after_run_protected(bench: Bench) -> None:
    """KVM_ARM_VCPU_INIT resets a protected vCPU that has run."""
    _init_after_run(bench, bench.vm())


def good_init_after_run(bench: Bench) -> None:
    """Likewise a non-protected one."""
    _init_after_run(bench, bench.vm(protected=False))


def _init_after_run(bench: Bench, vm: BenchVm) -> None:
    guest = vm.agent()
    vcpu = guest.vcpu
    guest.execute(0xD518_C000, x=(0x1234_5000,), says="VBAR_EL1 is set", show=0)
    _init(bench, vcpu, "after the run", _PSCI)
    for name in ("pc", "pstate", "x0", "x28", "sp_el1"):
        bench.call("KVM_GET_ONE_REG", name, partial(vcpu.get_reg, name))
    _set_pc(bench, vcpu, CODE, "after the run")
    again = vm.guest(vcpu)
    again.start("anew")
    again.load(CODE, 4)
    _init(bench, vcpu, "after the run, another feature", _PSCI | 1 << 3)
    again.load(CODE, 4)


def good_two(bench: Bench) -> None:
    """Two vCPUs that start by themselves, in turns."""
    for protected in (True, False):
        vm = bench.vm(protected=protected)
        one, two = vm.vcpu(0), vm.vcpu(1)
        first, second = vm.guest(one), vm.guest(two)
        first.start()
        two.set_reg("pc", first.agent.info()[Info.SECONDARY])
        second.start()
        first.store(0x4000_0000, 0x51)
        second.load(0x4000_0000)
        second.mrs("MPIDR_EL1", (3, 0, 0, 0, 5))
        first.mrs("MPIDR_EL1", (3, 0, 0, 0, 5))
