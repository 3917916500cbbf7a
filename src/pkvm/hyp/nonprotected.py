# SPDX-License-Identifier: GPL-2.0-or-later
"""vCPUs of which the host sees and sets everything: non-protected ones, and those of protected
VMs in a dialect that protects memory alone (facts §5.3).

The contract. Every exit but IRQ is TRAP: the host's page then holds X0-X30, PC,
PSTATE and SCTLR_EL1, which is what serving an exit takes, and RunResult has ESR,
FAR, HPFAR and PSTATE as the hardware gave them, and 0 in X0 and SCTLR_EE. The rest
of the page, and all of it after an IRQ exit, is not current until VCPU_SYNC_STATE
or VCPU_PUT makes it so. The flags of the next VCPU_RUN are:

* DIRTY_X if it changed X0-X30 in the page and nothing else.
* DIRTY if it changed any register in the page: EL2 takes the whole page, which
  must have been current (or is all the host's, as after a reset); of a page that
  was not, X0-X30, PC and PSTATE.
* INCREMENT_PC: PC + 4, after that.
* PENDING_EXCEPTION instead: UNDEFINED, or an external abort if the exit was one.

The first entry starts from the reset state with X0-X30, SP_EL0, PC, PSTATE,
SP_EL1, ELR_EL1 and SPSR_EL1 from the page; the rest of the page counts if DIRTY.
"""

from __future__ import annotations

from pkvm.arm64.esr import (
    EC,
    EC_SHIFT,
    FSC_TRANSLATION,
    HPFAR_FIPA_MASK,
    IL,
    WNR,
    ipa_to_hpfar,
)
from pkvm.arm64.registers import (
    ESR_EL2,
    FAR_EL2,
    HPFAR_EL2,
    PSTATE_DAIF,
    PSTATE_DIT,
    PSTATE_EL0T,
    PSTATE_EL1H,
    PSTATE_EL1T,
    PSTATE_MODE_MASK,
    PSTATE_NZCV,
    PSTATE_PAN,
    SCTLR_EL1,
    SysReg,
)
from pkvm.arm64.stage2 import LAST_LEVEL
from pkvm.events import NO_ADDRESS, GuestExit, Recorder
from pkvm.hyp import inject
from pkvm.hyp.abi import (
    CONTEXT_SYSREGS,
    SMCCC_SUCCESS,
    ExitCode,
    HostVcpu,
    HypRequest,
    VcpuFlag,
)
from pkvm.hyp.exits import ExitClass, nothing_but, request_of
from pkvm.hyp.ownership import make_event
from pkvm.hyp.reset import reset
from pkvm.hyp.vcpu import Vcpu
from pkvm.machine.cpu.engine import CpuEngine
from pkvm.machine.cpu.errors import EngineError

X0 = HostVcpu.X >> 3
PSTATE = HostVcpu.PSTATE >> 3
_END_OF_X = X0 + 31
_SP_EL0 = HostVcpu.SP_EL0 >> 3
_PC = HostVcpu.PC >> 3
_SP_EL1 = HostVcpu.SP_EL1 >> 3
_ELR_EL1 = HostVcpu.ELR_EL1 >> 3
_SPSR_EL1 = HostVcpu.SPSR_EL1 >> 3
_SYSREGS = HostVcpu.SYSREGS >> 3
_FP = HostVcpu.FP >> 3
_FP_WORDS = 65
_SCTLR_NUMBER = CONTEXT_SYSREGS.index(SCTLR_EL1)
_SCTLR = _SYSREGS + _SCTLR_NUMBER
_SHOWN, WHOLE = 1, 2
"""How much of the host's page is current: `Vcpu.page_is_current`."""
_DIRTY, _DIRTY_X = int(VcpuFlag.DIRTY), int(VcpuFlag.DIRTY_X)
_PENDING_EXCEPTION, _INCREMENT_PC = int(VcpuFlag.PENDING_EXCEPTION), int(VcpuFlag.INCREMENT_PC)
_TRAP = int(ExitCode.TRAP)
_NONPROTECTED = int(ExitClass.NONPROTECTED)
_EXIT_CLASS, _PAGE_IS_CURRENT, _STARTED = (
    Vcpu.index_of(name) for name in ("exit_class", "page_is_current", "started")
)
_MODES = (PSTATE_EL0T, PSTATE_EL1T, PSTATE_EL1H)
"""What PSTATE.M may be: never EL2 or AArch32."""
_SSBS = 1 << 12
_BTYPE = 3 << 10
_UAO = 1 << 23
_PSTATE_BITS = (
    PSTATE_NZCV | PSTATE_DIT | _UAO | PSTATE_PAN | _SSBS | _BTYPE | PSTATE_DAIF | PSTATE_MODE_MASK
)
_SPSR_BITS = 0xFFFF_FFFF
_ABORTS = (int(EC.IABT_LOW), int(EC.DABT_LOW))
_WRITE_FAULT = EC.DABT_LOW << EC_SHIFT | IL | WNR | FSC_TRANSLATION + LAST_LEVEL
_REASONS: dict[int, tuple[str, bool]] = {
    int(EC.WFX): ("wfx", False),
    int(EC.HVC64): ("hvc", False),
    int(EC.SMC64): ("smc", False),
    int(EC.SYS64): ("sysreg", False),
    int(EC.IABT_LOW): ("iabt", True),
    int(EC.DABT_LOW): ("dabt", True),
}
"""By exception class: `GuestExit.reason`, and whether it is about an address."""
_OTHER = ("trap", False)


Trap = tuple[int, int, int, int, int, int]
"""`CpuEngine.trap_state`."""


class NonProtected:
    """Entry to and exit from the non-protected vCPU whose context the engine holds."""

    def __init__(self, engine: CpuEngine, recorder: Recorder) -> None:
        self._engine = engine
        self._x = engine.x
        self._record = recorder.record
        self.results = nothing_but(ExitCode.IRQ)
        """VCPU_RUN's registers from X0 on, for the last exit."""
        self._writable = [
            (_SYSREGS + number, register)
            for number, register in enumerate(CONTEXT_SYSREGS)
            if _is_writable(engine, register)
        ]

    def enter(self, vcpu: Vcpu, flags: int) -> bool:
        """Take what the host has for the vCPU. False if its PSTATE is not one of EL1 or EL0 in
        AArch64 state; nothing has changed then."""
        words = vcpu.words
        if flags & _DIRTY or not words[_STARTED]:
            if not self._take_page(vcpu, flags):
                return False
        elif flags & _DIRTY_X:
            self._engine.x[:] = vcpu.page[X0:_END_OF_X]
        words[_PAGE_IS_CURRENT] = 0
        trapped = words[_EXIT_CLASS] == _NONPROTECTED
        words[_EXIT_CLASS] = 0
        if flags & _PENDING_EXCEPTION and trapped:
            engine = self._engine
            if engine.esr_el2 >> EC_SHIFT in _ABORTS:
                inject.external_abort(engine, engine.esr_el2, engine.far_el2)
            else:
                inject.undefined(engine)
        elif flags & _INCREMENT_PC:
            self._engine.skip_instruction()
        return True

    def exit_trap(self, vcpu: Vcpu, trap: Trap) -> None:
        """Exit to the host with everything. What it was for stays in ESR_EL2, FAR_EL2 and
        HPFAR_EL2: they are part of the vCPU's context."""
        words, page = vcpu.words, vcpu.page
        page[X0:_END_OF_X] = self._x
        esr, page[_PC], pstate, page[_SCTLR], far, hpfar = trap
        page[PSTATE] = pstate
        words[_PAGE_IS_CURRENT] = _SHOWN
        words[_EXIT_CLASS] = _NONPROTECTED
        self.results = (SMCCC_SUCCESS, _TRAP, esr, 0, far, hpfar, pstate, 0)
        reason, is_abort = _REASONS.get(esr >> EC_SHIFT, _OTHER)
        ipa = (hpfar & HPFAR_FIPA_MASK) << 8 if is_abort else NO_ADDRESS
        self._record(make_event(GuestExit, (vcpu.handle, vcpu.index, reason, esr, ipa)))

    def exit_fault(self, vcpu: Vcpu, ipa: int) -> None:
        """Exit to the host as for a write to the page at `ipa`, which is not there (facts §6.5)."""
        engine = self._engine
        engine.write_sysreg(ESR_EL2, _WRITE_FAULT)
        engine.write_sysreg(FAR_EL2, 0)
        engine.write_sysreg(HPFAR_EL2, ipa_to_hpfar(ipa))
        self.exit_trap(vcpu, engine.trap_state())

    def request(self, vcpu: Vcpu, kind: HypRequest, npages: int, ipa: int = 0) -> None:
        """Exit to the host for something that EL2 needs."""
        self.results = request_of(kind, npages, ipa)
        vcpu.exit_class = ExitClass.HYP_REQ
        self._record(GuestExit(vcpu.handle, vcpu.index, "hyp_req", 0))

    def exit_illegal(self, vcpu: Vcpu) -> None:
        """The vCPU never runs again."""
        self.results = nothing_but(ExitCode.ILLEGAL)
        vcpu.exit_class = ExitClass.ILLEGAL
        self._record(GuestExit(vcpu.handle, vcpu.index, "illegal", 0))

    def exit_irq(self, vcpu: Vcpu) -> None:
        """Exit to the host for an interrupt: nothing is written."""
        self.results = nothing_but(ExitCode.IRQ)
        vcpu.exit_class = ExitClass.IRQ
        self._record(GuestExit(vcpu.handle, vcpu.index, "irq", 0))

    def sync(self, vcpu: Vcpu) -> None:
        """Make all of the host's page current; what is so already, and maybe changed by the host,
        stays as it is."""
        if vcpu.page_is_current == WHOLE:
            return
        engine, page = self._engine, vcpu.page
        if not vcpu.page_is_current:
            page[X0:_END_OF_X] = engine.x
            _, page[_PC], page[PSTATE], page[_SCTLR], _, _ = engine.trap_state()
        page[_SP_EL0] = engine.sp(0)
        page[_SP_EL1] = engine.sp(1)
        page[_ELR_EL1] = engine.elr_el1()
        page[_SPSR_EL1] = engine.spsr_el1()
        for number, register in enumerate(CONTEXT_SYSREGS):
            if number != _SCTLR_NUMBER:
                page[_SYSREGS + number] = engine.read_sysreg(register)
        page[_FP : _FP + _FP_WORDS] = memoryview(engine.fp_registers()).cast("Q")
        vcpu.page_is_current = WHOLE

    def _take_page(self, vcpu: Vcpu, flags: int) -> bool:
        """Take registers from the host's page: all, if all of it was current. False as `enter`."""
        page, engine = vcpu.page, self._engine
        pstate = page[PSTATE] & _PSTATE_BITS
        if pstate & PSTATE_MODE_MASK not in _MODES:
            return False
        whole = not vcpu.started or vcpu.page_is_current == WHOLE
        if not vcpu.started:
            reset(engine, vcpu)
        engine.x[:] = page[X0:_END_OF_X]
        engine.pc = page[_PC]
        engine.pstate = pstate
        if whole:
            self._take_banked(vcpu)
        if whole and flags & _DIRTY:
            self._take_rest(vcpu)
        return True

    def _take_banked(self, vcpu: Vcpu) -> None:
        engine = self._engine
        page = vcpu.page
        engine.set_sp(0, page[_SP_EL0])
        engine.set_sp(1, page[_SP_EL1])
        engine.set_elr_el1(page[_ELR_EL1])
        engine.set_spsr_el1(page[_SPSR_EL1] & _SPSR_BITS)

    def _take_rest(self, vcpu: Vcpu) -> None:
        """System registers, of which only those that changed are written (some writes flush the
        TLB), and FP."""
        engine = self._engine
        page = vcpu.page
        for index, register in self._writable:
            value = page[index]
            if value != engine.read_sysreg(register):
                engine.write_sysreg(register, value)
        engine.set_fp_registers(page[_FP : _FP + _FP_WORDS].tobytes())


def _is_writable(engine: CpuEngine, register: SysReg) -> bool:
    """Whether the CPU has more than a constant behind the register. Leaves it as it is."""
    try:
        engine.write_sysreg(register, engine.read_sysreg(register))
    except EngineError:
        return False
    return True
