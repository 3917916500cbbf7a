# SPDX-License-Identifier: GPL-2.0-or-later
"""`Hypervisor`: EL2 as a whole, with its four doors.

* `host_call`, the host's HVC;
* `host_smc`, the host's SMC, which traps (`host_smc`);
* the host's stage-2 faults, which its bus brings to `MemProtect.host_abort`;
* guests' exceptions, which the engine brings to `Vector.take`, inside VCPU_RUN.

Each takes numbers. What EL2 refuses leaves every state as it was; the caller
gets a negative errno, and the record the reason in words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from pkvm.arm64.bits import MASK64
from pkvm.arm64.registers import HOST_HCR
from pkvm.arm64.smccc import SVE_HINT
from pkvm.events import HostHypercall, Recorder, Refusal
from pkvm.hyp.abi import (
    HOST_CALL_BASE,
    SMCCC_NOT_SUPPORTED,
    SMCCC_SUCCESS,
    ExitCode,
    HostCall,
)
from pkvm.hyp.assignment import Assignment
from pkvm.hyp.donation import Donation
from pkvm.hyp.errors import Refused
from pkvm.hyp.exits import Exits
from pkvm.hyp.guest_calls import GuestCalls
from pkvm.hyp.host_calls import HostCalls
from pkvm.hyp.host_memory import BusMaster
from pkvm.hyp.id_registers import has_ptrauth
from pkvm.hyp.iommu import Iommu
from pkvm.hyp.lifecycle import Lifecycle
from pkvm.hyp.mem_protect import MemProtect, Range
from pkvm.hyp.nonprotected import NonProtected
from pkvm.hyp.ownership import make_event
from pkvm.hyp.policy import RFC, Policy
from pkvm.hyp.pviommu import Pviommu
from pkvm.hyp.run import PhysicalCpu
from pkvm.hyp.sysregs import SystemRegisters
from pkvm.hyp.timer import Timers
from pkvm.hyp.vector import Vector
from pkvm.hyp.vm import Vm, VmTable
from pkvm.machine.alarms import Alarm
from pkvm.machine.cpu.engine import CpuEngine
from pkvm.machine.host_cpus import HostCpu, HostCpus
from pkvm.machine.memory import PhysicalMemory
from pkvm.machine.smmu import DmaDevice, Smmu

if TYPE_CHECKING:
    from pkvm.arm64.ffa import Registers
    from pkvm.hyp.host_smc import HostSmcs

_FUNCTION_MASK = MASK64 & ~SVE_HINT
_NO_ARGUMENTS = (0,) * 8
_VCPU_RUN = int(HOST_CALL_BASE + HostCall.VCPU_RUN)


def _ran(result: int) -> HostHypercall:
    return HostHypercall(HostCall.VCPU_RUN.name, result)


_RAN = {int(code): _ran(int(code)) for code in ExitCode}
"""The event of a VCPU_RUN that ended with an exit: always the same few, and often needed."""


class Hardware(Protocol):
    """What EL2 needs of the machine; `pkvm.machine.machine.Machine` is one."""

    memory: PhysicalMemory
    host_cpus: HostCpus

    @property
    def engine(self) -> CpuEngine:
        """The physical CPU."""
        ...

    @property
    def host_bus(self) -> BusMaster:
        """The host CPU's way to memory."""
        ...

    @property
    def smmu(self) -> Smmu | None:
        """What stands before its DMA-capable devices, if it has any."""
        ...

    @property
    def dma_devices(self) -> tuple[DmaDevice, ...]:
        """These devices."""
        ...

    def new_timer(self) -> Alarm:
        """A timer of EL2's, which interrupts the host."""
        ...

    def el3(self, cpu: HostCpu, registers: Registers) -> Registers:
        """An SMC of EL2's on this CPU: X0-X17 afterwards, none if it does not return."""
        ...


class Hypervisor:
    """EL2 of one machine.

    `carveout` and `firmware` are (PA, bytes) of EL2's memory (`carveout_bytes` says how much) and
    of the guest firmware's image, if the boot firmware left one. With `protected` False the host
    keeps its reach of all memory, and no VM can be protected. Construct, `initialise`, then let
    the host run. Raises ValueError for bad regions.
    """

    def __init__(
        self,
        machine: Hardware,
        recorder: Recorder,
        *,
        carveout: Range,
        firmware: Range | None = None,
        protected: bool = True,
        policy: Policy = RFC,
    ) -> None:
        engine = machine.engine
        self._machine = machine
        self._recorder = recorder
        self._smcs: HostSmcs | None = None
        self._record = recorder.record
        self.mem = MemProtect(
            machine.memory,
            host_bus=machine.host_bus,
            smmu=machine.smmu,
            devices=machine.dma_devices,
            guest_tlbi=lambda vmid: self.cpu.flush_tlb(vmid),
            invalidate_code=engine.invalidate_code,
            recorder=recorder,
            carveout=carveout,
            firmware=firmware,
            protected=protected,
            policy=policy.memory,
        )
        self.table = VmTable()
        exits = Exits(engine, recorder)
        nonprotected = NonProtected(engine, recorder)
        smmu = self.mem.smmu if protected else None
        assignment = None
        if smmu is not None and policy.device_calls:
            assignment = Assignment(self.mem, smmu, self.table, recorder)
        pviommu = None if assignment is None else Pviommu(engine, assignment)
        calls = GuestCalls(engine, self.mem, exits, nonprotected, recorder, policy, pviommu)
        vector = Vector(
            engine,
            exits,
            nonprotected,
            calls,
            SystemRegisters(engine),
            recorder,
            host_shows_cpu=policy.isolation is None,
        )
        timers = Timers(engine, machine.new_timer)
        self.cpu = PhysicalCpu(
            engine, vector, exits, nonprotected, self.table, policy, recorder, timers
        )
        self._take, self._drop = self.cpu.lock.acquire, self.cpu.lock.release
        ptrauth = has_ptrauth(engine)
        life = Lifecycle(
            self.mem, self.table, self.cpu, recorder, policy, assignment, ptrauth=ptrauth
        )
        donation = Donation(self.mem, self.cpu, engine, recorder)
        iommu = None if smmu is None else Iommu(self.mem, smmu)
        self._calls = HostCalls(
            self.mem, self.table, self.cpu, life, donation, iommu, assignment
        ).table

    def initialise(self) -> None:
        """Take EL2's memory, and put the host and the devices behind stage-2."""
        self.mem.initialise()
        self.mem.finalise()
        if self.mem.protected:
            cpus = self._machine.host_cpus
            cpus.boot.hcr_el2 = HOST_HCR
            cpus.trap = self.host_smc

    def host_smc(self, cpu: HostCpu, registers: Registers, immediate: int) -> Registers:
        """The host's SMC #`immediate` on `cpu` with X0-X17 as given: the registers afterwards,
        none if the call does not return. Takes any 64-bit numbers; raises nothing for any of
        them. An exception is a bug of EL2's."""
        if self._smcs is None:
            # Imported here: most hosts never make an SMC.
            from pkvm.hyp.host_smc import HostSmcs

            machine = self._machine
            self._smcs = HostSmcs(self.mem, machine.host_cpus, machine.el3, self._recorder)
        return self._smcs.call(cpu, registers, immediate)

    def host_buffers(self) -> tuple[int, ...]:
        """PAs of the pages that EL2 has pinned for the host's FF-A messages."""
        return () if self._smcs is None else self._smcs.ffa.host_buffers

    def vms(self) -> list[Vm]:
        """Every VM that EL2 has, for those who check its state."""
        with self.cpu.lock:
            return self.table.vms()

    def host_call(
        self, function_id: int, x1: int = 0, x2: int = 0, x3: int = 0, *more: int
    ) -> tuple[int, ...]:
        """The host's HVC #0: X0 = `function_id` (HOST_CALL_BASE + n), arguments from X1 on.

        Returns X0 and X1, signed: (0, value or minus errno), or (-1, 0) for a function that does
        not exist; VCPU_RUN more registers (`RunResult`). Takes any numbers; raises nothing for any
        of them. An exception is a bug of EL2's.
        """
        function_id &= _FUNCTION_MASK
        if function_id == _VCPU_RUN:
            try:
                results = self.cpu.run(x1, x2, x3)
            except Refused as refused:
                results = SMCCC_SUCCESS, self._refuse(HostCall.VCPU_RUN.name, refused)
            self._record(_RAN.get(results[1]) or _ran(results[1]))
            return results
        entry = self._calls.get(function_id - HOST_CALL_BASE)
        if entry is None:
            why = f"function {function_id:#x} does not exist"
            self._record(Refusal("host_call", "function_id", 0, why))
            return SMCCC_NOT_SUPPORTED, 0
        name, arity, handler, done = entry
        # Spelt out: every page that changes hands comes by here.
        self._take()
        try:
            if arity == 3:
                result = handler(x1 & MASK64, x2 & MASK64, x3 & MASK64)
            elif arity == 2:
                result = handler(x1 & MASK64, x2 & MASK64)
            else:
                numbers = (x1, x2, x3, *more, *_NO_ARGUMENTS)[:arity]
                result = handler(*(number & MASK64 for number in numbers))
        except Refused as refused:
            result = self._refuse(name, refused)
        finally:
            self._drop()
        result = result or 0
        self._record(make_event(HostHypercall, (name, result)) if result else done)
        return SMCCC_SUCCESS, result

    def _refuse(self, name: str, refused: Refused) -> int:
        """Announce a refusal; the host's X1."""
        self._record(
            Refusal(
                name.lower(),
                refused.check,
                refused.errno,
                refused.why,
                refused.vm,
                refused.pa,
                refused.ipa,
            )
        )
        return -refused.errno
