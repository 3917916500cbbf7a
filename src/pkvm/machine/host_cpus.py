# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's physical CPUs, as far as power and stage-2 are concerned.

The machine has one engine, which runs guests. What the host's kernel executes
is Python, so a host CPU is no more here than what decides where it comes up and
what it reaches: power, exception level, entry, the EL2 registers in force, and
a bus of its own behind the stage-2 that they name. At reset there is none: a CPU
that came up elsewhere than in EL2 would reach all memory.

EL2 is Python too. `el2_code` has what runs at EL2's addresses: a CPU that starts
at one of them runs it; one that starts anywhere else runs what lies there, at
EL2's own exception level and without a stage-2. So an SMC: `trap` is EL2's
vector, taken if the CPU has HCR_EL2.TSC set, else EL3 gets it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from pkvm.arm64.psci import Affinity
from pkvm.arm64.registers import hcr
from pkvm.events import CpuPower, Recorder
from pkvm.machine.bus import Bus
from pkvm.machine.memory import PhysicalMemory
from pkvm.machine.stage2 import Stage2Context

if TYPE_CHECKING:
    from pkvm.arm64.ffa import Registers

NR_HOST_CPUS = 4
MPIDRS = tuple(1 << 31 | index for index in range(NR_HOST_CPUS))
"""MPIDR_EL1 of each; bit 31 is RES1."""
AFFINITY_MASK = 0xFF_00FF_FFFF
"""The affinity fields of MPIDR_EL1, as PSCI names a CPU."""
_TSC = hcr("TSC")


class HostCpu:
    """One physical CPU. `bus` is its way to memory; its context is VTTBR_EL2 and VTCR_EL2 if
    HCR_EL2.VM is set, none otherwise."""

    def __init__(self, index: int, bus: Bus) -> None:
        self.index = index
        self.mpidr = MPIDRS[index]
        self.bus = bus
        self.power = Affinity.OFF
        self.suspended = False
        """Without power until an interrupt, but not OFF to others."""
        self.el = 2
        self.pc = 0
        self.x0 = 0
        self.sctlr_el1 = 0
        self.hcr_el2 = 0

    def reset(self, pc: int, x0: int) -> None:
        """Out of reset at EL2, the MMU off, no stage-2 in force."""
        self.el, self.pc, self.x0 = 2, pc, x0
        self.sctlr_el1 = self.hcr_el2 = 0
        self.bus.attach(None)

    def enter_host(
        self, pc: int, x0: int, *, sctlr_el1: int, hcr_el2: int, stage2: Stage2Context | None
    ) -> None:
        """EL2's ERET to EL1, with the registers that it has programmed."""
        self.el, self.pc, self.x0 = 1, pc, x0
        self.sctlr_el1, self.hcr_el2 = sctlr_el1, hcr_el2
        self.bus.attach(stage2)


class Trap(Protocol):
    """EL2's vector for an SMC of the host's."""

    def __call__(self, cpu: HostCpu, registers: Registers, immediate: int) -> Registers:
        """X0-X17 as the host gets them; none if the call does not return."""
        ...


class El3(Protocol):
    """EL3's vector for an SMC from below."""

    def __call__(self, cpu: HostCpu, registers: Registers) -> Registers:
        """X0-X17 as the caller gets them; none if the call does not return."""
        ...


class HostCpus:
    """All of them; `boot` runs from the start, its bus is the machine's `host_bus`.

    A CPU that was told to start comes up when the SMC that said so has ended; with `slow` set,
    when `come_up` is called. CPUs may call at the same time; EL3 and the secure world expect that
    whoever calls them lets one in at a time, as EL2 does.
    """

    def __init__(self, memory: PhysicalMemory, host_bus: Bus, recorder: Recorder) -> None:
        self._record = recorder.record
        self._lock = threading.Lock()
        """Held while a CPU's power changes."""
        others = [Bus(memory, f"host-cpu{index}", host_bus) for index in range(1, NR_HOST_CPUS)]
        self.cpus = tuple(HostCpu(index, bus) for index, bus in enumerate([host_bus, *others]))
        self.boot = self.cpus[0]
        self.boot.power, self.boot.el = Affinity.ON, 1
        self.trap: Trap | None = None
        self.el2_code: dict[int, Callable[[HostCpu], None]] = {}
        """By PA: what runs there."""
        self.slow = False

    def find(self, mpidr: int) -> HostCpu | None:
        """The CPU with these affinity fields."""
        for cpu in self.cpus:
            if cpu.mpidr & AFFINITY_MASK == mpidr:
                return cpu
        return None

    def smc(self, cpu: HostCpu, registers: Registers, immediate: int, firmware: El3) -> Registers:
        """Execute SMC #`immediate` on `cpu` at EL1. Returns X0-X17 afterwards; none if the
        instruction does not return, because the CPU has lost power. Raises ValueError for a CPU
        that is off: it executes nothing."""
        if cpu.power != Affinity.ON or cpu.suspended:
            raise ValueError(f"host CPU {cpu.index} has no power and executes no SMC")
        if cpu.hcr_el2 & _TSC and self.trap is not None:
            results = self.trap(cpu, registers, immediate)
        else:
            results = firmware(cpu, registers)
        if not self.slow:
            self.come_up()
        return results

    def start(self, cpu: HostCpu, pc: int, x0: int) -> None:
        """EL3 powers `cpu` up; it will come up at PA `pc` with `x0`."""
        with self._lock:
            cpu.power = Affinity.ON_PENDING
            cpu.reset(pc, x0)
            self._join()

    def stop(self, cpu: HostCpu) -> None:
        """EL3 powers `cpu` down; it keeps nothing."""
        with self._lock:
            cpu.power = Affinity.OFF
            cpu.reset(0, 0)
            self._join()
            self._record(CpuPower(cpu.index, "off"))

    def suspend(self, cpu: HostCpu, pc: int, x0: int) -> None:
        """EL3 powers `cpu` down until `wake`, when it comes up at PA `pc` with `x0`."""
        with self._lock:
            cpu.suspended = True
            cpu.reset(pc, x0)
            self._record(CpuPower(cpu.index, "suspend"))

    def wake(self, cpu: HostCpu) -> None:
        """An interrupt for `cpu`: if it is suspended it comes up."""
        with self._lock:
            if cpu.suspended:
                cpu.suspended = False
                self._run(cpu, "resume")

    def come_up(self) -> None:
        """The CPUs that were told to start do."""
        with self._lock:
            for cpu in self.cpus:
                if cpu.power == Affinity.ON_PENDING:
                    cpu.power = Affinity.ON
                    self._run(cpu, "on")

    def _join(self) -> None:
        """TLBI reaches the CPUs that have power; the others have nothing cached."""
        powered = (cpu for cpu in self.cpus if cpu.power != Affinity.OFF)
        self.boot.bus.peers = tuple(cpu.bus for cpu in powered if cpu is not self.boot)

    def _run(self, cpu: HostCpu, what: str) -> None:
        """Execute from `cpu.pc` on, at EL2."""
        code = self.el2_code.get(cpu.pc)
        if code is not None:
            code(cpu)
        self._record(CpuPower(cpu.index, what))
