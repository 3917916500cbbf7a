# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's CPUs and EL3: without EL2 in the way, what a CPU that starts reaches."""

from __future__ import annotations

import pytest

from pkvm.arm64 import ffa, psci, smccc
from pkvm.arm64.ffa import Registers
from pkvm.arm64.psci import Affinity, Function
from pkvm.arm64.registers import hcr
from pkvm.events import CpuPower, Event
from pkvm.machine.bus import Bus
from pkvm.machine.firmware import SIP_ECHO, Firmware
from pkvm.machine.firmware_psci import POWER_DOWN
from pkvm.machine.host_cpus import MPIDRS, HostCpu, HostCpus
from pkvm.machine.memory import PhysicalMemory
from pkvm.machine.secure import SecureWorld

RAM = 0x8000_0000


class Metal:
    """Host CPUs and EL3, with the boot CPU at EL1 and nobody at EL2."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        memory = PhysicalMemory(RAM, 1 << 20)
        self.cpus = HostCpus(memory, Bus(memory, "host"), self)
        self.el3 = Firmware(self.cpus, SecureWorld(memory, self))

    def record(self, event: Event, /) -> None:
        self.events.append(event)

    def smc(self, *numbers: int, cpu: int = 0, immediate: int = 0) -> Registers:
        registers = ffa.registers(*numbers)
        return self.cpus.smc(self.cpus.cpus[cpu], registers, immediate, self.el3.call)

    def power(self, cpu: int) -> int:
        return self.smc(Function.AFFINITY_INFO_64, MPIDRS[cpu] & 0xFF, 0)[0]


def test_a_cpu_comes_up_where_it_was_told_at_el2() -> None:
    metal = Metal()
    assert [metal.power(cpu) for cpu in range(4)] == [0, 1, 1, 1]
    assert metal.smc(Function.CPU_ON_64, 1, RAM + 0x40, 7)[0] == 0
    cpu = metal.cpus.cpus[1]
    assert (cpu.power, cpu.el, cpu.pc, cpu.x0, cpu.hcr_el2) == (Affinity.ON, 2, RAM + 0x40, 7, 0)
    assert cpu.bus.context is None
    assert metal.smc(Function.CPU_ON_64, 1, RAM, 0)[0] == psci.ALREADY_ON
    assert metal.smc(Function.CPU_ON_64, 9, RAM, 0)[0] == psci.INVALID_PARAMS
    assert metal.smc(Function.CPU_OFF, cpu=1) == ()
    assert metal.power(1) == Affinity.OFF
    assert metal.events == [CpuPower(1, "on"), CpuPower(1, "off")]


def test_while_it_is_starting() -> None:
    metal = Metal()
    metal.cpus.slow = True
    metal.smc(Function.CPU_ON_64, 2, RAM, 0)
    assert metal.power(2) == Affinity.ON_PENDING
    assert metal.smc(Function.CPU_ON_64, 2, RAM, 0)[0] == psci.ON_PENDING
    with pytest.raises(ValueError, match="no power"):
        metal.smc(Function.PSCI_VERSION, cpu=2)
    metal.cpus.come_up()
    assert metal.smc(Function.PSCI_VERSION, cpu=2)[0] == psci.VERSION_1_1


def test_el2s_addresses_are_el2s_code_and_its_traps_are_taken() -> None:
    metal = Metal()
    seen = []

    def entry(cpu: HostCpu) -> None:
        seen.append(cpu.index)
        cpu.enter_host(5, 6, sctlr_el1=7, hcr_el2=hcr("TSC"), stage2=None)

    def trap(cpu: HostCpu, registers: Registers, immediate: int) -> Registers:
        return ffa.registers(cpu.index, immediate, registers[1])

    metal.cpus.el2_code[RAM] = entry
    metal.cpus.trap = trap
    metal.smc(Function.CPU_ON_64, 3, RAM, 0)
    assert seen == [3]
    assert metal.cpus.cpus[3].el == 1
    assert metal.smc(1, 2, cpu=3, immediate=9)[:3] == (3, 9, 2)
    assert metal.smc(Function.PSCI_VERSION)[0] == psci.VERSION_1_1, "no TSC, no trap"


def test_suspend_and_wake() -> None:
    metal = Metal()
    assert metal.smc(Function.CPU_SUSPEND_64, 0, RAM, 1)[0] == 0
    assert metal.smc(Function.CPU_SUSPEND_64, POWER_DOWN, RAM + 8, 1) == ()
    cpu = metal.cpus.boot
    assert cpu.suspended
    assert cpu.power == Affinity.ON
    metal.cpus.wake(cpu)
    metal.cpus.wake(cpu)
    assert (cpu.pc, cpu.x0, cpu.el) == (RAM + 8, 1, 2)
    metal.smc(Function.CPU_ON_64, 1, RAM, 0)
    assert metal.smc(Function.SYSTEM_SUSPEND_64, RAM, 0)[0] == psci.DENIED
    metal.smc(Function.CPU_OFF, cpu=1)
    assert metal.smc(Function.CPU_OFF)[0] == psci.DENIED, "the last one"
    assert metal.smc(Function.SYSTEM_SUSPEND_64, RAM, 3) == ()
    assert [event for event in metal.events if event == CpuPower(0, "resume")] != []


def test_other_calls() -> None:
    metal = Metal()
    assert metal.smc(smccc.Function.SMCCC_VERSION)[0] == smccc.VERSION_1_2
    echo = metal.smc(SIP_ECHO, (1 << 64) - 1, *range(2, 18))
    assert echo == (0, 0, *range(2, 18))
    assert metal.smc(0xC300_0000)[0] == smccc.NOT_SUPPORTED
    assert metal.smc(Function.MEM_PROTECT)[0] == psci.NOT_SUPPORTED
    assert metal.smc(Function.PSCI_FEATURES, Function.CPU_ON_64)[0] == 0
    assert metal.smc(Function.PSCI_FEATURES, 0x8400_001F)[0] == psci.NOT_SUPPORTED
    assert metal.smc(Function.MIGRATE_INFO_TYPE)[0] == 2
    assert metal.smc(Function.AFFINITY_INFO_32, 1, 1)[0] == psci.INVALID_PARAMS
    assert metal.smc(Function.SYSTEM_RESET) == ()
    assert metal.el3.psci.system_state == "reset"


def test_firmware_ignores_what_it_does_not_need_of_x0() -> None:
    """Which is why EL2 must not let it through."""
    metal = Metal()
    for junk in (1 << 32, 1 << 63, 1 << 16, 1 << 17, 1 << 23):
        assert metal.smc(junk | Function.PSCI_VERSION)[0] == psci.VERSION_1_1
        assert metal.smc(junk | ffa.Function.FFA_ID_GET)[0] == ffa.Function.FFA_SUCCESS_32


def test_an_invalidation_reaches_all_cpus() -> None:
    metal = Metal()
    boot, other = metal.cpus.boot.bus, metal.cpus.cpus[1].bus
    metal.cpus.start(metal.cpus.cpus[1], 0, 0)
    other.read(RAM, 8)
    assert other.holds(RAM)
    boot.invalidate(RAM)
    assert not other.holds(RAM)
    other.read(RAM, 8)
    boot.invalidate()
    assert not other.holds(RAM)
    other.read(RAM, 8)
    assert other.holds(RAM)
    boot.invalidate(RAM)
    assert not other.holds(RAM)
    other.read(RAM, 8)
    metal.cpus.stop(metal.cpus.cpus[1])
    assert not other.holds(RAM), "without power nothing stays cached"
