# SPDX-License-Identifier: GPL-2.0-or-later
"""EL2s without one guard of a vCPU's registers (facts §5.4)."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from pkvm.arm64.bits import MASK64
from pkvm.arm64.registers import hcr
from pkvm.check.mutants.install import Install, replaced
from pkvm.hyp import exits, mmio_guard, power, run, vgic
from pkvm.hyp.abi import VcpuFlag
from pkvm.hyp.exits import ExitClass, Exits
from pkvm.hyp.vcpu import Vcpu
from pkvm.machine.cpu.engine import CpuEngine


def _rule(*kinds: ExitClass, **changes: Any) -> Install:
    """Other columns for classes of exits."""

    def install(stack: ExitStack) -> None:
        rules = {kind: exits.RULES[kind]._replace(**changes) for kind in kinds}
        stack.enter_context(patch.dict(exits.RULES, rules))
        for name, column in (("_PUBLISHED", exits._published), ("_ACCEPTED", exits._accepted)):
            columns = [column(exits.RULES[kind]) for kind in ExitClass]
            stack.enter_context(patch.object(exits, name, columns))

    return install


def _page_written(stack: ExitStack) -> None:
    publish = Exits.publish

    def weak(self: Exits, vcpu: Vcpu, kind: ExitClass, esr: int, state: exits.State) -> None:
        publish(self, vcpu, kind, esr, state)
        vcpu.page[29] = self._engine.x[29]

    stack.enter_context(patch.object(Exits, "publish", weak))


def _answers_again(stack: ExitStack) -> None:
    """The class outlives the interrupt that ends the run after it."""
    accept, publish = Exits.accept, Exits.publish_nothing
    accepted: dict[int, int] = {}

    def weak_accept(self: Exits, vcpu: Vcpu, kind: int, flags: int, x0: int) -> None:
        accepted[vcpu.pa] = kind
        accept(self, vcpu, kind, flags, x0)

    def weak_publish(self: Exits, vcpu: Vcpu, kind: ExitClass) -> None:
        publish(self, vcpu, kind)
        vcpu.exit_class = accepted.get(vcpu.pa, kind) if kind == ExitClass.IRQ else kind

    stack.enter_context(patch.object(Exits, "accept", weak_accept))
    stack.enter_context(patch.object(Exits, "publish_nothing", weak_publish))


def _raw_entropy(engine: CpuEngine, vcpu: Vcpu, host_x0: int) -> tuple[int, int, int, int]:
    first, second, third = vcpu.page[exits._ENTROPY : exits._ENTROPY + 3].tolist()
    return (host_x0, first, second, third)


def _interrupt_advances(stack: ExitStack) -> None:
    """The host may step over an instruction at an interrupt."""
    accept = Exits.accept

    def weak(self: Exits, vcpu: Vcpu, kind: int, flags: int, x0: int) -> None:
        accept(self, vcpu, kind, flags, x0)
        if kind == ExitClass.IRQ and flags & VcpuFlag.INCREMENT_PC:
            self._engine.skip_instruction()

    stack.enter_context(patch.object(Exits, "accept", weak))


def _page_read(stack: ExitStack) -> None:
    """Where the host says that it changed them, the registers are those of its page."""
    accept = Exits.accept

    def weak(self: Exits, vcpu: Vcpu, kind: int, flags: int, x0: int) -> None:
        accept(self, vcpu, kind, flags, x0)
        if flags & VcpuFlag.DIRTY:
            self._x[:31] = vcpu.page[:31]

    stack.enter_context(patch.object(Exits, "accept", weak))


MUTANTS: dict[str, Install] = {
    "FAR shows the page offset only": replaced(exits, "_DABT_FAR", MASK64),
    "SCTLR_EL1 shows endianness only": replaced(exits, "_DABT_ENDIAN", MASK64),
    "the register of an access is hidden": _rule(
        ExitClass.MMIO_READ, ExitClass.MMIO_WRITE, esr=exits._WHOLE_ESR
    ),
    "an abort that is no device's has no syndrome": _rule(ExitClass.DABT, esr=exits._WHOLE_ESR),
    "the register of MRS is hidden": _rule(ExitClass.SYSREG_READ, esr=exits._WHOLE_ESR),
    "the register of MSR is hidden": _rule(ExitClass.SYSREG_WRITE, esr=exits._WHOLE_ESR),
    "a store shows what it stores": replaced(exits, "_SIZE_MASKS", (MASK64,) * 4),
    "CPU_ON shows its target only": _rule(ExitClass.CPU_ON, arguments=3),
    "CPU_SUSPEND shows no argument": _rule(ExitClass.CPU_SUSPEND, arguments=1),
    "TRNG shows the number of bits only": _rule(ExitClass.TRNG, arguments=2),
    "a fetch shows no address": _rule(ExitClass.IABT, far=MASK64),
    "the host's page is not written": _page_written,
    "the host's page is not read": _page_read,
    "an interrupt steps over nothing": _interrupt_advances,
    "only emulated instructions are stepped over": _rule(
        ExitClass.DABT, ExitClass.IABT, advance=True
    ),
    "a store changes no register": _rule(ExitClass.MMIO_WRITE, result=exits._loaded_value),
    "MSR changes no register": _rule(ExitClass.SYSREG_WRITE, result=exits._read_sysreg),
    "WFI takes no exception": _rule(ExitClass.WFX, pending=exits._undefined),
    "an answer counts once": _answers_again,
    "SYSTEM_OFF does not succeed": _rule(ExitClass.SYSTEM_OFF, answer=exits._hosts_word),
    "the host does not choose CPU_ON's result": replaced(
        power, "settle_on", lambda caller, host_result: host_result
    ),
    "TRNG gives so many bits and no other result": _rule(ExitClass.TRNG, answer=_raw_entropy),
    "the host decides TWI and TWE only": replaced(run, "WAIT_TRAPS", hcr("TWI", "TWE", "TVM")),
    "a list register has only bits that mean something": replaced(vgic, "_ALLOWED", MASK64),
    "devices are where the guest says": replaced(
        mmio_guard, "allows", lambda vm, ipa, nbytes: True
    ),
}
"""By the guard that is missing."""
