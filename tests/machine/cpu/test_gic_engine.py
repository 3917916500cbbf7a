# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest code and the virtual CPU interface on the engine: interrupts taken, traps, maintenance."""

from __future__ import annotations

import pytest

from fakes.cpu_fixtures import MakeGuest
from fakes.cpu_guest import (
    CODE,
    EL1_REPORT,
    ERET,
    NOP,
    UNMAPPED,
    VECTORS,
    WFI,
    Guest,
    add,
    b,
    daifclr,
    hvc,
    ldr,
    mov,
    mrs,
    msr,
    set_virtual_irq,
    sub,
)
from pkvm.arm64 import gic as g
from pkvm.arm64 import registers as reg
from pkvm.arm64.esr import EC
from pkvm.machine.cpu.engine import StopReason

IRQ_EL1H, FIQ_EL1H = 0x280, 0x300
HANDLER = [
    mrs(10, reg.ICC_IAR1_EL1),
    mrs(11, reg.ICC_RPR_EL1),
    msr(reg.ICC_EOIR1_EL1, 10),
    add(12, 12, 1),
    ERET,
]
"""Counts in X12; X10 is the last INTID, X11 the running priority meanwhile."""
OPEN = g.VMCR.encode(VENG0=1, VENG1=1, VPMR=0xF8)
UNMASKED = 0x5
"""EL1h, nothing masked."""
ICC_WRITE_ONLY = (reg.ICC_EOIR0_EL1, reg.ICC_EOIR1_EL1, reg.ICC_DIR_EL1, reg.ICC_SGI1R_EL1,
                  reg.ICC_SGI0R_EL1, reg.ICC_ASGI1R_EL1)  # fmt: skip
ICC_READ_ONLY = (reg.ICC_IAR0_EL1, reg.ICC_IAR1_EL1, reg.ICC_HPPIR0_EL1, reg.ICC_HPPIR1_EL1,
                 reg.ICC_RPR_EL1)  # fmt: skip
ICC_EITHER = (reg.ICC_PMR_EL1, reg.ICC_BPR0_EL1, reg.ICC_BPR1_EL1, reg.ICC_AP0R0_EL1,
              reg.ICC_AP1R0_EL1, reg.ICC_CTLR_EL1, reg.ICC_IGRPEN0_EL1,
              reg.ICC_IGRPEN1_EL1)  # fmt: skip


def pending(intid: int, priority: int = 0x80, *, group: int = 1, eoi: bool = False) -> int:
    return g.LR.encode(State=1, Group=group, Priority=priority, vINTID=intid) | (
        g.LR_EOI if eoi else 0
    )


@pytest.fixture
def taker(guest: Guest) -> Guest:
    """A guest whose IRQ handler serves interrupts, at an interface that lets them through."""
    guest.write(VECTORS + IRQ_EL1H, *HANDLER)
    guest.engine.gic.load_context(OPEN, 0, 0)
    return guest


def test_pfr0_says_gic(guest: Guest) -> None:
    assert guest.engine.read_sysreg(reg.ID_AA64PFR0_EL1) >> 24 & 0xF == 1
    guest.run(mrs(0, reg.ID_AA64PFR0_EL1), hvc(0))
    assert guest.engine.x[0] >> 24 & 0xF == 1


def test_irq_is_acknowledged_and_ended_without_el2(taker: Guest) -> None:
    engine = taker.engine
    engine.gic.load([pending(40), pending(41, 0x40), pending(42, 0x90)], 0)
    assert taker.run(NOP, NOP, hvc(1), pstate=UNMASKED).iss == 1
    assert len(taker.exits) == 1
    assert (engine.x[10], engine.x[11], engine.x[12]) == (42, 0x90, 3)
    assert [lr >> 62 for lr in engine.gic.lr] == [0, 0, 0, 0]


def test_guest_opens_the_interface_itself(taker: Guest) -> None:
    """Each of the three gates, opened last, is noticed before the next instruction."""
    engine = taker.engine
    gates = ([*mov(0, 0xF8), msr(reg.ICC_PMR_EL1, 0)], [*mov(1, 1), msr(reg.ICC_IGRPEN1_EL1, 1)],
             [daifclr(2)])  # fmt: skip
    for last in range(3):
        engine.gic.load_context(0, 0, 0)
        engine.gic.load([pending(40)], 0)
        words = [word for gate in gates[last + 1 :] + gates[:last] for word in gate]
        engine.x[12] = 0
        taker.run(*words, add(5, 12, 0), *gates[last], add(6, 12, 0), hvc(1))
        assert (engine.x[5], engine.x[6], engine.x[10]) == (0, 1, 40)


def test_masking_is_noticed_at_once(taker: Guest) -> None:
    engine = taker.engine
    engine.gic.load([pending(40)], 0)
    taker.run(*mov(0, 0), msr(reg.ICC_PMR_EL1, 0), daifclr(2), NOP, hvc(1))
    assert engine.x[12] == 0


def test_end_of_one_lets_the_next_in_at_once(taker: Guest) -> None:
    """A pending interrupt of lower priority waits for the priority drop, with IRQs unmasked."""
    engine = taker.engine
    engine.gic.load([pending(40, 0x40), pending(41, 0x80)], 0)
    taker.write(VECTORS + IRQ_EL1H, mrs(10, reg.ICC_IAR1_EL1), add(12, 12, 1), hvc(9))
    taker.run(NOP, pstate=UNMASKED)
    assert (engine.x[10], engine.x[12]) == (40, 1)
    taker.run(daifclr(2), add(5, 12, 0), msr(reg.ICC_EOIR1_EL1, 10), add(6, 12, 0))
    assert (engine.x[10], engine.x[12], engine.x[5]) == (41, 2, 1)
    assert engine.x[6] == 0


def test_wfi_goes_on_when_an_interrupt_is_pending(taker: Guest) -> None:
    """Masked or not; it traps to EL2 only where it would wait."""
    engine = taker.engine
    engine.gic.load([pending(40)], 0)
    assert taker.run(WFI, hvc(1)).iss == 1
    engine.gic.load([], 0)
    assert taker.run(WFI, hvc(1)).ec == EC.WFX


def test_fiq_for_group_0(taker: Guest) -> None:
    engine = taker.engine
    engine.gic.load([pending(7, group=0)], 0)
    taker.run(NOP, NOP, pstate=UNMASKED)
    assert engine.x[20] == FIQ_EL1H
    assert taker.exits[-1].iss == EL1_REPORT


@pytest.mark.parametrize("register", [*ICC_WRITE_ONLY[3:], reg.ICC_SRE_EL1], ids=lambda r: r.name)
def test_writes_that_belong_to_el2_trap(guest: Guest, register: reg.SysReg) -> None:
    found = guest.run(*mov(7, 0x1234), msr(register, 7), hvc(1))
    assert (found.ec, found.pc) == (EC.SYS64, CODE + 16)
    assert found.iss == register.iss | 7 << 5


def test_reading_sre_traps(guest: Guest) -> None:
    found = guest.run(mrs(3, reg.ICC_SRE_EL1), hvc(1))
    assert (found.ec, found.iss) == (EC.SYS64, reg.ICC_SRE_EL1.iss | 3 << 5 | 1)


@pytest.mark.parametrize(
    "word",
    [mrs(0, register) for register in ICC_WRITE_ONLY]
    + [msr(register, 0) for register in ICC_READ_ONLY],
)
def test_wrong_direction_is_undefined(guest: Guest, word: int) -> None:
    guest.run(word, hvc(1))
    assert (guest.engine.x[20], guest.engine.x[21]) == (0x200, 1 << 25)


@pytest.mark.parametrize("register", [*ICC_READ_ONLY, *ICC_EITHER], ids=lambda r: r.name)
def test_el0_has_no_access(guest: Guest, register: reg.SysReg) -> None:
    guest.run(mrs(0, register), pstate=reg.PSTATE_EL0T)
    assert (guest.engine.x[20], guest.engine.x[21]) == (0x400, 1 << 25)


@pytest.mark.parametrize("register", ICC_EITHER, ids=lambda r: r.name)
def test_registers_keep_what_they_have(guest: Guest, register: reg.SysReg) -> None:
    guest.run(*mov(0, 0xFFFF_FFFF_FFFF_FFFF), msr(register, 0), mrs(1, register), hvc(1))
    expected = {
        reg.ICC_PMR_EL1: 0xF8, reg.ICC_BPR0_EL1: 7, reg.ICC_BPR1_EL1: 7,
        reg.ICC_AP0R0_EL1: 0xFFFF_FFFF, reg.ICC_AP1R0_EL1: 0xFFFF_FFFF,
        reg.ICC_CTLR_EL1: 0x403, reg.ICC_IGRPEN0_EL1: 1, reg.ICC_IGRPEN1_EL1: 1,
    }  # fmt: skip
    assert guest.engine.x[1] == expected[register]


def test_maintenance_interrupt_leaves_right_after_the_instruction(taker: Guest) -> None:
    engine = taker.engine
    engine.gic.load([pending(40, eoi=True)], 0)
    taker.write(CODE, mrs(10, reg.ICC_IAR1_EL1), msr(reg.ICC_EOIR1_EL1, 10), add(0, 0, 1), b(0))
    engine.pc = CODE
    assert engine.run() is StopReason.INTERRUPT
    assert (engine.pc, engine.x[0]) == (CODE + 8, 0)
    assert engine.gic.misr == g.MISR_EOI
    engine.gic.load([], 0)
    taker.write(CODE + 8, hvc(3))
    engine.vector = lambda: taker.note() < 1
    assert engine.run() is StopReason.VECTOR
    assert taker.exits[-1].iss == 3


def test_maintenance_that_is_there_at_entry_leaves_at_once(taker: Guest) -> None:
    engine = taker.engine
    engine.gic.load([], g.HCR_UIE)
    taker.write(CODE, add(0, 0, 1), b(0))
    engine.pc = CODE
    assert engine.run() is StopReason.INTERRUPT
    assert (engine.pc, engine.x[0]) == (CODE, 0)


def test_a_pending_interrupt_does_not_touch_an_exit(taker: Guest) -> None:
    """A device access while an interrupt is pending, masked or about to be taken."""
    engine = taker.engine
    engine.gic.load([pending(40)], 0)
    found = taker.run(*mov(1, UNMAPPED), ldr(2, 1), hvc(1))
    assert (found.ec, found.pc) == (EC.DABT_LOW, CODE + 16)
    assert engine.pc == CODE + 16
    engine.pc += 4
    engine.pstate = UNMASKED
    taker.write(CODE + 20, sub(3, 3, 1), hvc(1))
    assert engine.run() is StopReason.VECTOR
    assert (engine.x[10], engine.x[12], taker.exits[-1].iss) == (40, 1, 1)


def test_line_falls_between_runs(taker: Guest) -> None:
    engine = taker.engine
    engine.gic.load([pending(40)], 0)
    assert taker.run(hvc(1), daifclr(2), NOP, hvc(2)).iss == 1
    engine.gic.load([], 0)
    engine.vector = lambda: taker.note() < 1
    assert engine.run() is StopReason.VECTOR
    assert (taker.exits[-1].iss, engine.x[12]) == (2, 0)


def test_interface_of_a_closed_engine_is_harmless(make_guest: MakeGuest) -> None:
    guest = make_guest()
    guest.engine.close()
    set_virtual_irq(guest.engine, level=True)
    guest.engine.gic.load([], g.HCR_UIE)
    assert guest.engine.gic.misr == g.MISR_U


def test_interrupts_repeat_exactly_in_virtual_time(make_guest: MakeGuest) -> None:
    found = []
    for _ in range(2):
        guest = make_guest(count_blocks=True)
        engine = guest.engine
        guest.write(VECTORS + IRQ_EL1H, *HANDLER)
        engine.gic.load_context(OPEN, 0, 0)
        guest.write(CODE, add(0, 0, 1), b(-1))
        engine.pc, engine.pstate = CODE, UNMASKED
        seen = []
        for blocks in (7, 100, 5, 20, 51, 9, 50):
            engine.gic.load([pending(40 + blocks)], 0)
            engine.set_slice(blocks)
            assert engine.run() is StopReason.SLICE
            seen.append((engine.pc, engine.x[0], engine.x[10], engine.x[12], engine.blocks))
        found.append(seen)
    assert found[0] == found[1]
    assert found[0][-1][3] == 7
