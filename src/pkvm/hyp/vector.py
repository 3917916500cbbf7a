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
from pkvm.arm64.esr import EC, EC_SHIFT, SYS64_READ
from pkvm.arm64.registers import PSTATE_NRW
from pkvm.arm64.smccc import NOT_SUPPORTED
from pkvm.events import GuestHypercall, GuestTrap, Recorder, Refusal
from pkvm.hyp import inject
from pkvm.hyp.exits import ExitClass, Exits
from pkvm.hyp.guest_calls import FUNCTION_MASK, UNSUPPORTED, GuestCalls
from pkvm.hyp.nonprotected import NonProtected
from pkvm.hyp.sysregs import SystemRegisters, Verdict
from pkvm.hyp.vcpu import Vcpu
from pkvm.machine.cpu.engine import CpuEngine

Handler = Callable[[Vcpu, int], bool]
"""(vcpu, ESR_EL2) -> whether to go on with the guest."""
_CLASSES = 64
_W_MASK = 0xFFFF_FFFF
_AARCH32 = "the guest is in AArch32 state"


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
        *,
        host_shows_cpu: bool = False,
    ) -> None:
        self._engine = engine
        self._host_shows_cpu = host_shows_cpu
        self._exits = exits
        self._nonprotected = nonprotected
        self._calls = calls
        self._sysregs = sysregs
        self._record = recorder.record
        self._protected = _table(
            self._unhandled,
            {
                EC.SMC64: self._smc,
                EC.SYS64: self._sys64,
                EC.WFX: self._wfx,
                EC.IABT_LOW: self._iabt,
                EC.UNKNOWN: self._undefined,
                EC.SVE: self._undefined,
                EC.PAUTH: self._undefined,
            },
        )
        self._open = _table(self._to_host, {EC.SYS64: self._sys64_open})
        self._exposed = _table(
            self._to_host,
            {
                EC.HVC64: self._hvc_exposed,
                EC.SYS64: self._sys64_exposed,
                EC.SVE: self._undefined_exposed,
                EC.PAUTH: self._undefined_exposed,
            },
        )

    def select(self, vcpu: Vcpu) -> None:
        """The exceptions to come are `vcpu`'s."""
        engine = self._engine
        if vcpu.vm.isolated:
            engine.vector = self._make_isolating_vector(vcpu)
            return
        if vcpu.vm.protected:
            engine.vector = self._make_exposing_vector(vcpu)
            return
        handlers = self._open

        def vector() -> bool:
            esr = engine.esr_el2
            return handlers[esr >> EC_SHIFT](vcpu, esr)

        engine.vector = vector

    def _make_exposing_vector(self, vcpu: Vcpu) -> Callable[[], bool]:
        """The vector while the protected `vcpu`, whose registers are the host's to see, is on the
        CPU. Each page that the guest touches for the first time comes here as a data abort."""
        state, to_host = self._engine.trap_state, self._nonprotected.exit_trap
        handlers, data_abort = self._exposed, int(EC.DABT_LOW)

        def vector() -> bool:
            trap = state()
            esr, _, pstate, _, _, _ = trap
            if pstate & PSTATE_NRW:
                return self._drop(vcpu, _AARCH32)
            if esr >> EC_SHIFT != data_abort:
                return handlers[esr >> EC_SHIFT](vcpu, esr)
            to_host(vcpu, trap)
            return False

        return vector

    def _make_isolating_vector(self, vcpu: Vcpu) -> Callable[[], bool]:
        """The vector while `vcpu`, whose registers EL2 keeps, is on the CPU. Hypercalls and
        accesses to devices are what guests pay for most: they are served right here, with
        everything at hand, and a hypercall's event is made as a tuple is, since
        `GuestHypercall(...)` is one more Python call."""
        syndrome, x = self._engine.syndrome, self._engine.x
        handlers = self._protected
        find, record = self._calls.services.get, self._record
        handle, index = vcpu.handle, vcpu.index
        event, make = GuestHypercall, tuple.__new__
        publish_data_abort = self._exits.data_abort_publisher(vcpu)
        hvc64, data_abort = int(EC.HVC64), int(EC.DABT_LOW)

        def vector() -> bool:
            esr = syndrome()
            ec = esr >> EC_SHIFT
            if ec != hvc64:
                if ec != data_abort:
                    return handlers[ec](vcpu, esr)
                return not publish_data_abort(esr) and self._drop(vcpu, _AARCH32)
            function = x[0] & FUNCTION_MASK
            service = find(function)
            results = UNSUPPORTED if service is None else service(vcpu, x[1], x[2], x[3])
            if results is None:
                return False
            x[0], x[1], x[2], x[3] = results
            record(make(event, (handle, index, function, results[0])))
            return True

        return vector

    def interrupted(self, vcpu: Vcpu) -> None:
        """The engine came back for an interrupt, or its slice was over."""
        if vcpu.vm.protected and self._is_aarch32():
            self._drop(vcpu, _AARCH32)
        elif not vcpu.vm.isolated:
            self._nonprotected.exit_irq(vcpu)
        else:
            self._exits.publish_nothing(vcpu, ExitClass.IRQ)

    # Isolated

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
        verdict = self._sysregs.access(vcpu, esr)
        if verdict is Verdict.HOST:
            read = esr & SYS64_READ
            return self._exit(vcpu, ExitClass.SYSREG_READ if read else ExitClass.SYSREG_WRITE, esr)
        if verdict is Verdict.UNDEFINED:
            inject.undefined(self._engine)
        self._record(GuestTrap(vcpu.handle, vcpu.index, verdict.value, esr))
        return True

    def _wfx(self, vcpu: Vcpu, esr: int) -> bool:
        return self._exit(vcpu, ExitClass.WFX, esr)

    def _iabt(self, vcpu: Vcpu, esr: int) -> bool:
        return self._exit(vcpu, ExitClass.IABT, esr)

    def _undefined(self, vcpu: Vcpu, esr: int) -> bool:
        """An instruction that the guest's ID registers do not have. Some CPUs give a trapped one
        EC 0 (unknown reason)."""
        if self._is_aarch32():
            return self._drop(vcpu, _AARCH32)
        return self._undefined_exposed(vcpu, esr)

    def _unhandled(self, vcpu: Vcpu, esr: int) -> bool:
        if self._is_aarch32():
            return self._drop(vcpu, _AARCH32)
        return self._drop(vcpu, f"exception class {esr >> EC_SHIFT:#x} has no handler")

    def _exit(self, vcpu: Vcpu, kind: ExitClass, esr: int) -> bool:
        state = self._engine.exit_state()
        if not state[1]:
            return self._drop(vcpu, _AARCH32)
        self._exits.publish(vcpu, kind, esr, state)
        return False

    def _drop(self, vcpu: Vcpu, why: str) -> bool:
        """The vCPU never runs again."""
        if vcpu.vm.isolated:
            self._exits.publish_nothing(vcpu, ExitClass.ILLEGAL)
        else:
            self._nonprotected.exit_illegal(vcpu)
        self._record(Refusal("vcpu_run", "exit_class", 0, why, vcpu.handle))
        return False

    def _is_aarch32(self) -> bool:
        return not self._engine.exit_state()[1]

    # Protected, but not isolated

    def _hvc_exposed(self, vcpu: Vcpu, esr: int) -> bool:
        """EL2 serves what is about memory, the host everything else. Both speak SMCCC 1.1, which
        has no SVE hint: a function id with it is another one's."""
        engine = self._engine
        x0, x1, x2, x3 = engine.args()
        function = x0 & _W_MASK
        service = self._calls.services.get(function)
        if service is None:
            return self._to_host(vcpu, esr)
        results = service(vcpu, x1, x2, x3)
        if results is None:
            return False
        engine.set_results(*results)
        self._record(GuestHypercall(vcpu.handle, vcpu.index, function, results[0]))
        return True

    def _sys64_exposed(self, vcpu: Vcpu, esr: int) -> bool:
        """As of an isolated one; but the host sees whose register it is."""
        verdict = self._sysregs.access(vcpu, esr)
        if verdict is Verdict.HOST:
            return self._to_host(vcpu, esr)
        if verdict is Verdict.UNDEFINED:
            inject.undefined(self._engine)
        self._record(GuestTrap(vcpu.handle, vcpu.index, verdict.value, esr))
        return True

    def _undefined_exposed(self, vcpu: Vcpu, esr: int) -> bool:
        inject.undefined(self._engine)
        self._record(GuestTrap(vcpu.handle, vcpu.index, "undef", esr))
        return True

    # Non-protected

    def _to_host(self, vcpu: Vcpu, esr: int) -> bool:
        self._nonprotected.exit_trap(vcpu, self._engine.trap_state())
        return False

    def _sys64_open(self, vcpu: Vcpu, esr: int) -> bool:
        """EL2 serves what it would for a protected guest, so that both see the same CPU; or leaves
        it to the host what CPU that is."""
        if self._host_shows_cpu:
            verdict = self._sysregs.access_open(esr)
        else:
            verdict = self._sysregs.access(vcpu, esr)
        if verdict is not Verdict.SERVED:
            return self._to_host(vcpu, esr)
        self._record(GuestTrap(vcpu.handle, vcpu.index, verdict.value, esr))
        return True


def _table(default: Handler, handlers: dict[EC, Handler]) -> list[Handler]:
    table = [default] * _CLASSES
    for ec, handler in handlers.items():
        table[ec] = handler
    return table
