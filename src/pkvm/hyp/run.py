# SPDX-License-Identifier: GPL-2.0-or-later
"""The physical CPU: which vCPU is loaded, whose context it holds, and running it (facts §5.2-5.4).

At most one vCPU is *loaded*: the one that VCPU_RUN runs. The *resident* vCPU is
the one whose context the engine holds; it stays there after VCPU_PUT, and only
when another one is to run are its registers saved to its own donated area. A
CPU's TLB has no VMIDs here, so every switch flushes it.

The lock is EL2's: every host call holds it, but not while the guest runs. A
host thread that calls meanwhile is another CPU of the host's, on which nothing
is loaded.
"""

from __future__ import annotations

import threading

from pkvm.arm64.esr import EC, EC_SHIFT, FSC_TRANSLATION, FSC_TYPE_MASK, HPFAR_FIPA_MASK
from pkvm.arm64.psci import Affinity
from pkvm.arm64.registers import HCR_EL2, MIDR_EL1, VTTBR_EL2
from pkvm.events import Recorder, Refusal, VmLife
from pkvm.hyp import reset
from pkvm.hyp.abi import ExitCode
from pkvm.hyp.errors import Errno, HypBug, Refused
from pkvm.hyp.exits import ExitClass, Exits, nothing_but
from pkvm.hyp.nonprotected import WHOLE, NonProtected
from pkvm.hyp.policy import Isolation, Policy
from pkvm.hyp.timer import Timers
from pkvm.hyp.traps import WAIT_TRAPS, control_registers, hcr_of
from pkvm.hyp.vcpu import CONTEXT_LIMIT, Vcpu
from pkvm.hyp.vector import Vector
from pkvm.hyp.vgic import VirtualGic
from pkvm.hyp.vm import Vm, VmTable
from pkvm.machine.cpu.engine import CpuEngine, StopReason

# Values and places that every entry needs; a member of an enumeration is slow to look up.
_VECTOR = StopReason.VECTOR
_ILLEGAL = int(ExitClass.ILLEGAL)
_ON = int(Affinity.ON)
_ABORTS = (
    ExitClass.IABT,
    ExitClass.DABT,
    ExitClass.MMIO_READ,
    ExitClass.MMIO_WRITE,
    ExitClass.NONPROTECTED,
)
"""Exits that may be for an abort."""
_ABORT_ECS = (EC.IABT_LOW, EC.DABT_LOW)
_EXIT_CLASS, _POWER = Vcpu.index_of("exit_class"), Vcpu.index_of("power")


class PhysicalCpu:
    """Load, put, run. Raises HypBug if the engine's context does not fit a vCPU's area."""

    def __init__(
        self,
        engine: CpuEngine,
        vector: Vector,
        exits: Exits,
        nonprotected: NonProtected,
        table: VmTable,
        policy: Policy,
        recorder: Recorder,
        timers: Timers,
    ) -> None:
        if engine.context_bytes > CONTEXT_LIMIT:
            raise HypBug(f"a context of {engine.context_bytes:#x} bytes does not fit a vCPU's area")
        self.lock = threading.RLock()
        self._take, self._drop = self.lock.acquire, self.lock.release
        self._engine = engine
        self._vector = vector
        self._exits = exits
        self._nonprotected = nonprotected
        self._table = table
        self._policy = policy
        self._record = recorder.record
        self._timers = timers
        self._interface = engine.gic
        self._vgic = VirtualGic(engine.gic)
        self._midr = engine.read_sysreg(MIDR_EL1)
        self._loaded: Vcpu | None = None
        self._resident: Vcpu | None = None
        self._ready: Vcpu | None = None
        """The resident vCPU, if all of EL2's registers are what it needs."""
        self._running = False

    def loaded(self, protected: bool | None = None) -> Vcpu:
        """The vCPU loaded on the caller's CPU. Raises Refused(EINVAL) if there is none, or if its
        VM is not of the kind that is asked for."""
        vcpu = None if self._running else self._loaded
        if vcpu is None:
            raise Refused(Errno.EINVAL, "loaded", "no vCPU is loaded on this CPU")
        if protected is not None and vcpu.vm.protected != protected:
            kind = "protected" if vcpu.vm.protected else "not protected"
            raise Refused(Errno.EINVAL, "vm_kind", f"the VM is {kind}", vm=vcpu.handle)
        return vcpu

    def load(self, handle: int, index: int, hcr: int) -> None:
        """VCPU_LOAD. What cannot be loaded is silently not: nothing is loaded then, which is
        announced, but is no error to the host."""
        vm = self._table.find(handle)
        why = ""
        if self._loaded is not None:
            why = "a vCPU is loaded already"
        elif vm is None or vm.dying:
            why = "there is no such VM, or it dies"
        elif index >= len(vm.vcpus) or vm.vcpus[index] is None:
            why = f"the VM has no vCPU {index}"
        if why:
            self._record(Refusal("vcpu_load", "vcpu", 0, why, vm.handle if vm else 0))
            return
        assert vm is not None
        vcpu = vm.vcpus[index]
        assert vcpu is not None
        vcpu.loaded = 1
        if vcpu.wait_traps != hcr & WAIT_TRAPS:
            vcpu.wait_traps = hcr & WAIT_TRAPS
            self._ready = None
        vm.users += 1
        self._loaded = vcpu

    def put(self) -> None:
        """VCPU_PUT: nothing is loaded. The page of a vCPU that is not isolated is made current."""
        vcpu = self._loaded
        if vcpu is None or self._running:
            return
        if not vcpu.vm.isolated:
            self._sync(vcpu)
        vcpu.loaded = 0
        vcpu.vm.users -= 1
        self._loaded = None

    def sync_state(self) -> None:
        """VCPU_SYNC_STATE. Raises Refused(EINVAL) if none is loaded, or one whose registers are not
        the host's to see."""
        vcpu = self.loaded()
        if vcpu.vm.isolated:
            why = "the vCPU's registers are not the host's to see"
            raise Refused(Errno.EINVAL, "vm_kind", why, vm=vcpu.handle)
        self._sync(vcpu)

    def run(self, flags: int, x0: int, nr_lrs: int = 0) -> tuple[int, ...]:
        """VCPU_RUN: run the loaded vCPU until an exit for the host. `flags` and `x0` are the host's
        answer to its last exit, and it has `nr_lrs` list registers. Returns X0 to X7; raises
        Refused(EINVAL) if none is loaded. Called without the lock."""
        # Spelt out: a `with` costs a third more, at every exit.
        self._take()
        try:
            vcpu = self._loaded
            if vcpu is None or self._running:
                vcpu = self.loaded()
            isolated, words = vcpu.vm.isolated, vcpu.words
            kind = words[_EXIT_CLASS]
            # The usual cases, without another call.
            if vcpu is not self._ready or kind == _ILLEGAL or (isolated and words[_POWER] != _ON):
                entered = self._enter(vcpu, flags, x0)
            elif isolated:
                self._exits.accept(vcpu, kind, flags, x0)
                entered = True
            else:
                entered = self._nonprotected.enter(vcpu, flags) or self._bad_pstate(vcpu)
            if not entered:
                return nothing_but(ExitCode.ILLEGAL)
            if nr_lrs or self._vgic.loaded:
                self._vgic.load(vcpu, nr_lrs)
            self._running = True
        finally:
            self._drop()
        try:
            if self._engine.run() is not _VECTOR:
                self._vector.interrupted(vcpu)
            if self._interface.changed:
                self._vgic.publish(vcpu)
            return self._exits.results if isolated else self._nonprotected.results
        finally:
            self._running = False

    def timer_output(self, handle: int, index: int) -> int:
        """VCPU_TIMER. Raises Refused(ENOENT) if there is no such vCPU."""
        vm = self._table.get(handle)
        vcpu = vm.vcpus[index] if index < len(vm.vcpus) else None
        if vcpu is None:
            raise Refused(Errno.ENOENT, "vcpu_index", f"the VM has no vCPU {index}", vm=handle)
        return self._timers.output(vcpu, vcpu is self._resident)

    def fault_ipa(self, vcpu: Vcpu) -> int:
        """The page at which a protected vCPU's last exit found nothing mapped, as EL2 itself knows
        it. Raises Refused(EINVAL) if the last exit was for something else."""
        esr = 0
        if vcpu.words[_EXIT_CLASS] in _ABORTS:
            self._switch_to(vcpu)
            esr = self._engine.esr_el2
        if esr >> EC_SHIFT not in _ABORT_ECS:
            raise Refused(Errno.EINVAL, "exit_class", "the last exit was no abort", vm=vcpu.handle)
        if esr & FSC_TYPE_MASK != FSC_TRANSLATION:
            raise Refused(Errno.EINVAL, "fsc", "it was no translation fault", vm=vcpu.handle)
        return (self._engine.hpfar_el2 & HPFAR_FIPA_MASK) << 8

    def flush_tlb(self, vmid: int) -> None:
        """TLBI and DSB for a VM. Only the one whose context the CPU holds has anything there."""
        resident = self._resident
        if resident is not None and resident.vm.stage2.vmid == vmid:
            self._engine.flush_tlb()

    def forget(self, vm: Vm) -> None:
        """The VM is over: nothing of it stays in the CPU, neither registers nor TLB entries."""
        engine = self._engine
        self._timers.forget(vm)
        if self._resident is not None and self._resident.vm is vm:
            self._vgic.forget()
            self._resident = None
            self._ready = None
            engine.reset_context()
            engine.write_sysreg(VTTBR_EL2, 0)
        engine.flush_tlb()

    def _enter(self, vcpu: Vcpu, flags: int, x0: int) -> bool:
        """Get everything ready for the guest. False if the vCPU cannot run: nothing has changed
        then."""
        isolation = self._policy.isolation
        if isolation is None or not vcpu.vm.isolated:
            return self._enter_nonprotected(vcpu, flags)
        kind = vcpu.words[_EXIT_CLASS]
        if kind == _ILLEGAL:
            return self._cannot_run(vcpu, "illegal", "its last exit was illegal")
        power = vcpu.words[_POWER]
        if power == _ON:
            self._switch_to(vcpu)
            self._exits.accept(vcpu, kind, flags, x0)
        elif vcpu.started_by_host:
            return self._start_primary(vcpu, isolation)
        elif power == Affinity.ON_PENDING:
            self._switch_to(vcpu)
            reset.start_secondary(self._engine, vcpu)
            self._record(VmLife("vcpu_started", vcpu.handle, vcpu.index))
        elif vcpu.vm.entered or isolation.primary_at_init:
            return self._cannot_run(vcpu, "power", "it is off: only the guest turns it on")
        else:
            return self._start_primary(vcpu, isolation)
        return True

    def _start_primary(self, vcpu: Vcpu, isolation: Isolation) -> bool:
        vm = vcpu.vm
        if isolation.needs_firmware and not vm.firmware_loaded:
            return self._cannot_run(vcpu, "firmware", "the VM's firmware is not in place")
        self._switch_to(vcpu)
        reset.start_primary(self._engine, vcpu, isolation)
        self._record(VmLife("primary", vcpu.handle, vcpu.index))
        return True

    def _enter_nonprotected(self, vcpu: Vcpu, flags: int) -> bool:
        if vcpu.exit_class == ExitClass.ILLEGAL:
            return self._cannot_run(vcpu, "illegal", "its last exit was illegal")
        self._switch_to(vcpu)
        return self._nonprotected.enter(vcpu, flags) or self._bad_pstate(vcpu)

    def _bad_pstate(self, vcpu: Vcpu) -> bool:
        return self._cannot_run(vcpu, "pstate", "its PSTATE is not of EL1 or EL0 in AArch64")

    def _cannot_run(self, vcpu: Vcpu, check: str, why: str) -> bool:
        self._record(Refusal("vcpu_run", check, 0, f"vCPU {vcpu.index}: {why}", vcpu.handle))
        return False

    def _switch_to(self, vcpu: Vcpu) -> None:
        """Make `vcpu` resident, and program EL2's registers for it."""
        engine = self._engine
        if self._resident is vcpu:
            if self._ready is not vcpu:
                engine.write_sysreg(HCR_EL2, hcr_of(vcpu))
                self._ready = vcpu
            return
        if self._resident is not None:
            engine.save_context(self._resident.pa)
            self._timers.save(self._resident)
            self._vgic.save(self._resident)
        if vcpu.started:
            engine.load_context(vcpu.pa)
        else:
            engine.reset_context()
        self._timers.restore(vcpu)
        self._vgic.restore(vcpu)
        for register, value in control_registers(vcpu, self._midr):
            engine.write_sysreg(register, value)
        engine.flush_tlb()
        self._resident = vcpu
        self._ready = vcpu
        self._vector.select(vcpu)

    def _sync(self, vcpu: Vcpu) -> None:
        """Make the host's page of a vCPU that is not isolated current; before the first entry it is
        the host's."""
        if vcpu.started and vcpu.page_is_current != WHOLE:
            self._switch_to(vcpu)
            self._nonprotected.sync(vcpu)
