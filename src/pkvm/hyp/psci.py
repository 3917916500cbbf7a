# SPDX-License-Identifier: GPL-2.0-or-later
"""PSCI 1.1 for guests whose registers EL2 keeps (Arm DEN 0022; facts §6.3).

What EL2 can answer by itself it does. Calls that need the host (a thread to
wake, a VM to end) exit to it, after EL2 has changed the power state: the host
is told, not asked.
"""

from __future__ import annotations

from collections.abc import Callable

from pkvm.arm64.psci import NOT_SUPPORTED, SUCCESS, Affinity, Function
from pkvm.arm64.registers import SCTLR_EE, SCTLR_EL1
from pkvm.arm64.smccc import Function as SmcccFunction
from pkvm.events import GuestHypercall, Recorder, VmLife
from pkvm.hyp import power
from pkvm.hyp.exits import ExitClass, Exits
from pkvm.hyp.vcpu import Vcpu
from pkvm.machine.cpu.engine import CpuEngine

Call = Callable[[Vcpu, int, int, int], int | None]
"""(vcpu, X1, X2, X3) -> the guest's X0; None: the vCPU exited to the host."""

_W_MASK = 0xFFFF_FFFF

FEATURES = frozenset(
    {
        Function.PSCI_VERSION,
        Function.CPU_SUSPEND_32,
        Function.CPU_SUSPEND_64,
        Function.CPU_OFF,
        Function.CPU_ON_32,
        Function.CPU_ON_64,
        Function.AFFINITY_INFO_32,
        Function.AFFINITY_INFO_64,
        Function.SYSTEM_OFF,
        Function.SYSTEM_RESET,
        Function.PSCI_FEATURES,
        Function.SYSTEM_RESET2_32,
        Function.SYSTEM_RESET2_64,
        SmcccFunction.SMCCC_VERSION,
    }
)
"""What PSCI_FEATURES says is there, and so what is there."""


class Psci:
    """The calls; `table` has them by function id. Any other id is not supported."""

    def __init__(self, engine: CpuEngine, exits: Exits, recorder: Recorder, version: int) -> None:
        self._engine = engine
        self._exits = exits
        self._record = recorder.record
        self._psci_version = version
        self.table: dict[int, Call] = {
            Function.PSCI_VERSION: self._version,
            Function.PSCI_FEATURES: self._features,
            Function.CPU_ON_32: self._cpu_on_32,
            Function.CPU_ON_64: self._cpu_on_64,
            Function.CPU_OFF: self._cpu_off,
            Function.AFFINITY_INFO_32: self._affinity_info_32,
            Function.AFFINITY_INFO_64: self._affinity_info_64,
            Function.CPU_SUSPEND_32: self._exit_for(Function.CPU_SUSPEND_32, ExitClass.CPU_SUSPEND),
            Function.CPU_SUSPEND_64: self._exit_for(Function.CPU_SUSPEND_64, ExitClass.CPU_SUSPEND),
            Function.SYSTEM_OFF: self._end_with(Function.SYSTEM_OFF),
            Function.SYSTEM_RESET: self._end_with(Function.SYSTEM_RESET),
            Function.SYSTEM_RESET2_32: self._exit_for(
                Function.SYSTEM_RESET2_32, ExitClass.SYSTEM_RESET2
            ),
            Function.SYSTEM_RESET2_64: self._exit_for(
                Function.SYSTEM_RESET2_64, ExitClass.SYSTEM_RESET2
            ),
        }

    def _version(self, vcpu: Vcpu, x1: int, x2: int, x3: int) -> int:
        return self._psci_version

    def _features(self, vcpu: Vcpu, x1: int, x2: int, x3: int) -> int:
        return SUCCESS if x1 & _W_MASK in FEATURES else NOT_SUPPORTED

    def _cpu_on_64(self, vcpu: Vcpu, x1: int, x2: int, x3: int) -> int | None:
        return self._cpu_on(Function.CPU_ON_64, vcpu, x1, x2, x3)

    def _cpu_on_32(self, vcpu: Vcpu, x1: int, x2: int, x3: int) -> int | None:
        return self._cpu_on(Function.CPU_ON_32, vcpu, x1 & _W_MASK, x2 & _W_MASK, x3 & _W_MASK)

    def _cpu_on(
        self, function: Function, vcpu: Vcpu, mpidr: int, entry: int, context: int
    ) -> int | None:
        endian = self._engine.read_sysreg(SCTLR_EL1) & SCTLR_EE
        result = power.request_on(vcpu, mpidr, entry, context, endian)
        if result != SUCCESS:
            return result
        self._record(VmLife("vcpu_on", vcpu.handle, vcpu.on_target))
        self._exit(vcpu, function, ExitClass.CPU_ON)
        return None

    def _cpu_off(self, vcpu: Vcpu, x1: int, x2: int, x3: int) -> None:
        vcpu.power = Affinity.OFF
        self._record(VmLife("vcpu_off", vcpu.handle, vcpu.index))
        self._record(GuestHypercall(vcpu.handle, vcpu.index, Function.CPU_OFF, SUCCESS))
        self._exit(vcpu, Function.CPU_OFF, ExitClass.CPU_OFF)

    def _affinity_info_64(self, vcpu: Vcpu, x1: int, x2: int, x3: int) -> int:
        return power.affinity_info(vcpu.vm, x1, x2)

    def _affinity_info_32(self, vcpu: Vcpu, x1: int, x2: int, x3: int) -> int:
        return power.affinity_info(vcpu.vm, x1 & _W_MASK, x2 & _W_MASK)

    def _end_with(self, function: Function) -> Call:
        """The call that ends the VM: it does not return, so it is announced here."""

        def call(vcpu: Vcpu, x1: int, x2: int, x3: int) -> None:
            self._record(GuestHypercall(vcpu.handle, vcpu.index, function, SUCCESS))
            self._exit(vcpu, function, ExitClass.SYSTEM_OFF)

        return call

    def _exit_for(self, function: Function, kind: ExitClass) -> Call:
        """A call that the host serves."""

        def call(vcpu: Vcpu, x1: int, x2: int, x3: int) -> None:
            self._exit(vcpu, function, kind)

        return call

    def _exit(self, vcpu: Vcpu, function: Function, kind: ExitClass) -> None:
        vcpu.exit_function = function
        self._exits.publish_call(vcpu, kind)
