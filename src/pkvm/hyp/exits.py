# SPDX-License-Identifier: GPL-2.0-or-later
"""What a protected vCPU's exit shows to the host, and what the host may answer (facts §5.4).

At an exit EL2 writes to the host's page (`hyp.abi.HostVcpu`) what the exit's
class publishes, and touches no other word. The host's answer is the two
arguments of the next VCPU_RUN, flags and X0, of which EL2 takes what the class
of that exit accepts. The two tables are one: `RULES`.

What the host does at each exit code of VCPU_RUN (the contract):

* IRQ: nothing is published, nothing accepted. Run again when it suits.
* HYP_REQ: REQ_TYPE MEMCACHE. TOPUP_MEMCACHE with REQ_PAGES pages or more, then
  run: the guest's HVC is executed again.
* ILLEGAL: the vCPU cannot run: it is off, or (AArch32 state, an exit that no
  class has) it never will again.
* TRAP: ESR.EC says what:

  - WFx (0x01): ESR. Set INCREMENT_PC when the wait is over.
  - SYS64 (0x18): ESR without Rt; for a write X0 is the value. Set INCREMENT_PC,
    for a read with the value in X0; or PENDING_EXCEPTION: UNDEFINED.
  - HVC64 (0x16): a PSCI call. X0 is the function id, X1 on its arguments as far as
    the host needs them: CPU_ON X1 (MPIDR), SYSTEM_RESET2 X1, X2. PC is behind
    it already. Answer in X0. CPU_ON: wake the target, X0 = 0; any other X0
    means that it cannot be woken. CPU_OFF: the vCPU is off. SYSTEM_OFF,
    SYSTEM_RESET: the VM is over; if it is run nevertheless the guest gets
    INTERNAL_FAILURE. CPU_SUSPEND, SYSTEM_RESET2: the guest gets X0.
  - DABT (0x24) with ESR.ISV: an MMIO access. ESR without SRT (the register);
    the address is HPFAR's page and FAR[11:0]; SCTLR_EE has EE and E0E; for a
    store X0 is the data, as many bytes as ESR.SAS says, in register order. Set
    INCREMENT_PC, for a load with the data in X0 (EL2 extends it); or
    PENDING_EXCEPTION: external abort.
  - DABT without ISV, IABT (0x20): a page is missing (HPFAR), or nothing can be
    done but PENDING_EXCEPTION: external abort. Otherwise the access is retried.

PENDING_EXCEPTION wins over INCREMENT_PC. Non-protected vCPUs: see `nonprotected`.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

from pkvm.arm64 import esr as e
from pkvm.arm64.bits import MASK64
from pkvm.arm64.psci import INTERNAL_FAILURE
from pkvm.arm64.registers import SCTLR_E0E, SCTLR_EE
from pkvm.events import NO_ADDRESS, GuestExit, GuestHypercall, Recorder
from pkvm.hyp import inject, power
from pkvm.hyp.abi import ExitCode, HostVcpu, HypRequest, VcpuFlag
from pkvm.hyp.vcpu import Vcpu
from pkvm.machine.cpu.engine import CpuEngine

XZR = 31
X0 = HostVcpu.X >> 3
PSTATE = HostVcpu.PSTATE >> 3
ESR = HostVcpu.ESR >> 3
FAR = HostVcpu.FAR >> 3
HPFAR = HostVcpu.HPFAR >> 3
REQ_TYPE = HostVcpu.REQ_TYPE >> 3
REQ_PAGES = HostVcpu.REQ_PAGES >> 3
ENDIAN = HostVcpu.SCTLR_EE >> 3
"""Indices of 64-bit words in the host's page."""

_INCREMENT_PC = int(VcpuFlag.INCREMENT_PC)
_PENDING_EXCEPTION = int(VcpuFlag.PENDING_EXCEPTION)
_WHOLE_ESR = 0xFFFF_FFFF
_MODE_BITS = 0xF
"""PSTATE.M in AArch64 state; M[4] is 0 there."""
_ENDIAN_BITS = SCTLR_EE | SCTLR_E0E
_PAGE_OFFSET = 0xFFF
_SMC64 = 1 << 30
_W_MASK = 0xFFFF_FFFF
_SIZE_MASKS = (0xFF, 0xFFFF, _W_MASK, MASK64)
"""By ESR_EL2.SAS."""


class ExitClass(IntEnum):
    """The classes; which one the last exit was, EL2 remembers."""

    IRQ = 0
    """Also: no exit yet."""
    WFX = 1
    SYSREG_READ = 2
    SYSREG_WRITE = 3
    CPU_ON = 4
    CPU_OFF = 5
    CPU_SUSPEND = 6
    SYSTEM_OFF = 7
    """And SYSTEM_RESET."""
    SYSTEM_RESET2 = 8
    IABT = 9
    MMIO_READ = 10
    MMIO_WRITE = 11
    DABT = 12
    HYP_REQ = 13
    ILLEGAL = 14
    NONPROTECTED = 15
    """Any but IRQ of a non-protected vCPU: not subject to these rules."""


State = tuple[int, int, int, int, int]
"""`CpuEngine.exit_state`."""
_STATE_MODE, _STATE_SCTLR, _STATE_FAR, _STATE_HPFAR = 0, 2, 3, 4
Source = Callable[[CpuEngine, int], int]
"""(engine, ESR_EL2) -> the value of a published word."""
Result = Callable[[CpuEngine, int, int], None]
"""(engine, ESR_EL2 of the exit, host's X0): what the trapped instruction gives the guest."""
Answer = Callable[[Vcpu, int], int]
"""(vcpu, host's X0) -> the guest's X0 of a PSCI call."""
Pending = Callable[[CpuEngine, Vcpu], None]
"""The exception that PENDING_EXCEPTION means."""


class Rule(NamedTuple):
    """One class: what is published, what is accepted."""

    reason: str
    """`events.GuestExit.reason`."""
    code: ExitCode = ExitCode.TRAP
    # published
    esr: int = 0
    """Mask of ESR_EL2; 0: the word is not written."""
    state: tuple[tuple[int, int, int], ...] = ()
    """Words of `State`: index in the page, index in `State`, mask."""
    words: tuple[tuple[int, Source], ...] = ()
    """Further words: index in the page, where the value comes from."""
    # accepted
    pending: Pending | None = None
    advance: bool = False
    """INCREMENT_PC: the instruction is done."""
    result: Result | None = None
    """Taken with INCREMENT_PC only."""
    answer: Answer | None = None
    """Taken at any entry."""


def _sys64_value(engine: CpuEngine, esr: int) -> int:
    rt = (esr & e.SYS64_RT_MASK) >> e.SYS64_RT_SHIFT
    return 0 if rt == XZR else engine.x[rt]


def _stored_value(engine: CpuEngine, esr: int) -> int:
    """The bytes that the store would put on the bus; nothing else of the register."""
    rt = (esr & e.SRT_MASK) >> e.SRT_SHIFT
    return 0 if rt == XZR else engine.x[rt] & _SIZE_MASKS[esr >> e.SAS_SHIFT & 3]


def _function(engine: CpuEngine, esr: int) -> int:
    return engine.x[0] & _W_MASK


def _argument(number: int) -> Source:
    def source(engine: CpuEngine, esr: int) -> int:
        return engine.x[number] & (MASK64 if engine.x[0] & _SMC64 else _W_MASK)

    return source


def _read_sysreg(engine: CpuEngine, esr: int, value: int) -> None:
    rt = (esr & e.SYS64_RT_MASK) >> e.SYS64_RT_SHIFT
    if rt != XZR:
        engine.x[rt] = value


def _loaded_value(engine: CpuEngine, esr: int, value: int) -> None:
    """The register that an MMIO load fills: data of the access's size, extended as it says."""
    rt = (esr & e.SRT_MASK) >> e.SRT_SHIFT
    if rt == XZR:
        return
    mask = _SIZE_MASKS[esr >> e.SAS_SHIFT & 3]
    value &= mask
    if esr & e.SSE and value & (mask >> 1) + 1:
        value |= MASK64 & ~mask
    engine.x[rt] = value if esr & e.SF else value & _W_MASK


def _undefined(engine: CpuEngine, vcpu: Vcpu) -> None:
    inject.undefined(engine)


def _abort(engine: CpuEngine, vcpu: Vcpu) -> None:
    inject.external_abort(engine, vcpu.exit_esr, vcpu.exit_far)


def _hosts_word(vcpu: Vcpu, host_result: int) -> int:
    return host_result


def _no_return(vcpu: Vcpu, host_result: int) -> int:
    return INTERNAL_FAILURE


_ESR_NO_RT = _WHOLE_ESR & ~e.SYS64_RT_MASK
_ESR_NO_SRT = _WHOLE_ESR & ~e.SRT_MASK
_ESR_NO_ISV = _WHOLE_ESR & ~(e.ISV | 3 << e.SAS_SHIFT | e.SSE | e.SRT_MASK | e.SF | 1 << 14)
"""With ISV clear, bits [23:14] of the ISS say nothing."""
_MODE = (PSTATE, _STATE_MODE, _MODE_BITS)
_PAGE = (HPFAR, _STATE_HPFAR, e.HPFAR_FIPA_MASK)
_DABT = (
    _PAGE,
    (FAR, _STATE_FAR, _PAGE_OFFSET),
    _MODE,
    (ENDIAN, _STATE_SCTLR, _ENDIAN_BITS),
)
_CALL = (X0, _function)

RULES: dict[ExitClass, Rule] = {
    ExitClass.IRQ: Rule("irq", ExitCode.IRQ),
    ExitClass.WFX: Rule("wfx", esr=_WHOLE_ESR, state=(_MODE,), advance=True),
    ExitClass.SYSREG_READ: Rule(
        "sysreg",
        esr=_ESR_NO_RT,
        state=(_MODE,),
        pending=_undefined,
        advance=True,
        result=_read_sysreg,
    ),
    ExitClass.SYSREG_WRITE: Rule(
        "sysreg",
        esr=_ESR_NO_RT,
        state=(_MODE,),
        words=((X0, _sys64_value),),
        pending=_undefined,
        advance=True,
    ),
    ExitClass.CPU_ON: Rule(
        "hvc", esr=_WHOLE_ESR, words=(_CALL, (X0 + 1, _argument(1))), answer=power.settle_on
    ),
    ExitClass.CPU_OFF: Rule("hvc", esr=_WHOLE_ESR, words=(_CALL,)),
    ExitClass.CPU_SUSPEND: Rule("hvc", esr=_WHOLE_ESR, words=(_CALL,), answer=_hosts_word),
    ExitClass.SYSTEM_OFF: Rule("hvc", esr=_WHOLE_ESR, words=(_CALL,), answer=_no_return),
    ExitClass.SYSTEM_RESET2: Rule(
        "hvc",
        esr=_WHOLE_ESR,
        words=(_CALL, (X0 + 1, _argument(1)), (X0 + 2, _argument(2))),
        answer=_hosts_word,
    ),
    ExitClass.IABT: Rule("iabt", esr=_WHOLE_ESR, state=(_PAGE,), pending=_abort),
    ExitClass.MMIO_READ: Rule(
        "dabt_mmio",
        esr=_ESR_NO_SRT,
        state=_DABT,
        pending=_abort,
        advance=True,
        result=_loaded_value,
    ),
    ExitClass.MMIO_WRITE: Rule(
        "dabt_mmio",
        esr=_ESR_NO_SRT,
        state=_DABT,
        words=((X0, _stored_value),),
        pending=_abort,
        advance=True,
    ),
    ExitClass.DABT: Rule("dabt", esr=_ESR_NO_ISV, state=_DABT, pending=_abort),
    ExitClass.HYP_REQ: Rule("hyp_req", ExitCode.HYP_REQ),
    ExitClass.ILLEGAL: Rule("illegal", ExitCode.ILLEGAL),
    ExitClass.NONPROTECTED: Rule("trap"),
}
# The columns of RULES, by class: what every exit and entry looks up.
_BY_NUMBER = tuple(RULES[one] for one in ExitClass)
_PUBLISHED = tuple(
    (rule.reason, rule.esr, _PAGE in rule.state, rule.state, rule.words) for rule in _BY_NUMBER
)
_ACCEPTED = tuple((rule.answer, rule.pending, rule.advance, rule.result) for rule in _BY_NUMBER)
_CODES = tuple(int(rule.code) for rule in _BY_NUMBER)
_IRQ = int(ExitClass.IRQ)
_EXIT_CLASS, _EXIT_ESR, _EXIT_FAR = (
    Vcpu.index_of(name) for name in ("exit_class", "exit_esr", "exit_far")
)
_NO_STATE: State = (0, 1, 0, 0, 0)


class Exits:
    """Publishes and accepts for the protected vCPU whose context the engine holds."""

    def __init__(self, engine: CpuEngine, recorder: Recorder) -> None:
        self._engine = engine
        self._record = recorder.record

    def publish(self, vcpu: Vcpu, kind: ExitClass, esr: int, state: State) -> None:
        """Exit to the host: write what the class shows, remember what the answer is about.
        The guest is in AArch64 state."""
        reason, esr_mask, has_ipa, from_state, from_registers = _PUBLISHED[kind]
        page, words = vcpu.page, vcpu.words
        shown = esr & esr_mask
        if esr_mask:
            page[ESR] = shown
        for index, item, mask in from_state:
            page[index] = state[item] & mask
        for index, source in from_registers:
            page[index] = source(self._engine, esr)
        words[_EXIT_CLASS] = kind
        words[_EXIT_ESR] = esr
        words[_EXIT_FAR] = state[_STATE_FAR]
        ipa = (state[_STATE_HPFAR] & e.HPFAR_FIPA_MASK) << 8 if has_ipa else NO_ADDRESS
        # As GuestExit(...) does it, without another Python call.
        self._record(tuple.__new__(GuestExit, (vcpu.handle, vcpu.index, reason, shown, ipa)))

    def publish_nothing(self, vcpu: Vcpu, kind: ExitClass) -> None:
        """Exit to the host with an exit code alone (IRQ, HYP_REQ, ILLEGAL)."""
        self.publish(vcpu, kind, 0, _NO_STATE)

    def request_table_pages(self, vcpu: Vcpu, npages: int) -> None:
        """Exit to the host for table pages."""
        vcpu.page[REQ_TYPE] = HypRequest.MEMCACHE
        vcpu.page[REQ_PAGES] = npages
        self.publish_nothing(vcpu, ExitClass.HYP_REQ)

    def accept(self, vcpu: Vcpu, kind: int, flags: int, x0: int) -> None:
        """Take what `kind`, the class of the last exit, lets the host answer; once."""
        if kind == _IRQ:
            return
        vcpu.words[_EXIT_CLASS] = _IRQ
        engine = self._engine
        answer, pending, advance, result = _ACCEPTED[kind]
        if answer is not None:
            value = answer(vcpu, x0)
            engine.set_results(value, 0, 0, 0)
            if kind != ExitClass.SYSTEM_OFF:
                self._record(GuestHypercall(vcpu.handle, vcpu.index, vcpu.exit_function, value))
        elif flags & _PENDING_EXCEPTION and pending is not None:
            pending(engine, vcpu)
        elif flags & _INCREMENT_PC and advance:
            if result is not None:
                result(engine, vcpu.exit_esr, x0)
            engine.skip_instruction()


def exit_code(vcpu: Vcpu) -> int:
    """VCPU_RUN's answer for the vCPU's last exit."""
    return _CODES[vcpu.words[_EXIT_CLASS]]
