# SPDX-License-Identifier: GPL-2.0-or-later
"""Host CPUs that come and go in any order, against a model; none is ever a way round EL2."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fakes.doors import Doors
from fakes.el2_rig import PAGE
from pkvm.arm64 import psci
from pkvm.arm64.psci import Affinity, Function
from pkvm.arm64.registers import HOST_HCR, SCTLR_EL1_MMU_OFF
from pkvm.check.firmware_doors import check_doors
from pkvm.check.invariants import check
from pkvm.machine.firmware_psci import POWER_DOWN
from pkvm.machine.host_cpus import NR_HOST_CPUS, HostCpu
from pkvm.machine.stage2 import Stage2Fault

cpus = st.integers(0, NR_HOST_CPUS - 1)
entries = st.integers(0, (1 << 64) - 1)
ON, OFF, STARTING, ASLEEP = "on", "off", "starting", "asleep"


class HostCpuPower(RuleBasedStateMachine):
    """`power[cpu]`: what a CPU is; `wish[cpu]`: where it begins when it comes up, and its X0."""

    def __init__(self) -> None:
        super().__init__()
        self.doors = Doors()
        self.cpus = self.doors.machine.host_cpus
        self.cpus.slow = True
        self.power = [ON] + [OFF] * (NR_HOST_CPUS - 1)
        self.wish: dict[int, tuple[int, int]] = {}
        self.page = self.doors.pages(2)
        self.lost = False

    def smc(self, cpu: int, *numbers: int) -> int | None:
        """X0, None if the call does not return; a CPU without power makes none."""
        answer = self.doors.smc(*numbers, cpu=cpu)
        assert answer[1:4] in ((), (0, 0, 0))
        return answer[0] if answer else None

    def runs(self, cpu: int) -> bool:
        if self.power[cpu] == ON:
            return True
        with pytest.raises(ValueError, match="no power"):
            self.doors.smc(Function.PSCI_VERSION, cpu=cpu)
        return False

    def others(self, cpu: int) -> list[str]:
        return [state for other, state in enumerate(self.power) if other != cpu]

    @rule(cpu=cpus, other=cpus | st.integers(), pc=entries, x0=entries)
    def cpu_on(self, cpu: int, other: int, pc: int, x0: int) -> None:
        if not self.runs(cpu):
            return
        result = self.smc(cpu, Function.CPU_ON_64, other & (1 << 64) - 1, pc, x0)
        if not 0 <= other < NR_HOST_CPUS:
            assert result == psci.INVALID_PARAMS
        elif self.power[other] == OFF:
            assert result == psci.SUCCESS
            self.power[other] = STARTING
            self.wish[other] = pc, x0
        else:
            assert result == psci.ALREADY_ON

    @rule(cpu=cpus)
    def cpu_off(self, cpu: int) -> None:
        if self.runs(cpu):
            result = self.smc(cpu, Function.CPU_OFF)
            if set(self.others(cpu)) == {OFF}:
                assert result == psci.DENIED
            else:
                assert result is None
                self.power[cpu] = OFF

    @rule(cpu=cpus, pc=entries, x0=entries, deep=st.booleans())
    def cpu_suspend(self, cpu: int, pc: int, x0: int, deep: bool) -> None:
        if self.runs(cpu):
            result = self.smc(cpu, Function.CPU_SUSPEND_64, deep * POWER_DOWN, pc, x0)
            assert result == (None if deep else psci.SUCCESS)
            self.sleep(cpu, pc, x0, deep)

    @rule(cpu=cpus, pc=entries, x0=entries)
    def system_suspend(self, cpu: int, pc: int, x0: int) -> None:
        if self.runs(cpu):
            result = self.smc(cpu, Function.SYSTEM_SUSPEND_64, pc, x0)
            alone = set(self.others(cpu)) == {OFF}
            assert result == (None if alone else psci.DENIED)
            self.sleep(cpu, pc, x0, alone)

    def sleep(self, cpu: int, pc: int, x0: int, does: bool) -> None:
        if does:
            self.power[cpu] = ASLEEP
            self.wish[cpu] = pc, x0

    @rule(cpu=cpus)
    def interrupt(self, cpu: int) -> None:
        self.cpus.wake(self.cpus.cpus[cpu])
        if self.power[cpu] == ASLEEP:
            self.came_up(cpu)

    @rule()
    def come_up(self) -> None:
        self.cpus.come_up()
        for cpu, state in enumerate(self.power):
            if state == STARTING:
                self.came_up(cpu)

    def came_up(self, number: int) -> None:
        self.power[number] = ON
        cpu = self.cpus.cpus[number]
        assert (cpu.pc, cpu.x0) == self.wish.pop(number)
        assert (cpu.sctlr_el1, cpu.hcr_el2) == (SCTLR_EL1_MMU_OFF, HOST_HCR)

    @rule(asking=cpus, cpu=cpus)
    def affinity_info(self, asking: int, cpu: int) -> None:
        if self.runs(asking):
            state = {OFF: Affinity.OFF, STARTING: Affinity.ON_PENDING}
            wanted = state.get(self.power[cpu], Affinity.ON)
            assert self.smc(asking, Function.AFFINITY_INFO_64, cpu, 0) == wanted

    @rule()
    def page_goes_or_comes(self) -> None:
        """Between host and EL2."""
        mem = self.doors.hyp.mem
        change = mem.hyp_donate_host if self.lost else mem.host_donate_hyp
        change(self.page >> 12, 1)
        self.lost = not self.lost

    @rule(cpu=cpus)
    def touch(self, cpu: int) -> None:
        if self.power[cpu] == ON:
            assert self.reaches(self.cpus.cpus[cpu], self.page) != self.lost
            assert self.reaches(self.cpus.cpus[cpu], self.page + PAGE)

    @invariant()
    def nobody_is_a_way_round(self) -> None:
        hyp = self.doors.hyp
        assert check(hyp.mem, hyp.vms()) == []
        assert check_doors(hyp, self.doors.machine) == []
        for number, state in enumerate(self.power):
            if state == ON:
                cpu = self.cpus.cpus[number]
                assert not self.reaches(cpu, hyp.mem.carveout[0])

    def reaches(self, cpu: HostCpu, pa: int) -> bool:
        try:
            cpu.bus.read(pa, 8)
        except Stage2Fault:
            return False
        return True


TestHostCpuPower = HostCpuPower.TestCase
TestHostCpuPower.settings = settings(
    max_examples=20,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
