# SPDX-License-Identifier: GPL-2.0-or-later
"""Exceptions that the engine takes to EL1 by itself, and those that EL2 injects (Arm ARM D1.3)."""

from __future__ import annotations

import struct

import pytest

from fakes.cpu_fixtures import MakeGuest
from fakes.cpu_guest import (
    CODE,
    DATA,
    EL1_REPORT,
    ERET,
    NOP,
    UDF,
    UNMAPPED,
    VECTORS,
    Guest,
    br,
    brk,
    daifclr,
    hvc,
    ldr,
    mov,
    movz,
    msr,
    set_virtual_irq,
    smc,
    svc,
)
from pkvm.arm64 import esr
from pkvm.arm64 import registers as reg
from pkvm.arm64.esr import EC
from pkvm.arm64.registers import SysReg
from pkvm.machine.cpu.engine import StopReason

ELR_EL1 = SysReg(3, 0, 4, 0, 1)
SPSR_EL1 = SysReg(3, 0, 4, 0, 0)
THUMB_USER = 0x30
UNDEF = esr.IL
NOWHERE = 0x7F00_0000


def report(guest: Guest) -> tuple[int, int, int, int, int]:
    """Vector offset, ESR, FAR, ELR, SPSR that EL1 reported by its HVC."""
    assert guest.exits[-1].esr == 0x5A00_0000 | EL1_REPORT
    offset, syndrome, far, elr, spsr = (guest.engine.x[n] for n in range(20, 25))
    return offset, syndrome, far, elr, spsr


@pytest.mark.parametrize(
    ("word", "pstate", "offset", "syndrome", "return_to"),
    [
        (svc(5), 0x3C5, 0x200, 0x5600_0005, CODE + 4),
        (svc(5), 0x3C4, 0x000, 0x5600_0005, CODE + 4),
        (svc(6), 0x000, 0x400, 0x5600_0006, CODE + 4),
        (brk(1), 0x3C5, 0x200, 0xF200_0001, CODE),
        (UDF, 0x3C5, 0x200, UNDEF, CODE),
        (hvc(1), 0x000, 0x400, UNDEF, CODE),
        (smc(1), 0x000, 0x400, UNDEF, CODE),
        (msr(reg.HCR_EL2, 0), 0x3C5, 0x200, UNDEF, CODE),
    ],
)
def test_synchronous_exceptions(
    guest: Guest, word: int, pstate: int, offset: int, syndrome: int, return_to: int
) -> None:
    guest.run(word, pstate=pstate)
    assert report(guest) == (offset, syndrome, 0, return_to, pstate)
    assert guest.engine.pstate == reg.PSTATE_RESET


def test_stage1_data_and_instruction_aborts(guest: Guest) -> None:
    guest.enable_stage1()
    guest.run(*mov(1, NOWHERE), ldr(0, 1))
    abort = EC.DABT_CUR << 26 | esr.IL | esr.FSC_TRANSLATION | 1
    assert report(guest) == (0x200, abort, NOWHERE, CODE + 16, 0x3C5)
    guest.run(*mov(1, NOWHERE), br(1))
    abort = EC.IABT_CUR << 26 | esr.IL | esr.FSC_TRANSLATION | 1
    assert report(guest) == (0x200, abort, NOWHERE, NOWHERE, 0x3C5)


def test_el1_exceptions_do_not_touch_the_syndromes_of_el2(guest: Guest) -> None:
    guest.enable_stage1()
    hole = DATA + 0x5000
    guest.unmap(hole)

    def vector() -> bool:
        guest.engine.pc += 4
        return guest.note() < 2

    guest.write(CODE, *mov(1, hole), ldr(0, 1), *mov(1, NOWHERE), ldr(0, 1))
    guest.engine.vector = vector
    guest.engine.pc = CODE
    assert guest.engine.run() is StopReason.VECTOR
    assert [found.far for found in guest.exits] == [hole, hole]
    assert report(guest)[2] == NOWHERE


def test_eret_to_el0_and_back_by_svc(guest: Guest) -> None:
    user = CODE + 0x100
    guest.write(user, movz(3, 3), svc(9))
    guest.run(*mov(0, user), msr(ELR_EL1, 0), movz(1, 0), msr(SPSR_EL1, 1), ERET)
    assert report(guest) == (0x400, 0x5600_0009, 0, user + 8, 0)
    assert guest.engine.x[3] == 3


@pytest.mark.parametrize(
    ("pstate", "offset"), [(0x3C5, 0x200), (0x3C4, 0x000), (0x6000_0000, 0x400)]
)
def test_injected_exception(guest: Guest, pstate: int, offset: int) -> None:
    engine = guest.engine
    engine.pstate = pstate
    engine.pc = CODE
    engine.take_exception_to_el1(0x9600_0010, 0x1234)
    assert engine.pc == VECTORS + offset
    assert engine.elr_el1() == CODE
    assert engine.spsr_el1() == pstate
    assert engine.read_sysreg(reg.ESR_EL1) == 0x9600_0010
    assert engine.read_sysreg(reg.FAR_EL1) == 0x1234
    assert engine.pstate == reg.PSTATE_RESET | pstate & reg.PSTATE_NZCV


def test_injection_without_far_keeps_far(guest: Guest) -> None:
    engine = guest.engine
    engine.write_sysreg(reg.FAR_EL1, 0x77)
    engine.take_exception_to_el1(UNDEF, None)
    assert engine.read_sysreg(reg.FAR_EL1) == 0x77


def test_injection_inside_the_vector(guest: Guest) -> None:
    engine = guest.engine
    guest.write(CODE, hvc(1))

    def vector() -> bool:
        if guest.note() == 1:
            engine.take_exception_to_el1(UNDEF, None)
            return True
        return False

    engine.vector = vector
    engine.pc = CODE
    assert engine.run() is StopReason.VECTOR
    assert report(guest) == (0x200, UNDEF, 0, CODE + 4, 0x3C5)


def test_pan_is_set_unless_span(make_guest: MakeGuest) -> None:
    engine = make_guest(cpu_model="max").engine
    engine.write_sysreg(reg.SCTLR_EL1, reg.SCTLR_EL1_RESET & ~reg.SCTLR_SPAN)
    engine.take_exception_to_el1(UNDEF, None)
    assert engine.pstate & reg.PSTATE_PAN
    engine.pstate = reg.PSTATE_RESET
    engine.write_sysreg(reg.SCTLR_EL1, reg.SCTLR_EL1_RESET | reg.SCTLR_SPAN)
    engine.take_exception_to_el1(UNDEF, None)
    assert not engine.pstate & reg.PSTATE_PAN


def test_injection_banks_the_stack_pointers(guest: Guest) -> None:
    engine = guest.engine
    engine.pstate = reg.PSTATE_EL0T
    engine.set_sp(0, 0x1110)
    engine.set_sp(1, 0x2220)
    engine.take_exception_to_el1(UNDEF, None)
    assert (engine.sp(0), engine.sp(1)) == (0x1110, 0x2220)
    guest.write(VECTORS + 0x400, 0x910003E5, hvc(0))  # MOV X5, SP
    engine.vector = lambda: False
    engine.run()
    assert engine.x[5] == 0x2220


def test_virtual_irq_waits_for_unmasking(guest: Guest) -> None:
    engine = guest.engine
    set_virtual_irq(engine, level=True)
    found = guest.run(NOP, hvc(1), daifclr(2), NOP, NOP)
    assert (found.iss, found.pc) == (1, CODE + 8)
    assert engine.run() is StopReason.VECTOR
    offset, _, _, elr, spsr = report(guest)
    assert (offset, elr, spsr) == (0x280, CODE + 12, 0x345)


def test_lowered_virtual_irq_is_not_taken(guest: Guest) -> None:
    set_virtual_irq(guest.engine, level=True)
    set_virtual_irq(guest.engine, level=False)
    assert guest.run(daifclr(2), NOP, hvc(5)).iss == 5


def test_virtual_irq_by_hcr_vi(guest: Guest) -> None:
    engine = guest.engine
    engine.write_sysreg(reg.HCR_EL2, engine.read_sysreg(reg.HCR_EL2) | reg.hcr("VI"))
    guest.run(daifclr(2), NOP, hvc(5))
    assert report(guest)[0] == 0x280


def test_pending_virtual_irq_leaves_an_exit_alone(guest: Guest) -> None:
    """EL2 gets the CPU at the exit; the interrupt comes when the guest runs again."""
    engine = guest.engine
    guest.write(CODE, hvc(2), hvc(3))
    engine.pstate, engine.pc = 0x5, CODE

    def vector() -> bool:
        set_virtual_irq(engine, level=True)
        return False

    engine.vector = vector
    assert engine.run() is StopReason.VECTOR
    assert (engine.pc, engine.pstate) == (CODE + 4, 0x5)
    guest.exits.clear()
    engine.vector = lambda: guest.note() < 1
    assert engine.run() is StopReason.VECTOR
    assert report(guest)[0] == 0x280
    assert report(guest)[3] == CODE + 4


def thumb_guest(guest: Guest, *halfwords: int) -> list[int]:
    """Put Thumb code at DATA; the words that drop EL1 to it."""
    guest.write_bytes(DATA, struct.pack(f"<{len(halfwords)}H", *halfwords))
    return [
        *mov(0, DATA),
        msr(ELR_EL1, 0),
        movz(2, THUMB_USER),
        msr(SPSR_EL1, 2),
        ERET,
    ]


def test_aarch32_el0_shows_in_pstate_and_goes_on_where_it_was(guest: Guest) -> None:
    engine = guest.engine
    words = thumb_guest(guest, 0x202A, 0x6008, 0xDF01)  # MOVS R0, #42; STR R0, [R1]; SVC #1
    found = guest.run(*mov(1, UNMAPPED), *words)
    assert found.ec == EC.DABT_LOW
    assert found.pstate & reg.PSTATE_NRW
    assert (found.pc, found.far) == (DATA + 2, UNMAPPED)
    assert (engine.x[0], engine.x[1]) == (42, UNMAPPED)
    guest.map(UNMAPPED, pa=0x8020_0000)
    engine.flush_tlb()
    assert engine.run() is StopReason.VECTOR
    assert report(guest) == (0x600, EC.SVC64 - 4 << 26 | 1, 0, DATA + 6, THUMB_USER)
    assert guest.memory.read_u64(0x8020_0000) == 42


def test_aarch32_state_is_set_by_pstate_as_it_was_read(guest: Guest) -> None:
    engine = guest.engine
    words = thumb_guest(guest, 0x202A, 0x6008, 0x3001, 0x6008)  # ...; ADDS R0, #1; STR R0, [R1]
    found = guest.run(*mov(1, UNMAPPED), *words)
    engine.save_context(0x8020_0000)
    guest.run_known_program()
    engine.load_context(0x8020_0000)
    assert engine.pstate == found.pstate
    engine.pstate = reg.PSTATE_RESET
    engine.pstate = found.pstate
    engine.pc = found.pc + 2
    engine.x[0] = 0x50
    guest.exits.clear()
    engine.vector = lambda: guest.note() < 1
    assert engine.run() is StopReason.VECTOR
    assert guest.exits[-1].pc == DATA + 6
    assert engine.x[0] == 0x51


def test_slice_ends_in_aarch32_el0(make_guest: MakeGuest) -> None:
    guest = make_guest(count_blocks=True)
    engine = guest.engine
    guest.write(CODE, *thumb_guest(guest, 0x3301, 0xE7FD))  # ADDS R3, #1; B .-2
    engine.pc = CODE
    for rounds in (10, 30):
        engine.set_slice(rounds)
        assert engine.run() is StopReason.SLICE
        assert engine.pstate & reg.PSTATE_NRW
        assert engine.pc in (DATA, DATA + 2)
    assert 30 <= engine.x[3] <= 40


def test_undef_injected_into_aarch32_el0(guest: Guest) -> None:
    engine = guest.engine
    guest.run(*mov(1, UNMAPPED), *thumb_guest(guest, 0x6008))
    engine.take_exception_to_el1(UNDEF, None)
    assert engine.pc == VECTORS + 0x600
    assert engine.elr_el1() == DATA
    assert not engine.pstate & reg.PSTATE_NRW


def test_thumb_code_does_not_bring_back_replays(guest: Guest) -> None:
    """libunicorn drops `no_exit_request` when it translates Thumb code."""
    engine = guest.engine
    for _ in range(3):
        guest.run(*mov(1, DATA), *thumb_guest(guest, 0x6008, 0xDF01), exits=1)
        assert report(guest)[0] == 0x600
    assert engine._no_exit[0] == 1
    guest.run(*mov(1, UNMAPPED), *thumb_guest(guest, 0x6008))
    assert engine._no_exit[0] == 1
    guest.run_known_program()
