# SPDX-License-Identifier: GPL-2.0-or-later
"""P11: what an exit may show, by exception class."""

from __future__ import annotations

import pytest

from pkvm.check.exits import shown_too_much

OK, IRQ, TRAP, ILLEGAL, HYP_REQ = 0, 0, 2, 3, 4
WFX, HVC, SMC, SYS, IABT, DABT, BRK = 0x01, 0x16, 0x17, 0x18, 0x20, 0x24, 0x3C
ISV, WNR, WORD = 1 << 24, 1 << 6, 2 << 22
FIPA, EE = 0x0000_0000_0804_0010 & ~0xF, 1 << 25 | 1 << 24


def esr(ec: int, iss: int = 0) -> int:
    return ec << 26 | 1 << 25 | iss


@pytest.mark.parametrize(
    "shown",
    [
        (IRQ, 0, 0, 0, 0, 0, 0),
        (ILLEGAL, 0, 0, 0, 0, 0, 0),
        (-22,),
        (HYP_REQ, 1, 3, 0, 0, 0, 0),
        (HYP_REQ, 2, 0, 0x4000_1000, 0, 0, 0),
        (TRAP, esr(WFX, 1), 0, 0, 0, 5, 0),
        (TRAP, esr(SYS, 0x30_0000), 1 << 63, 0, 0, 5, 0),
        (TRAP, esr(SYS, 1), 0, 0, 0, 4, 0),
        (TRAP, esr(HVC), 0x8400_0008, 0, 0, 0, 0),
        (TRAP, esr(HVC), 0xC400_0003, 1 << 40, 0, 0, 0),
        (TRAP, esr(HVC), 0xC400_0012, 1, 1 << 63, 0, 0),
        (TRAP, esr(IABT, 7), 0, 0, FIPA, 0, 0),
        (TRAP, esr(DABT, ISV | WNR | WORD | 7), 0xFFFF_FFFF, 0xFFF, FIPA, 5, EE),
        (TRAP, esr(DABT, ISV | WORD | 7), 0, 0xFFF, FIPA, 5, EE),
        (TRAP, esr(DABT, WNR | 7), 0, 8, FIPA, 5, 0),
    ],
)
def test_what_may_be(shown: tuple[int, ...]) -> None:
    assert list(shown_too_much((OK, *shown))) == []


@pytest.mark.parametrize(
    ("shown", "name"),
    [
        ((IRQ, 1, 0, 0, 0, 0, 0), "ESR"),
        ((IRQ, 0, 0, 0, 0, 5, 0), "PSTATE"),
        ((ILLEGAL, 0, 7, 0, 0, 0, 0), "X0"),
        ((HYP_REQ, 1, 3, 0x4000_1000, 0, 0, 0), "FAR"),
        ((HYP_REQ, 2, 0, 0x4000_1008, 0, 0, 0), "FAR"),
        ((TRAP, esr(WFX), 1, 0, 0, 5, 0), "X0"),
        ((TRAP, esr(WFX), 0, 0, 0, 0x6000_0005, 0), "PSTATE"),
        ((TRAP, esr(SYS, 1 | 5 << 5), 0, 0, 0, 5, 0), "ESR"),
        ((TRAP, esr(SYS, 1), 9, 0, 0, 5, 0), "X0"),
        ((TRAP, esr(HVC), 0xC400_0003, 1, 0x4000_0000, 0, 0), "HPFAR or X2"),
        ((TRAP, esr(HVC), 0x8400_0003, 1 << 32, 0, 0, 0), "FAR or X1"),
        ((TRAP, esr(HVC), 0xC600_0003, 0, 0, 0, 0), "ESR"),
        ((TRAP, esr(SMC), 0, 0, 0, 0, 0), "ESR"),
        ((TRAP, esr(BRK), 0, 0, 0, 0, 0), "ESR"),
        ((TRAP, esr(IABT), 0, 0x123, FIPA, 0, 0), "FAR"),
        ((TRAP, esr(IABT), 0, 0, FIPA, 5, 0), "PSTATE"),
        ((TRAP, esr(DABT, ISV | 3 << 16), 0, 0, FIPA, 5, 0), "ESR"),
        ((TRAP, esr(DABT, 3 << 16), 0, 0, FIPA, 5, 0), "ESR"),
        ((TRAP, esr(DABT, ISV | WORD), 1, 0, FIPA, 5, 0), "X0"),
        ((TRAP, esr(DABT, ISV | WNR | WORD), 1 << 32, 0, FIPA, 5, 0), "X0"),
        ((TRAP, esr(DABT), 0, 0x1000, FIPA, 5, 0), "FAR"),
        ((TRAP, esr(DABT), 0, 0, FIPA | 1 << 63, 5, 0), "HPFAR"),
        ((TRAP, esr(DABT), 0, 0, FIPA, 5, EE | 1), "SCTLR"),
    ],
)
def test_what_may_not(shown: tuple[int, ...], name: str) -> None:
    problems = list(shown_too_much((OK, *shown)))
    assert any(f"shows {name}" in problem for problem in problems), problems
