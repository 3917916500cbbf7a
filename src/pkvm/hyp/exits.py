# SPDX-License-Identifier: GPL-2.0-or-later
"""What a protected vCPU's exit shows to the host, and what the host may answer (facts §5.4).

VCPU_RUN returns in registers (`hyp.abi.RunResult`) what the exit's class
publishes, 0 in all others; memory of the host is not touched. The host's answer
is the two arguments of the next VCPU_RUN, flags and X0, of which EL2 takes what
the class of that exit accepts. The two tables are one: `RULES`.

What the host does at each exit code of VCPU_RUN (the contract):

* IRQ: nothing is published, nothing accepted. Run again when it suits.
* HYP_REQ: REQ_TYPE MEMCACHE: TOPUP_MEMCACHE with REQ_PAGES pages or more, then
  run: the guest's HVC is executed again. REQ_TYPE MAP: likewise, after a
  donation of the page at REQ_IPA.
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
    TRNG_RND32, TRNG_RND64: X1 is the number of bits; answer with X0 = 0 and
    random words in `HostVcpu.ENTROPY`. With any other X0 the guest gets NO_ENTROPY.
    MEM_RELINQUISH: the guest gave up the page at IPA X1, which is the host's again
    at PA X2. No answer is taken.
  - DABT (0x24) with ESR.ISV: an MMIO access. ESR without SRT (the register);
    the address is HPFAR's page and FAR[11:0]; SCTLR_EE has EE and E0E; for a
    store X0 is the data, as many bytes as ESR.SAS says, in register order. Set
    INCREMENT_PC, for a load with the data in X0 (EL2 extends it); or
    PENDING_EXCEPTION: external abort. If the VM has the MMIO guard, only where
    the guest said that there is a device.
  - DABT without ISV, IABT (0x20): a page is missing (HPFAR), or nothing can be
    done but PENDING_EXCEPTION: external abort. Otherwise the access is retried.

PENDING_EXCEPTION wins over INCREMENT_PC. Non-protected vCPUs: see `nonprotected`.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache, partial
from typing import NamedTuple

from pkvm.arm64 import esr as e
from pkvm.arm64 import smccc
from pkvm.arm64.bits import MASK64
from pkvm.arm64.psci import INTERNAL_FAILURE
from pkvm.arm64.registers import SCTLR_E0E, SCTLR_EE
from pkvm.arm64.smccc import SUCCESS
from pkvm.events import NO_ADDRESS, GuestExit, GuestHypercall, Recorder
from pkvm.hyp import inject, mmio_guard, power
from pkvm.hyp.abi import SMCCC_SUCCESS, ExitCode, HostVcpu, HypRequest, RunResult, VcpuFlag
from pkvm.hyp.vcpu import Vcpu
from pkvm.machine.cpu.engine import CpuEngine

XZR = 31
_ENTROPY = HostVcpu.ENTROPY >> 3
_INCREMENT_PC = int(VcpuFlag.INCREMENT_PC)
_PENDING_EXCEPTION = int(VcpuFlag.PENDING_EXCEPTION)
_WHOLE_ESR = 0xFFFF_FFFF
_MODE = 0xF
"""PSTATE.M in AArch64 state; M[4] is 0 there."""
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
    """Any but IRQ of a vCPU that is not isolated: not subject to these rules."""
    TRNG = 16
    """TRNG_RND32 and TRNG_RND64."""
    MEM_RELINQUISH = 17
    """After the page is the host's."""


State = tuple[int, int, int, int, int]
"""`CpuEngine.exit_state`."""
Source = Callable[[CpuEngine, int], int]
"""(engine, ESR_EL2) -> the value of a published word."""
Result = Callable[[CpuEngine, int, int], None]
"""(engine, ESR_EL2 of the exit, host's X0): what the trapped instruction gives the guest."""
Answer = Callable[[CpuEngine, Vcpu, int], tuple[int, int, int, int]]
"""(engine, vcpu, host's X0) -> the guest's X0-X3 of a call."""
Pending = Callable[[CpuEngine, Vcpu], None]
"""The exception that PENDING_EXCEPTION means."""


class Rule(NamedTuple):
    """One class: what is published, what is accepted."""

    reason: str
    """`events.GuestExit.reason`."""
    code: ExitCode = ExitCode.TRAP
    # published: masks of what the CPU has
    esr: int = 0
    far: int = 0
    hpfar: int = 0
    mode: int = 0
    """Of PSTATE.M."""
    endian: int = 0
    """Of SCTLR_EL1."""
    value: Source | None = None
    """X0."""
    stored: bool = False
    """X0 is what a store puts on the bus: as many bytes of the register as the access has."""
    arguments: int | None = None
    """A call's: X0 is its function, and so many arguments follow."""
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
    inject.external_abort(engine, engine.esr_el2, engine.far_el2)


def _hosts_word(engine: CpuEngine, vcpu: Vcpu, host_x0: int) -> tuple[int, int, int, int]:
    return (host_x0, 0, 0, 0)


def _no_return(engine: CpuEngine, vcpu: Vcpu, host_x0: int) -> tuple[int, int, int, int]:
    return (INTERNAL_FAILURE, 0, 0, 0)


def _done(engine: CpuEngine, vcpu: Vcpu, host_x0: int) -> tuple[int, int, int, int]:
    return (SUCCESS, 0, 0, 0)


def _settled(engine: CpuEngine, vcpu: Vcpu, host_x0: int) -> tuple[int, int, int, int]:
    return (power.settle_on(vcpu, host_x0), 0, 0, 0)


def _entropy(engine: CpuEngine, vcpu: Vcpu, host_x0: int) -> tuple[int, int, int, int]:
    """So many bits of the host's words as the guest's X1 still says, the first in X3."""
    if host_x0 != SMCCC_SUCCESS:
        return (smccc.TRNG_NO_ENTROPY, 0, 0, 0)
    high, middle, low = vcpu.page[_ENTROPY : _ENTROPY + 3].tolist()
    if vcpu.exit_function == smccc.Function.TRNG_RND32:
        bits, width = min(engine.x[1] & _W_MASK, smccc.TRNG_MAX_BITS_32), 32
    else:
        bits, width = min(engine.x[1], smccc.TRNG_MAX_BITS_64), 64
    word = (1 << width) - 1
    entropy = (high & word) << 2 * width | (middle & word) << width | low & word
    entropy &= (1 << bits) - 1
    return (SUCCESS, entropy >> 2 * width, entropy >> width & word, entropy & word)


_ESR_NO_RT = _WHOLE_ESR & ~e.SYS64_RT_MASK
_ESR_NO_SRT = _WHOLE_ESR & ~e.SRT_MASK
_ESR_NO_ISV = _WHOLE_ESR & ~(e.ISV | 3 << e.SAS_SHIFT | e.SSE | e.SRT_MASK | e.SF | 1 << 14)
"""With ISV clear, bits [23:14] of the ISS say nothing."""
_DABT = Rule(
    "dabt",
    far=_PAGE_OFFSET,
    hpfar=e.HPFAR_FIPA_MASK,
    mode=_MODE,
    endian=SCTLR_EE | SCTLR_E0E,
    pending=_abort,
)

RULES: dict[ExitClass, Rule] = {
    ExitClass.IRQ: Rule("irq", ExitCode.IRQ),
    ExitClass.WFX: Rule("wfx", esr=_WHOLE_ESR, mode=_MODE, advance=True),
    ExitClass.SYSREG_READ: Rule(
        "sysreg",
        esr=_ESR_NO_RT,
        mode=_MODE,
        pending=_undefined,
        advance=True,
        result=_read_sysreg,
    ),
    ExitClass.SYSREG_WRITE: Rule(
        "sysreg",
        esr=_ESR_NO_RT,
        mode=_MODE,
        value=_sys64_value,
        pending=_undefined,
        advance=True,
    ),
    ExitClass.CPU_ON: Rule("hvc", esr=_WHOLE_ESR, arguments=1, answer=_settled),
    ExitClass.CPU_OFF: Rule("hvc", esr=_WHOLE_ESR, arguments=0),
    ExitClass.CPU_SUSPEND: Rule("hvc", esr=_WHOLE_ESR, arguments=0, answer=_hosts_word),
    ExitClass.SYSTEM_OFF: Rule("hvc", esr=_WHOLE_ESR, arguments=0, answer=_no_return),
    ExitClass.SYSTEM_RESET2: Rule("hvc", esr=_WHOLE_ESR, arguments=2, answer=_hosts_word),
    ExitClass.IABT: Rule("iabt", esr=_WHOLE_ESR, hpfar=e.HPFAR_FIPA_MASK, pending=_abort),
    ExitClass.MMIO_READ: _DABT._replace(
        reason="dabt_mmio", esr=_ESR_NO_SRT, advance=True, result=_loaded_value
    ),
    ExitClass.MMIO_WRITE: _DABT._replace(
        reason="dabt_mmio", esr=_ESR_NO_SRT, stored=True, advance=True
    ),
    ExitClass.DABT: _DABT._replace(esr=_ESR_NO_ISV),
    ExitClass.HYP_REQ: Rule("hyp_req", ExitCode.HYP_REQ),
    ExitClass.ILLEGAL: Rule("illegal", ExitCode.ILLEGAL),
    ExitClass.NONPROTECTED: Rule("trap"),
    ExitClass.TRNG: Rule("hvc", esr=_WHOLE_ESR, arguments=1, answer=_entropy),
    ExitClass.MEM_RELINQUISH: Rule("hvc", esr=_WHOLE_ESR, arguments=1, answer=_done),
}


def _published(
    rule: Rule,
) -> tuple[str, int, int, int, int, int, int, Source | None]:
    return (
        rule.reason,
        int(rule.code),
        rule.esr,
        rule.far,
        rule.hpfar,
        rule.mode,
        rule.endian,
        rule.value,
    )


def _accepted(rule: Rule) -> tuple[Answer | None, Pending | None, bool, Result | None]:
    return rule.answer, rule.pending, rule.advance, rule.result


# The columns of RULES, by class: what every exit and entry looks up.
_PUBLISHED = [_published(RULES[one]) for one in ExitClass]
_ACCEPTED = [_accepted(RULES[one]) for one in ExitClass]
_TRAP = int(ExitCode.TRAP)
_IRQ = int(ExitClass.IRQ)
_DABT_FAR, _DABT_HPFAR, _DABT_MODE, _DABT_ENDIAN = (
    _DABT.far, _DABT.hpfar, _DABT.mode, _DABT.endian,
)  # fmt: skip
_EXIT_CLASS = Vcpu.index_of("exit_class")


def _data_abort_shown(
    vcpu: Vcpu, esr: int, hpfar: int, far: int
) -> tuple[int, int, int, int, GuestExit]:
    """What depends on the syndrome and the address alone of a data abort's exit, until the guest
    says where there are devices: class, the ESR that is shown, the register of a store and the mask
    of what it stores, the event."""
    kind = ExitClass.DABT
    ipa = (hpfar & _DABT_HPFAR) << 8 | far
    if esr & e.ISV and mmio_guard.allows(vcpu.vm, ipa, 1 << (esr >> e.SAS_SHIFT & 3)):
        kind = ExitClass.MMIO_WRITE if esr & e.WNR else ExitClass.MMIO_READ
    rule = RULES[kind]
    shown = esr & rule.esr
    event = GuestExit(vcpu.handle, vcpu.index, rule.reason, shown, (hpfar & _DABT_HPFAR) << 8)
    register = (esr & e.SRT_MASK) >> e.SRT_SHIFT
    if not rule.stored or register == XZR:
        return int(kind), shown, 0, 0, event
    return int(kind), shown, register, _SIZE_MASKS[esr >> e.SAS_SHIFT & 3], event


class Exits:
    """Publishes and accepts for the protected vCPU whose context the engine holds."""

    def __init__(self, engine: CpuEngine, recorder: Recorder) -> None:
        self._engine = engine
        self._x = engine.x
        self._record = recorder.record
        self.results = nothing_but(ExitCode.IRQ)
        """VCPU_RUN's registers from X0 on, for the last exit."""
        self.forget_aborts: Callable[[], None] = _nothing
        """What data aborts show must be looked up again: the guest has said where devices are."""

    def publish(self, vcpu: Vcpu, kind: ExitClass, esr: int, state: State) -> None:
        """Exit to the host: show what the class lets, remember what the answer is about. The guest
        is in AArch64 state."""
        reason, code, esr_mask, far_mask, hpfar_mask, mode_mask, endian_mask, value = _PUBLISHED[
            kind
        ]
        mode, _, sctlr, far, hpfar = state
        vcpu.words[_EXIT_CLASS] = kind
        shown = esr & esr_mask
        hpfar &= hpfar_mask
        self.results = (
            SMCCC_SUCCESS,
            code,
            shown,
            0 if value is None else value(self._engine, esr),
            far & far_mask,
            hpfar,
            mode & mode_mask,
            sctlr & endian_mask,
        )
        ipa = hpfar << 8 if hpfar_mask else NO_ADDRESS
        # As GuestExit(...) does it, without another Python call.
        self._record(tuple.__new__(GuestExit, (vcpu.handle, vcpu.index, reason, shown, ipa)))

    def data_abort_publisher(self, vcpu: Vcpu) -> Callable[[int], bool]:
        """A function that takes ESR_EL2 and is `publish` of `vcpu`'s data aborts, the class of
        which the syndrome says; it returns False, with nothing published, in AArch32 state.

        Every access to a device comes by here, again and again the same few: everything is at
        hand, the masks are constants, and what a syndrome and a page show is remembered.
        """
        shown_of = lru_cache(maxsize=1024)(partial(_data_abort_shown, vcpu))
        self.forget_aborts = shown_of.cache_clear
        state, x, record, words = self._engine.exit_state, self._x, self._record, vcpu.words

        def publish(esr: int) -> bool:
            mode, aarch64, sctlr, far, hpfar = state()
            if not aarch64:
                return False
            far &= _DABT_FAR
            words[_EXIT_CLASS], shown, register, mask, event = shown_of(esr, hpfar, far)
            self.results = (
                SMCCC_SUCCESS,
                _TRAP,
                shown,
                x[register] & mask if mask else 0,
                far,
                hpfar & _DABT_HPFAR,
                mode & _DABT_MODE,
                sctlr & _DABT_ENDIAN,
            )
            record(event)
            return True

        return publish

    def publish_call(self, vcpu: Vcpu, kind: ExitClass) -> None:
        """Exit to the host for a call: its function id and so many arguments as it may see."""
        engine = self._engine
        esr = engine.esr_el2
        function, *arguments = engine.args()
        mask = MASK64 if function & _SMC64 else _W_MASK
        shown = [arg & mask for arg in arguments[: RULES[kind].arguments]]
        self.publish(vcpu, kind, esr, engine.exit_state())
        results = [*self.results]
        results[RunResult.X0] = function & _W_MASK
        results[RunResult.X1 : RunResult.X1 + len(shown)] = shown
        self.results = tuple(results)

    def publish_relinquished(self, vcpu: Vcpu, pa: int) -> None:
        """Exit to the host for a page that it got back from the guest, at `pa`."""
        vcpu.exit_function = smccc.Function.MEM_RELINQUISH
        self.publish_call(vcpu, ExitClass.MEM_RELINQUISH)
        results = [*self.results]
        results[RunResult.X2] = pa
        self.results = tuple(results)

    def publish_nothing(self, vcpu: Vcpu, kind: ExitClass) -> None:
        """Exit to the host with an exit code alone (IRQ, ILLEGAL)."""
        rule = RULES[kind]
        vcpu.exit_class = kind
        self.results = nothing_but(rule.code)
        self._record(GuestExit(vcpu.handle, vcpu.index, rule.reason, 0))

    def request(self, vcpu: Vcpu, kind: HypRequest, npages: int, ipa: int = 0) -> None:
        """Exit to the host for something that EL2 needs: see `HypRequest`."""
        self.publish_nothing(vcpu, ExitClass.HYP_REQ)
        self.results = request_of(kind, npages, ipa)

    def accept(self, vcpu: Vcpu, kind: int, flags: int, x0: int) -> None:
        """Take what `kind`, the class of the last exit, lets the host answer; once.

        ESR_EL2 and FAR_EL2 are those of that exit still: they are part of the vCPU's context.
        """
        if kind == _IRQ:
            return
        vcpu.words[_EXIT_CLASS] = _IRQ
        engine = self._engine
        answer, pending, advance, result = _ACCEPTED[kind]
        if answer is not None:
            results = answer(engine, vcpu, x0 & MASK64)
            engine.set_results(*results)
            if kind != ExitClass.SYSTEM_OFF:
                self._record(
                    GuestHypercall(vcpu.handle, vcpu.index, vcpu.exit_function, results[0])
                )
        elif flags & _PENDING_EXCEPTION and pending is not None:
            pending(engine, vcpu)
        elif flags & _INCREMENT_PC and advance:
            if result is not None:
                result(engine, engine.esr_el2, x0 & MASK64)
            engine.skip_instruction()


def nothing_but(code: ExitCode) -> tuple[int, ...]:
    """VCPU_RUN's registers with an exit code alone."""
    return SMCCC_SUCCESS, int(code), *[0] * (RunResult.COUNT - 2)


def request_of(kind: HypRequest, npages: int, ipa: int) -> tuple[int, ...]:
    """VCPU_RUN's registers for ExitCode.HYP_REQ."""
    results = [*nothing_but(ExitCode.HYP_REQ)]
    results[RunResult.REQ_TYPE] = int(kind)
    results[RunResult.REQ_PAGES] = npages
    results[RunResult.REQ_IPA] = ipa
    return tuple(results)


def _nothing() -> None:
    """No vCPU has run yet."""
