# SPDX-License-Identifier: GPL-2.0-or-later
"""EL2's exception vector: every exception of a guest that targets EL2 comes here.

Two tables of 64 handlers, by exception class (ESR_EL2.EC). A handler returns
True to go on with the guest, False to leave it: then the exit is published.

A protected guest that is found in AArch32 state, or has an exception that no
handler is for, never runs again. HVC, SMC and trapped system registers can
only come from AArch64 state: their classes say so.
"""

from __future__ import annotations

from collections.abc import Callable

from pkvm.arm64.bits import MASK64
from pkvm.arm64.esr import EC, EC_SHIFT, ISV, SYS64_READ, WNR
from pkvm.arm64.registers import PSTATE_NRW
from pkvm.arm64.smccc import NOT_SUPPORTED
from pkvm.events import GuestHypercall, GuestTrap, Recorder, Refusal
from pkvm.hyp import inject
from pkvm.hyp.exits import ExitClass, Exits
from pkvm.hyp.guest_calls import GuestCalls
from pkvm.hyp.nonprotected import NonProtected
from pkvm.hyp.sysregs import SystemRegisters, Verdict
from pkvm.hyp.vcpu import Vcpu
from pkvm.machine.cpu.engine import CpuEngine

Handler = Callable[[Vcpu, int], bool]
"""(vcpu, ESR_EL2) -> whether to go on with the guest."""
_CLASSES = 64


class Vector:
    """The vector of one CPU; `select` says for which vCPU."""

    def __init__(
        self,
        engine: CpuEngine,
        exits: Exits,
        nonprotected: NonProtected,
        calls: GuestCalls,
        sysregs: SystemRegisters,
        recorder: Recorder,
    ) -> None:
        self._engine = engine
        self._exits = exits
        self._nonprotected = nonprotected
        self._calls = calls
        self._sysregs = sysregs
        self._record = recorder.record
        self._vcpu: Vcpu | None = None
        self._handlers: list[Handler] = []
        self._protected = _table(
            self._unhandled,
            {
                EC.HVC64: self._hvc,
                EC.SMC64: self._smc,
                EC.SYS64: self._sys64,
                EC.WFX: self._wfx,
                EC.IABT_LOW: self._iabt,
                EC.DABT_LOW: self._dabt,
                EC.UNKNOWN: self._undefined,
                EC.SVE: self._undefined,
                EC.PAUTH: self._undefined,
            },
        )
        self._open = _table(self._to_host, {EC.SYS64: self._sys64_open})
        engine.vector = self.take

    def select(self, vcpu: Vcpu) -> None:
        """The exceptions to come are `vcpu`'s."""
        self._vcpu = vcpu
        self._handlers = self._protected if vcpu.vm.protected else self._open

    def take(self) -> bool:
        """The engine calls this for each exception; see `CpuEngine.vector`."""
        assert self._vcpu is not None
        esr = self._engine.esr_el2
        return self._handlers[esr >> EC_SHIFT](self._vcpu, esr)

    def interrupted(self, vcpu: Vcpu) -> None:
        """The engine came back for an interrupt, or its slice was over."""
        if not vcpu.vm.protected:
            self._nonprotected.exit_irq(vcpu)
        elif self._is_aarch32():
            self._drop(vcpu, 0, "the guest is in AArch32 state")
        else:
            self._exits.publish(vcpu, ExitClass.IRQ)

    # Protected

    def _hvc(self, vcpu: Vcpu, esr: int) -> bool:
        return self._calls.hvc(vcpu)

    def _smc(self, vcpu: Vcpu, esr: int) -> bool:
        """Nothing below EL2 may call EL3; the PC is still at the SMC."""
        engine = self._engine
        function = engine.x[0] & 0xFFFF_FFFF
        engine.x[0] = NOT_SUPPORTED
        engine.pc = (engine.pc + 4) & MASK64
        self._record(GuestTrap(vcpu.handle, vcpu.index, "smc", esr))
        self._record(GuestHypercall(vcpu.handle, vcpu.index, function, NOT_SUPPORTED))
        return True

    def _sys64(self, vcpu: Vcpu, esr: int) -> bool:
        verdict = self._sysregs.access(esr)
        if verdict is Verdict.HOST:
            read = esr & SYS64_READ
            self._exits.publish(
                vcpu, ExitClass.SYSREG_READ if read else ExitClass.SYSREG_WRITE, esr
            )
            return False
        if verdict is Verdict.UNDEFINED:
            inject.undefined(self._engine)
        self._record(GuestTrap(vcpu.handle, vcpu.index, verdict.value, esr))
        return True

    def _wfx(self, vcpu: Vcpu, esr: int) -> bool:
        return self._exit(vcpu, ExitClass.WFX, esr)

    def _iabt(self, vcpu: Vcpu, esr: int) -> bool:
        return self._exit(vcpu, ExitClass.IABT, esr)

    def _dabt(self, vcpu: Vcpu, esr: int) -> bool:
        if not esr & ISV:
            return self._exit(vcpu, ExitClass.DABT, esr)
        return self._exit(vcpu, ExitClass.MMIO_WRITE if esr & WNR else ExitClass.MMIO_READ, esr)

    def _undefined(self, vcpu: Vcpu, esr: int) -> bool:
        """An instruction that the guest's ID registers do not have. Some CPUs give a trapped one
        EC 0 (unknown reason)."""
        if self._is_aarch32():
            return self._drop(vcpu, esr, "the guest is in AArch32 state")
        inject.undefined(self._engine)
        self._record(GuestTrap(vcpu.handle, vcpu.index, "undef", esr))
        return True

    def _unhandled(self, vcpu: Vcpu, esr: int) -> bool:
        if self._is_aarch32():
            return self._drop(vcpu, esr, "the guest is in AArch32 state")
        return self._drop(vcpu, esr, f"exception class {esr >> EC_SHIFT:#x} has no handler")

    def _exit(self, vcpu: Vcpu, kind: ExitClass, esr: int) -> bool:
        if self._is_aarch32():
            return self._drop(vcpu, esr, "the guest is in AArch32 state")
        self._exits.publish(vcpu, kind, esr)
        return False

    def _drop(self, vcpu: Vcpu, esr: int, why: str) -> bool:
        """The vCPU never runs again."""
        vcpu.unusable = 1
        self._exits.publish(vcpu, ExitClass.ILLEGAL, esr)
        self._record(Refusal("vcpu_run", "exit_class", 0, why, vcpu.handle))
        return False

    def _is_aarch32(self) -> int:
        return self._engine.pstate & PSTATE_NRW

    # Non-protected

    def _to_host(self, vcpu: Vcpu, esr: int) -> bool:
        self._nonprotected.exit_trap(vcpu, esr)
        return False

    def _sys64_open(self, vcpu: Vcpu, esr: int) -> bool:
        """EL2 serves what it would for a protected guest, so that both see the same CPU."""
        verdict = self._sysregs.access(esr)
        if verdict is not Verdict.SERVED:
            return self._to_host(vcpu, esr)
        self._record(GuestTrap(vcpu.handle, vcpu.index, verdict.value, esr))
        return True


def _table(default: Handler, handlers: dict[EC, Handler]) -> list[Handler]:
    table = [default] * _CLASSES
    for ec, handler in handlers.items():
        table[ec] = handler
    return table
