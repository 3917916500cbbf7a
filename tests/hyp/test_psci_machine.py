# SPDX-License-Identifier: GPL-2.0-or-later
"""PSCI's power states against a model, whatever guest and host do and in whatever order.

The model is the specification's: a vCPU is OFF, ON_PENDING or ON; only the guest
turns it on, and the host can do no more than fail a start that has not happened.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fakes import a64
from fakes.el2_rig import INCREMENT_PC, RAM_IPA, El2, Guest
from pkvm.arm64 import psci
from pkvm.arm64.psci import Affinity, Function
from pkvm.hyp.abi import ExitCode, RunResult

VCPUS = 4
ENTRY = RAM_IPA + 0x800
ANY_VCPU = st.integers(0, VCPUS - 1)


@dataclass
class Cpu:
    """What the model knows of a vCPU."""

    power: Affinity = Affinity.OFF
    requested_by: int = -1
    context: int = 0
    """X0 at its next start."""
    waits_for: int = -1
    """The target of a CPU_ON that the host has not answered."""
    exited: bool = False
    """At an exit for a call: the host's answer is due."""
    contexts: list[int] = field(default_factory=list)


class Power(RuleBasedStateMachine):
    @initialize()
    def boot(self) -> None:
        self.el2 = El2()
        code = [a64.WFI, a64.HVC, 0x17FF_FFFE]
        code += [0] * (0x200 - len(code)) + code
        self.guest = Guest(self.el2, code, vcpus=VCPUS)
        self.cpus = [Cpu() for _ in range(VCPUS)]
        self.entered = False
        self.next_context = 1

    def at_wfi(self, vcpu: int) -> bool:
        """Bring an ON vCPU without an unanswered exit to its WFI, resident."""
        cpu = self.cpus[vcpu]
        if cpu.power != Affinity.ON or cpu.exited:
            return False
        assert self.guest.run(vcpu) == ExitCode.TRAP
        assert self.guest.ec(vcpu) == 1
        return True

    def call(self, vcpu: int, *args: int) -> int | None:
        """X0 of a call, None if it exited."""
        for number, value in enumerate((*args, 0, 0, 0)[:4]):
            self.el2.engine.x[number] = value
        assert self.guest.run(vcpu, flags=INCREMENT_PC) == ExitCode.TRAP
        if self.guest.ec(vcpu) == 1:
            return self.el2.engine.x[0]
        assert self.guest.shown[RunResult.X0] == args[0]
        self.cpus[vcpu].exited = True
        return None

    @rule(vcpu=ANY_VCPU)
    def host_runs(self, vcpu: int) -> None:
        """The host runs a vCPU, whether it may or not."""
        cpu = self.cpus[vcpu]
        if cpu.exited:
            return
        code = self.guest.run(vcpu, x0=vcpu + 1)
        if cpu.power == Affinity.OFF and self.entered:
            assert code == ExitCode.ILLEGAL
            return
        assert code == ExitCode.TRAP
        if cpu.power == Affinity.ON_PENDING:
            assert self.el2.engine.x[0] == cpu.context
            assert self.el2.engine.pc == ENTRY
        cpu.power, self.entered = Affinity.ON, True

    @rule(caller=ANY_VCPU, wanted=st.integers(0, VCPUS))
    def cpu_on(self, caller: int, wanted: int) -> None:
        if not self.at_wfi(caller):
            return
        context = self.next_context
        self.next_context += 1
        result = self.call(caller, Function.CPU_ON_64, wanted, ENTRY, context)
        if wanted == VCPUS:
            assert result == psci.INVALID_PARAMS
            return
        cpu = self.cpus[wanted]
        if cpu.power == Affinity.OFF:
            assert result is None
            cpu.power, cpu.context, cpu.requested_by = Affinity.ON_PENDING, context, caller
            self.cpus[caller].waits_for = wanted
        elif cpu.power == Affinity.ON_PENDING:
            assert result == psci.ON_PENDING
        else:
            assert result == psci.ALREADY_ON

    @rule(vcpu=ANY_VCPU, answer=st.sampled_from([0, 1, psci.DENIED, (1 << 64) - 1]))
    def host_answers_cpu_on(self, vcpu: int, answer: int) -> None:
        cpu = self.cpus[vcpu]
        if not cpu.exited or cpu.waits_for < 0:
            return
        target = self.cpus[cpu.waits_for]
        undone = answer != 0 and target.power == Affinity.ON_PENDING and target.requested_by == vcpu
        assert self.guest.run(vcpu, x0=answer) == ExitCode.TRAP
        assert self.el2.engine.x[0] == (psci.INTERNAL_FAILURE if undone else psci.SUCCESS)
        if undone:
            target.power = Affinity.OFF
        cpu.exited, cpu.waits_for = False, -1

    @rule(vcpu=ANY_VCPU)
    def cpu_off(self, vcpu: int) -> None:
        if self.at_wfi(vcpu):
            assert self.call(vcpu, Function.CPU_OFF) is None
            self.cpus[vcpu] = Cpu()

    @rule(vcpu=ANY_VCPU, of=ANY_VCPU)
    def affinity_info(self, vcpu: int, of: int) -> None:
        if self.at_wfi(vcpu):
            assert self.call(vcpu, Function.AFFINITY_INFO_64, of, 0) == self.cpus[of].power

    @precondition(lambda self: self.entered)
    @rule(vcpu=ANY_VCPU)
    def affinity_of_all(self, vcpu: int) -> None:
        if self.at_wfi(vcpu):
            assert self.call(vcpu, Function.AFFINITY_INFO_64, 0, 1) == Affinity.ON

    @invariant()
    def el2_agrees(self) -> None:
        if hasattr(self, "cpus"):
            assert [self.guest.vcpu(n).power for n in range(VCPUS)] == [
                cpu.power for cpu in self.cpus
            ]


Power.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestPower = Power.TestCase
