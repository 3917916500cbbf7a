# SPDX-License-Identifier: GPL-2.0-or-later
"""What a protected guest does not get of its CPU: explained completely, and really not there."""

from __future__ import annotations

import pytest

from fakes import a64
from fakes.el2_rig import RAM_IPA, El2, Guest
from pkvm.arm64 import registers as r
from pkvm.hyp.abi import ExitCode
from pkvm.hyp.features import FEATURES, Given, explain
from pkvm.hyp.id_registers import CONSTANTS, guest_id_registers

MODELS = ("cortex-a72", "max")
LORC_EL1 = r.SysReg(3, 0, 10, 4, 3)
DBGBVR1_EL1 = r.SysReg(2, 0, 0, 1, 4)
TTBR1_EL2 = r.SysReg(3, 4, 2, 0, 1)
PROBES: dict[str, tuple[int, ...]] = {
    "SVE": (a64.CNTB_X5, a64.mrs(5, r.SysReg(3, 0, 1, 2, 0))),
    "pointer authentication": (a64.mrs(5, r.SysReg(3, 0, 2, 1, 0)),),
    "generic authentication": (a64.PACGA_X5_X1_X2, a64.mrs(5, r.SysReg(3, 0, 2, 3, 0))),
    "virtualization host extensions": (a64.mrs(5, TTBR1_EL2), a64.mrs(5, r.HCR_EL2)),
    "limited ordering regions": (a64.mrs(5, LORC_EL1), a64.msr(LORC_EL1, 5)),
    "debug registers": (a64.mrs(5, DBGBVR1_EL1), a64.msr(DBGBVR1_EL1, 5)),
    "performance monitors (PMU)": (
        a64.mrs(5, r.PMCR_EL0),
        a64.mrs(5, r.SysReg(3, 3, 9, 13, 0)),
        a64.msr(r.SysReg(3, 0, 9, 14, 1), 5),
    ),
}
"""Instructions of a feature, each UNDEFINED in a guest that has it not."""
ELSEWHERE = {"AArch32 at EL0", "physical addresses"}
"""Which tests/hyp/test_exits.py and the walker's tests show."""
COUNTS_OF_DEBUG_REGISTERS = {(r.ID_AA64DFR0_EL1, lo) for lo in (12, 20, 28)}
AARCH32_AT_OTHER_LEVELS = {(r.ID_AA64PFR0_EL1, lo) for lo in (4, 8, 12)}


@pytest.fixture(scope="module", params=MODELS)
def guest(request: pytest.FixtureRequest) -> Guest:
    el2 = El2(cpu_model=request.param)
    guest = Guest(el2, [a64.WFI])
    assert guest.run() == ExitCode.TRAP
    return guest


def test_every_field_that_differs_is_explained(guest: Guest) -> None:
    engine = guest.el2.engine
    values = guest_id_registers(engine)
    known = {(feature.register, feature.lo) for feature in FEATURES}
    known |= COUNTS_OF_DEBUG_REGISTERS | AARCH32_AT_OTHER_LEVELS
    for crm in range(4, 8):
        for op2 in range(8):
            register = r.SysReg(3, 0, 0, crm, op2)
            try:
                hardware = engine.read_sysreg(register)
            except KeyError:
                continue
            for lo in range(0, 64, 4):
                value = values.get(register, 0)
                constant = CONSTANTS.get(register, 0) >> lo & 0xF
                if (hardware ^ value) >> lo & 0xF and not constant:
                    assert (register, lo) in known, f"{register.name} bits {lo + 3}:{lo}"


def test_what_is_hidden_has_a_reason_and_a_probe(guest: Guest) -> None:
    for answer in explain(guest.el2.engine):
        if answer.given in (Given.HIDDEN, Given.PART):
            assert answer.feature.why
            assert answer.feature.name in {*PROBES, *ELSEWHERE}


def test_what_is_hidden_is_undefined(guest: Guest) -> None:
    engine, memory = guest.el2.engine, guest.el2.machine.memory
    engine.write_sysreg(r.VBAR_EL1, RAM_IPA + 0x800)
    memory.write(guest.ram + 0xA00, a64.code([a64.WFI, a64.LOOP]))
    for answer in explain(engine):
        for instruction in PROBES.get(answer.feature.name, ()):
            memory.write(guest.ram, a64.code([instruction, a64.WFI, a64.LOOP]))
            engine.invalidate_code(guest.ram, 64)
            engine.write_sysreg(r.CPACR_EL1, 0x33 << 16)
            engine.write_sysreg(r.ESR_EL1, 0)
            engine.pc, engine.pstate, engine.x[5] = RAM_IPA, r.PSTATE_RESET, 0x5EC2E7
            assert guest.run() == ExitCode.TRAP
            where = f"{answer.feature.name}: {instruction:#010x}"
            assert engine.read_sysreg(r.ESR_EL1) == 1 << 25, where
            assert engine.x[5] == 0x5EC2E7, where


def test_the_models_differ() -> None:
    small, large = (explain(El2(cpu_model=model).engine) for model in MODELS)
    given = [{a.feature.name for a in one if a.given is Given.WHOLE} for one in (small, large)]
    assert given[0] < given[1]
    assert "SVE" in {a.feature.name for a in large if a.given is Given.HIDDEN}
    assert "SVE" in {a.feature.name for a in small if a.given is Given.ABSENT}


def test_asked_for_pointer_authentication_is_given() -> None:
    engine = El2(cpu_model="max").engine
    with_it = {answer.feature.name: answer.given for answer in explain(engine, ptrauth=True)}
    assert with_it["pointer authentication"] is Given.WHOLE
    assert with_it["generic authentication"] is Given.WHOLE
