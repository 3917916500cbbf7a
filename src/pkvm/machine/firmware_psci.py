# SPDX-License-Identifier: GPL-2.0-or-later
"""PSCI 1.1 in EL3 (Arm DEN 0022): power for the host's CPUs.

An entry point is a physical address at which the CPU comes up at the highest
exception level of the normal world, which is EL2's. The firmware believes its
caller about it.
"""

from __future__ import annotations

from collections.abc import Callable

from pkvm.arm64.psci import (
    ALREADY_ON,
    DENIED,
    INVALID_PARAMS,
    NOT_SUPPORTED,
    ON_PENDING,
    SUCCESS,
    VERSION_1_1,
    Affinity,
    Function,
)
from pkvm.machine.host_cpus import HostCpu, HostCpus

POWER_DOWN = 1 << 16
"""CPU_SUSPEND's power state: the CPU loses its state and comes up at the entry point. Without, it
waits for an interrupt, and the call returns."""
MIGRATION_NOT_REQUIRED = 2
"""MIGRATE_INFO_TYPE: there is no trusted OS that must move."""
_W = 0xFFFF_FFFF

Call = Callable[[HostCpu, int, int, int], int | None]
"""(calling CPU, X1, X2, X3) -> X0; None: the call does not return."""


class PsciFirmware:
    """The calls by function id."""

    def __init__(self, cpus: HostCpus) -> None:
        self._cpus = cpus
        self.system_state = "on"
        """"on", "off" or "reset": what the last SYSTEM_OFF or SYSTEM_RESET asked for. The
        machine's user decides what becomes of that; the caller does not run on."""
        self._calls: dict[int, Call] = {
            Function.PSCI_VERSION: lambda cpu, x1, x2, x3: VERSION_1_1,
            Function.PSCI_FEATURES: self._features,
            Function.CPU_ON_64: self._cpu_on,
            Function.CPU_ON_32: _narrow(self._cpu_on),
            Function.CPU_OFF: self._cpu_off,
            Function.CPU_SUSPEND_64: self._cpu_suspend,
            Function.SYSTEM_SUSPEND_64: self._system_suspend,
            Function.AFFINITY_INFO_64: self._affinity_info,
            Function.AFFINITY_INFO_32: _narrow(self._affinity_info),
            Function.MIGRATE_INFO_TYPE: lambda cpu, x1, x2, x3: MIGRATION_NOT_REQUIRED,
            Function.SYSTEM_OFF: lambda cpu, x1, x2, x3: self._end("off"),
            Function.SYSTEM_RESET: lambda cpu, x1, x2, x3: self._end("reset"),
            Function.SYSTEM_RESET2_64: lambda cpu, x1, x2, x3: self._end("reset"),
        }

    def call(self, cpu: HostCpu, function: int, x1: int, x2: int, x3: int) -> int | None:
        """A PSCI call from `cpu`: X0, or None if it does not return."""
        handler = self._calls.get(function)
        return NOT_SUPPORTED if handler is None else handler(cpu, x1, x2, x3)

    def _features(self, cpu: HostCpu, function: int, x2: int, x3: int) -> int:
        return SUCCESS if function & _W in self._calls else NOT_SUPPORTED

    def _cpu_on(self, cpu: HostCpu, mpidr: int, entry: int, context: int) -> int:
        target = self._cpus.find(mpidr)
        if target is None:
            return INVALID_PARAMS
        if target.power != Affinity.OFF:
            return ON_PENDING if target.power == Affinity.ON_PENDING else ALREADY_ON
        self._cpus.start(target, entry, context)
        return SUCCESS

    def _cpu_off(self, cpu: HostCpu, x1: int, x2: int, x3: int) -> int | None:
        if not self._others_on(cpu):
            return DENIED
        self._cpus.stop(cpu)
        return None

    def _cpu_suspend(self, cpu: HostCpu, state: int, entry: int, context: int) -> int | None:
        if not state & POWER_DOWN:
            return SUCCESS
        self._cpus.suspend(cpu, entry, context)
        return None

    def _system_suspend(self, cpu: HostCpu, entry: int, context: int, x3: int) -> int | None:
        if self._others_on(cpu):
            return DENIED
        self._cpus.suspend(cpu, entry, context)
        return None

    def _affinity_info(self, cpu: HostCpu, mpidr: int, level: int, x3: int) -> int:
        target = self._cpus.find(mpidr)
        if target is None or level:
            return INVALID_PARAMS
        return int(target.power)

    def _others_on(self, cpu: HostCpu) -> bool:
        return any(other.power != Affinity.OFF for other in self._cpus.cpus if other is not cpu)

    def _end(self, state: str) -> None:
        self.system_state = state


def _narrow(call: Call) -> Call:
    """The 32-bit form of a call."""
    return lambda cpu, x1, x2, x3: call(cpu, x1 & _W, x2 & _W, x3 & _W)
