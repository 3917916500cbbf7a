# SPDX-License-Identifier: GPL-2.0-or-later
"""PSCI of protected guests, and its races: the guest's word counts, whatever the host says."""

from __future__ import annotations

import pytest

from fakes import a64
from fakes.el2_rig import INCREMENT_PC, RAM_IPA, El2, Guest
from pkvm.arm64 import psci
from pkvm.arm64 import registers as r
from pkvm.arm64.psci import Affinity, Function
from pkvm.arm64.smccc import Function as Smccc
from pkvm.events import GuestHypercall
from pkvm.hyp.abi import ExitCode, HostVcpu, RunResult
from pkvm.hyp.psci import FEATURES

SECONDARY = RAM_IPA + 0x800
CONTEXT = 0xC0_FFEE


class Caller:
    """A guest whose vCPUs each execute `hvc; wfi` for ever; the test fills in X0-X3."""

    def __init__(self, vcpus: int = 3) -> None:
        self.el2 = El2()
        code = [a64.WFI, a64.HVC, 0x17FF_FFFE]
        code += [0] * (0x200 - len(code)) + code
        self.guest = Guest(self.el2, code, vcpus=vcpus)
        assert self.guest.run(0) == ExitCode.TRAP

    def call(self, *args: int, vcpu: int = 0) -> int:
        """Make a call from the vCPU's WFI: X0 in the guest if EL2 answered it by itself."""
        self.begin(*args, vcpu=vcpu)
        guest, engine = self.guest, self.el2.engine
        assert guest.ec(vcpu) == 1, "the call exited to the host"
        assert engine.x[1:4].tolist() == [0, 0, 0]
        return engine.x[0]

    def begin(self, *args: int, vcpu: int = 0) -> ExitCode:
        """Make a call that may exit to the host."""
        guest, engine = self.guest, self.el2.engine
        self.make_resident(vcpu)
        for number, value in enumerate((*args, 0x11, 0x22, 0x33)[:4]):
            engine.x[number] = value
        return guest.run(vcpu, flags=INCREMENT_PC)

    def make_resident(self, vcpu: int) -> None:
        """Run the vCPU into the same WFI once more."""
        assert self.guest.run(vcpu) == ExitCode.TRAP
        assert self.guest.ec(vcpu) == 1

    def finish(self, x0: int, vcpu: int = 0) -> int:
        """The host's answer to an exit: X0 that the guest gets."""
        self.guest.run(vcpu, x0=x0)
        engine = self.el2.engine
        assert engine.x[1:4].tolist() == [0, 0, 0]
        return engine.x[0]

    def power(self, vcpu: int) -> int:
        return self.guest.vcpu(vcpu).power

    def turn_on(self, vcpu: int, by: int = 0) -> None:
        self.begin(Function.CPU_ON_64, vcpu, SECONDARY, CONTEXT, vcpu=by)
        assert self.guest.run(vcpu) == ExitCode.TRAP
        assert self.finish(0, by) == psci.SUCCESS


@pytest.fixture
def caller() -> Caller:
    return Caller()


def test_versions(caller: Caller) -> None:
    assert caller.call(Function.PSCI_VERSION) == 0x1_0001


@pytest.mark.parametrize("function", [*Function, Smccc.SMCCC_VERSION, Smccc.MEM_SHARE, 0, 1 << 31])
def test_features_says_what_is_there(caller: Caller, function: int) -> None:
    result = psci.SUCCESS if function in FEATURES else psci.NOT_SUPPORTED
    assert caller.call(Function.PSCI_FEATURES, function | 0xABCD << 32) == result


@pytest.mark.parametrize(
    "function", [one for one in Function if one not in FEATURES] + [0xC400_0000, 0xC400_0002]
)
def test_everything_else_is_not_supported(caller: Caller, function: int) -> None:
    assert caller.call(function, 1, 2, 3) == psci.NOT_SUPPORTED


def test_cpu_on_starts_the_target_where_the_guest_said(caller: Caller) -> None:
    guest, engine = caller.guest, caller.el2.engine
    guest.set(HostVcpu.PC, 0x666, 1)
    guest.set(HostVcpu.X, 0x666, 1)
    assert caller.begin(Function.CPU_ON_64, 1, SECONDARY, CONTEXT) == ExitCode.TRAP
    assert guest.shown[RunResult.X0 : RunResult.X1 + 1] == (Function.CPU_ON_64, 1)
    assert caller.power(1) == Affinity.ON_PENDING
    assert caller.guest.run(1) == ExitCode.TRAP
    assert caller.power(1) == Affinity.ON
    assert (engine.pc, engine.x[0], engine.pstate) == (SECONDARY, CONTEXT, r.PSTATE_RESET)
    assert engine.read_sysreg(r.MPIDR_EL1) == 1 << 31 | 1
    assert [engine.x[n] for n in range(1, 31)] == [0] * 30
    assert caller.finish(0) == psci.SUCCESS
    call = caller.el2.events(GuestHypercall)[-1]
    assert (call.function, call.result) == (Function.CPU_ON_64, psci.SUCCESS)


def test_cpu_on_hands_on_the_callers_endianness(caller: Caller) -> None:
    engine = caller.el2.engine
    caller.make_resident(0)
    engine.write_sysreg(r.SCTLR_EL1, r.SCTLR_EL1_RESET | r.SCTLR_EE)
    caller.begin(Function.CPU_ON_64, 1, SECONDARY, CONTEXT)
    engine.write_sysreg(r.SCTLR_EL1, r.SCTLR_EL1_RESET)
    caller.guest.run(1)
    assert engine.read_sysreg(r.SCTLR_EL1) == r.SCTLR_EL1_RESET | r.SCTLR_EE


def test_cpu_on_of_32_bits_takes_32_bits(caller: Caller) -> None:
    dirt = 0xDEAD << 32
    caller.begin(Function.CPU_ON_32, 1 | dirt, SECONDARY | dirt, CONTEXT | dirt)
    assert caller.guest.shown[RunResult.X1] == 1
    caller.guest.run(1)
    assert (caller.el2.engine.pc, caller.el2.engine.x[0]) == (SECONDARY, CONTEXT)


@pytest.mark.parametrize(
    "mpidr", [3, 15, 0x100, 0x10000, 1 << 32, 1 << 31 | 1, 1 << 24 | 1, 1 << 40 | 1, (1 << 64) - 1]
)
def test_cpu_on_of_nobody(caller: Caller, mpidr: int) -> None:
    assert caller.call(Function.CPU_ON_64, mpidr, SECONDARY) == psci.INVALID_PARAMS


def test_cpu_on_of_oneself_or_of_one_that_runs(caller: Caller) -> None:
    assert caller.call(Function.CPU_ON_64, 0, SECONDARY) == psci.ALREADY_ON
    caller.turn_on(1)
    assert caller.call(Function.CPU_ON_64, 1, SECONDARY) == psci.ALREADY_ON


def test_a_second_cpu_on_while_the_first_is_pending(caller: Caller) -> None:
    caller.turn_on(2)
    caller.begin(Function.CPU_ON_64, 1, SECONDARY, 1)
    assert caller.call(Function.CPU_ON_64, 1, SECONDARY + 4, 2, vcpu=2) == psci.ON_PENDING
    caller.guest.run(1)
    assert (caller.el2.engine.pc, caller.el2.engine.x[0]) == (SECONDARY, 1)


def test_a_host_that_cannot_wake_the_target(caller: Caller) -> None:
    caller.begin(Function.CPU_ON_64, 1, SECONDARY, CONTEXT)
    assert caller.finish(psci.DENIED) == psci.INTERNAL_FAILURE
    assert caller.power(1) == Affinity.OFF
    assert caller.guest.run(1) == ExitCode.ILLEGAL
    caller.turn_on(1)


def test_a_host_that_lies_about_a_target_that_has_started(caller: Caller) -> None:
    caller.begin(Function.CPU_ON_64, 1, SECONDARY, CONTEXT)
    caller.guest.run(1)
    assert caller.finish(1) == psci.SUCCESS
    assert caller.power(1) == Affinity.ON


def test_a_late_failure_does_not_undo_somebody_elses_cpu_on(caller: Caller) -> None:
    """0 turns 1 on; 1 runs and turns itself off; 2 turns 1 on: now the host fails 0's call."""
    caller.turn_on(2)
    caller.begin(Function.CPU_ON_64, 1, SECONDARY, 1)
    caller.guest.run(1)
    caller.begin(Function.CPU_OFF, vcpu=1)
    assert caller.power(1) == Affinity.OFF
    caller.begin(Function.CPU_ON_64, 1, SECONDARY, 2, vcpu=2)
    assert caller.finish(psci.INTERNAL_FAILURE) == psci.SUCCESS
    assert caller.power(1) == Affinity.ON_PENDING
    caller.guest.run(1)
    assert caller.el2.engine.x[0] == 2


def test_cpu_off_and_on_again_is_a_reset(caller: Caller) -> None:
    engine = caller.el2.engine
    caller.turn_on(1)
    caller.make_resident(1)
    engine.x[20] = 0x5EC2E7
    engine.write_sysreg(r.TPIDR_EL1, 0x5EC2E7)
    assert caller.begin(Function.CPU_OFF, vcpu=1) == ExitCode.TRAP
    assert caller.guest.run(1, flags=INCREMENT_PC) == ExitCode.ILLEGAL
    assert caller.el2.refusals()[-1].check == "power"
    caller.turn_on(1)
    caller.make_resident(1)
    assert engine.x[20] == 0
    assert engine.read_sysreg(r.TPIDR_EL1) == 0


def test_affinity_info(caller: Caller) -> None:
    info = Function.AFFINITY_INFO_64
    assert caller.call(info, 0, 0) == Affinity.ON
    assert caller.call(info, 1, 0) == Affinity.OFF
    assert caller.call(info, 0x7, 1) == Affinity.ON
    assert caller.call(info, 3, 0) == psci.INVALID_PARAMS
    assert caller.call(info, 0x100, 1) == psci.INVALID_PARAMS
    assert caller.call(info, 0x100, 2) == Affinity.ON
    assert caller.call(info, 0x10000, 3) == Affinity.ON
    assert caller.call(info, 1 << 32, 3) == psci.INVALID_PARAMS
    assert caller.call(info, 0, 4) == psci.INVALID_PARAMS
    assert caller.call(info, 0, 1 << 32) == psci.INVALID_PARAMS
    assert caller.call(info, 1 << 31, 0) == psci.INVALID_PARAMS
    assert caller.call(Function.AFFINITY_INFO_32, 1 << 32 | 1, 1 << 32) == Affinity.OFF


def test_affinity_info_while_a_start_is_pending(caller: Caller) -> None:
    caller.turn_on(2)
    caller.begin(Function.CPU_ON_64, 1, SECONDARY)
    assert caller.call(Function.AFFINITY_INFO_64, 1, 0, vcpu=2) == Affinity.ON_PENDING
    caller.guest.run(1)
    assert caller.call(Function.AFFINITY_INFO_64, 1, 0, vcpu=2) == Affinity.ON


def test_only_vcpus_that_the_host_made_can_be_turned_on() -> None:
    el2 = El2()
    guest = Guest(el2, [a64.WFI, a64.HVC, a64.WFI], vcpus=1, created_vcpus=2)
    guest.run()
    el2.engine.x[0], el2.engine.x[1] = Function.CPU_ON_64, 1
    guest.run(flags=INCREMENT_PC)
    assert guest.ec() == 1
    assert el2.engine.x[0] == psci.INVALID_PARAMS


def test_two_vms_do_not_see_each_other() -> None:
    caller = Caller(vcpus=1)
    other = Guest(caller.el2, vcpus=2)
    assert caller.call(Function.CPU_ON_64, 1, SECONDARY) == psci.INVALID_PARAMS
    assert caller.call(Function.AFFINITY_INFO_64, 1, 0) == psci.INVALID_PARAMS
    assert other.vcpu(1).power == Affinity.OFF


def test_only_the_first_vcpu_that_enters_is_the_primary() -> None:
    el2 = El2()
    guest = Guest(el2, vcpus=2)
    assert guest.run(1) == ExitCode.TRAP
    assert el2.engine.read_sysreg(r.MPIDR_EL1) == 1 << 31 | 1
    assert guest.run(0) == ExitCode.ILLEGAL
    assert el2.refusals()[-1].check == "power"
