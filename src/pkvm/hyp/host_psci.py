# SPDX-License-Identifier: GPL-2.0-or-later
"""The PSCI relay: power for the host's CPUs, without a way round EL2 (facts §9.4).

A CPU that firmware starts comes up at EL2's exception level with no stage-2. So
EL2 puts an entry of its own in the place of the host's, keeps what the host
wanted, and on the CPU that comes up installs the host's stage-2 and its traps
before the host's first instruction there. Calls that start nothing pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pkvm.arm64 import ffa
from pkvm.arm64.ffa import Registers
from pkvm.arm64.psci import (
    ALREADY_ON,
    INVALID_PARAMS,
    NOT_SUPPORTED,
    SUCCESS,
    Function,
    function_name,
)
from pkvm.arm64.registers import HOST_HCR, SCTLR_EL1_MMU_OFF
from pkvm.events import Recorder, Refusal
from pkvm.hyp.mem_protect import MemProtect
from pkvm.machine.host_cpus import AFFINITY_MASK, HostCpu, HostCpus
from pkvm.machine.stage2 import Stage2Context

FORWARDED = frozenset(
    {
        Function.PSCI_VERSION,
        Function.CPU_OFF,
        Function.AFFINITY_INFO_64,
        Function.MIGRATE_64,
        Function.MIGRATE_INFO_TYPE,
        Function.MIGRATE_INFO_UP_CPU_64,
        Function.SYSTEM_OFF,
        Function.SYSTEM_RESET,
        Function.SYSTEM_RESET2_64,
        Function.SYSTEM_OFF2_64,
        Function.PSCI_FEATURES,
        Function.SET_SUSPEND_MODE,
    }
)
"""Calls that the firmware gets as they are."""
_ENTRY_STEP = 0x80


class Wish(NamedTuple):
    """Where the host wants a CPU to begin, and X0 there."""

    pc: int
    x0: int


class PsciRelay:
    """The relay. The CPUs that there are when it is made are the ones that may be started; `el3`
    is EL3's vector. Whoever calls holds EL2's lock for SMCs."""

    def __init__(
        self,
        mem: MemProtect,
        cpus: HostCpus,
        el3: Callable[[HostCpu, Registers], Registers],
        recorder: Recorder,
    ) -> None:
        self._mem = mem
        self._el3 = el3
        self._record = recorder.record
        self._known = {cpu.mpidr & AFFINITY_MASK: cpu.index for cpu in cpus.cpus}
        self._booting: dict[int, Wish] = {}
        """By CPU number: CPU_ON was asked for, and the CPU is not there yet."""
        self._suspended: dict[int, Wish] = {}
        self.on_entry = mem.carveout[0]
        """PA of EL2's code for a CPU that was started. (EL2's code is Python; the address stands
        for it, in memory that the host cannot write.)"""
        self.resume_entry = self.on_entry + _ENTRY_STEP
        """PA of EL2's code for a CPU that wakes."""
        cpus.el2_code[self.on_entry] = self._started
        cpus.el2_code[self.resume_entry] = self._resumed

    def call(self, cpu: HostCpu, function: int, registers: Registers) -> Registers:
        """A call in PSCI's range from `cpu`: X0-X17 for the host, X1-X3 of them 0; none if it does
        not return."""
        x1, x2, x3 = registers[1:4]
        if function == Function.CPU_ON_64:
            result: int | None = self._cpu_on(cpu, x1, x2, x3)
        elif function == Function.CPU_SUSPEND_64:
            result = self._suspend(cpu, Wish(x2, x3), function, x1)
        elif function == Function.SYSTEM_SUSPEND_64:
            result = self._suspend(cpu, Wish(x1, x2), function)
        elif function in FORWARDED:
            result = self._firmware(cpu, function, x1, x2, x3)
        else:
            result = self._refuse(function, "psci_function", "EL2 does not relay it", NOT_SUPPORTED)
        return () if result is None else (result, 0, 0, 0, *registers[4:])

    def _cpu_on(self, cpu: HostCpu, mpidr: int, pc: int, x0: int) -> int:
        target = self._known.get(mpidr)
        if target is None:
            why = f"there was no CPU {mpidr:#x} when EL2 was initialised"
            return self._refuse(Function.CPU_ON_64, "known_cpu", why, INVALID_PARAMS)
        if target in self._booting:
            why = f"CPU {mpidr:#x} is starting already"
            return self._refuse(Function.CPU_ON_64, "single_start", why, ALREADY_ON)
        self._booting[target] = Wish(pc, x0)
        result = self._firmware(cpu, Function.CPU_ON_64, mpidr, self.on_entry, target)
        if result != SUCCESS:
            del self._booting[target]
        return NOT_SUPPORTED if result is None else result

    def _suspend(self, cpu: HostCpu, wish: Wish, function: int, *state: int) -> int | None:
        """CPU_SUSPEND, which has a power state before the entry, and SYSTEM_SUSPEND. Returns if the
        CPU has kept its state."""
        self._suspended[cpu.index] = wish
        return self._firmware(cpu, function, *state, self.resume_entry, cpu.index)

    def _started(self, cpu: HostCpu) -> None:
        """EL2's entry on a CPU that CPU_ON started."""
        self._enter_host(cpu, self._booting.pop(cpu.index))

    def _resumed(self, cpu: HostCpu) -> None:
        """EL2's entry on a CPU that wakes without state."""
        self._enter_host(cpu, self._suspended.pop(cpu.index))

    def _enter_host(self, cpu: HostCpu, wish: Wish) -> None:
        """The host's stage-2 and EL2's traps, then the host as if firmware had started it."""
        tree = self._mem.host.stage2
        cpu.bus.on_fault = self._mem.host_abort
        cpu.enter_host(
            wish.pc,
            wish.x0,
            sctlr_el1=SCTLR_EL1_MMU_OFF,
            hcr_el2=HOST_HCR,
            stage2=Stage2Context(tree.vttbr, tree.vtcr),
        )

    def _firmware(self, cpu: HostCpu, *numbers: int) -> int | None:
        """Call EL3: its X0; None if it does not return."""
        results = self._el3(cpu, ffa.registers(*numbers))
        return results[0] if results else None

    def _refuse(self, function: int, check: str, why: str, result: int) -> int:
        self._record(Refusal(function_name(function), check, 0, why))
        return result
