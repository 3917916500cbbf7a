# SPDX-License-Identifier: GPL-2.0-or-later
"""Registers, and moving a CPU's state to and from RAM."""

from __future__ import annotations

import random
import struct
from functools import cache
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unicorn import arm64_const

from fakes.cpu_fixtures import MakeGuest
from fakes.cpu_guest import (
    BACKING,
    CODE,
    DATA,
    PAGE_RWX,
    RAM_BASE,
    RAM_BYTES,
    ROOT,
    Guest,
    add,
    fmov_to_d,
    fmov_to_high,
    hvc,
    ldr,
    mov,
    set_virtual_irq,
)
from pkvm.arm64 import registers as reg
from pkvm.arm64 import stage2
from pkvm.arm64.registers import SysReg
from pkvm.machine.cpu.engine import StopReason
from pkvm.machine.cpu.errors import EngineError
from pkvm.machine.cpu.unicorn_engine import UnicornEngine
from pkvm.machine.memory import PAGE_SIZE, BusError, PhysicalMemory

if TYPE_CHECKING:
    from pkvm.machine.cpu.engine import CpuEngine

FIRST = 0x8020_0000
SECOND = 0x8020_4000
EL1_SYSTEM = [
    reg.TTBR0_EL1,
    reg.TTBR1_EL1,
    reg.MAIR_EL1,
    reg.VBAR_EL1,
    reg.TPIDR_EL0,
    reg.TPIDR_EL1,
    reg.CONTEXTIDR_EL1,
    reg.PAR_EL1,
    reg.CNTV_CVAL_EL0,
]


def test_engine_satisfies_the_protocol(guest: Guest) -> None:
    engine: CpuEngine = guest.engine
    assert engine.context_bytes == 12336


def fill(engine: UnicornEngine, seed: int) -> dict[str, object]:
    """Give every register of the context a value; what `read_all` must then show."""
    rng = random.Random(seed)
    engine.pstate = rng.choice((0, 4, 5)) | rng.getrandbits(4) << 28
    for index in range(31):
        engine.x[index] = rng.getrandbits(64)
    engine.pc = rng.getrandbits(62) << 2
    engine.set_sp(0, rng.getrandbits(64))
    engine.set_sp(1, rng.getrandbits(64))
    engine.set_elr_el1(rng.getrandbits(64))
    engine.set_spsr_el1(rng.getrandbits(32))
    engine.set_fp_registers(rng.randbytes(512) + struct.pack("<II", 0x0800_001F, 0x00C0_0000))
    for register in EL1_SYSTEM:
        engine.write_sysreg(register, rng.getrandbits(32) & ~0xFFF)
    return read_all(engine)


def read_all(engine: UnicornEngine) -> dict[str, object]:
    return {
        "x": list(engine.x),
        "pc": engine.pc,
        "pstate": engine.pstate,
        "sp": (engine.sp(0), engine.sp(1)),
        "elr": engine.elr_el1(),
        "spsr": engine.spsr_el1(),
        "fp": engine.fp_registers(),
        "system": [engine.read_sysreg(register) for register in EL1_SYSTEM],
    }


def test_save_and_load_carry_everything(guest: Guest) -> None:
    engine = guest.engine
    first = fill(engine, 1)
    engine.save_context(FIRST)
    second = fill(engine, 2)
    engine.save_context(SECOND)
    assert first != second
    engine.load_context(FIRST)
    assert read_all(engine) == first
    engine.load_context(SECOND)
    assert read_all(engine) == second


def test_two_contexts_take_turns_in_one_engine(guest: Guest) -> None:
    """Each counts in a general register, in V0 and in its own memory at the same IPA."""
    engine = guest.engine
    other_root, other_table, other_page = 0x8030_0000, 0x8030_4000, 0x8030_5000
    guest.memory.write_u64(other_root, other_table | 3)
    for page in range(64):
        guest.memory.write_u64(other_table + 8 * page, BACKING + page * PAGE_SIZE | PAGE_RWX)
    guest.memory.write_u64(other_table + 8 * (DATA >> 12), other_page | PAGE_RWX)
    guest.write_bytes(DATA, (111).to_bytes(8, "little"))
    guest.memory.write_u64(other_page, 222)
    guest.write(
        CODE, *mov(1, DATA), add(0, 0, 1), fmov_to_d(0, 0), fmov_to_high(0, 0), ldr(2, 1), hvc(0)
    )
    engine.write_sysreg(reg.CPACR_EL1, 3 << 20)
    engine.vector = lambda: False
    for context, root, start in ((FIRST, ROOT, 1000), (SECOND, other_root, 2000)):
        engine.write_sysreg(reg.VTTBR_EL2, stage2.vttbr(root, vmid=1))
        engine.x[0] = start
        engine.save_context(context)
    for turn in range(1, 5):
        for context, start, word in ((FIRST, 1000, 111), (SECOND, 2000, 222)):
            engine.load_context(context)
            engine.pc = CODE
            assert engine.run() is StopReason.VECTOR
            assert engine.x[0] == start + turn
            assert engine.x[2] == word
            assert engine.fp_registers()[:16] == struct.pack("<QQ", start + turn, start + turn)
            engine.save_context(context)


def test_virtual_irq_line_is_a_pin_and_not_context(guest: Guest) -> None:
    engine = guest.engine
    guest.write(CODE, 0xD50342FF, hvc(1))  # MSR DAIFClr, #2
    engine.pc = CODE
    set_virtual_irq(engine, level=True)
    engine.save_context(FIRST)
    engine.vector = lambda: guest.note() < 1
    for level, number in ((False, 1), (True, 0x99), (False, 1)):
        set_virtual_irq(engine, level=level)
        engine.load_context(FIRST)
        guest.exits.clear()
        assert engine.run() is StopReason.VECTOR
        assert guest.exits[-1].iss == number


def test_context_outside_ram_is_refused(guest: Guest) -> None:
    engine = guest.engine
    for pa in (0, RAM_BASE - 8, RAM_BASE + RAM_BYTES - engine.context_bytes + 8):
        with pytest.raises(BusError):
            engine.save_context(pa)
        with pytest.raises(BusError):
            engine.load_context(pa)
        with pytest.raises(BusError):
            engine.blank_context(pa)


def test_reset_state(guest: Guest) -> None:
    engine = guest.engine
    fill(engine, 3)
    for register in (reg.SCTLR_EL1, reg.TCR_EL1, reg.CPACR_EL1, reg.CNTKCTL_EL1, reg.MDSCR_EL1):
        engine.write_sysreg(register, 0x10)
    engine.write_sysreg(reg.VMPIDR_EL2, 0x8000_0003)
    engine.write_sysreg(reg.CNTVOFF_EL2, 0x1234)
    engine.write_sysreg(reg.MDCR_EL2, 0x200)
    kept = {
        register: engine.read_sysreg(register)
        for register in (
            reg.HCR_EL2,
            reg.VTTBR_EL2,
            reg.VTCR_EL2,
            reg.VMPIDR_EL2,
            reg.CNTVOFF_EL2,
            reg.MDCR_EL2,
            reg.SCR_EL3,
            reg.CPTR_EL2,
        )
    }
    engine.reset_context()
    found = read_all(engine)
    assert found == {
        "x": [0] * 31,
        "pc": 0,
        "pstate": 0x3C5,
        "sp": (0, 0),
        "elr": 0,
        "spsr": 0,
        "fp": bytes(520),
        "system": [0] * len(EL1_SYSTEM),
    }
    expected = {
        reg.SCTLR_EL1: 0x00C5_0078,
        reg.TCR_EL1: 0,
        reg.CPACR_EL1: 0,
        reg.CNTKCTL_EL1: 0,
        reg.MDSCR_EL1: 0,
        reg.OSLSR_EL1: 8,
        reg.ESR_EL1: 0,
        reg.FAR_EL1: 0,
        reg.CNTV_CTL_EL0: 0,
        reg.CNTP_CTL_EL0: 0,
    }
    assert {register: engine.read_sysreg(register) for register in expected} == expected
    assert {register: engine.read_sysreg(register) for register in kept} == kept
    guest.engine.write_sysreg(reg.VBAR_EL1, 0x8000)
    assert guest.run(hvc(3)).iss == 3


def test_blank_context_is_the_reset_state(guest: Guest) -> None:
    engine = guest.engine
    before = fill(engine, 4)
    engine.blank_context(FIRST)
    assert read_all(engine) == before
    engine.load_context(FIRST)
    assert (engine.pstate, engine.pc, list(engine.x)) == (0x3C5, 0, [0] * 31)
    guest.program_el2()
    assert guest.run(hvc(3)).iss == 3


@pytest.mark.parametrize("mode", [0, 4, 5])
def test_stack_pointers_follow_the_mode(guest: Guest, mode: int) -> None:
    engine = guest.engine
    engine.pstate = mode
    engine.set_sp(0, 0x100)
    engine.set_sp(1, 0x200)
    guest.write(CODE, 0x910003E3, 0xD4000001)  # MOV X3, SP; SVC #0
    engine.pc = CODE
    engine.vector = lambda: False
    engine.run()
    assert engine.x[3] == (0x200 if mode == 5 else 0x100)
    for other in (5, 0, 4):
        engine.pstate = other
        assert (engine.sp(0), engine.sp(1)) == (0x100, 0x200)


def test_changing_the_mode_keeps_the_stack_pointer_that_was_in_use(guest: Guest) -> None:
    engine = guest.engine
    engine.set_sp(1, 0x300)
    engine.pstate = reg.PSTATE_EL0T
    assert engine.sp(1) == 0x300
    engine.set_sp(0, 0x400)
    engine.pstate = reg.PSTATE_RESET
    assert (engine.sp(0), engine.sp(1)) == (0x400, 0x300)


def test_loading_a_context_clears_the_exclusive_monitor(guest: Guest) -> None:
    engine = guest.engine
    load_and_store = [*mov(1, DATA), 0xC85F7C20, hvc(0), 0xC8027C20, hvc(1)]  # LDXR X0; STXR W2
    guest.run(*load_and_store, exits=2)
    assert engine.x[2] == 0
    guest.run(*load_and_store)
    engine.save_context(FIRST)
    engine.load_context(FIRST)
    engine.run()
    assert engine.x[2] == 1


@pytest.mark.parametrize("value", [0x3C9, 0x3CD, 0x3C1, 0x3D3, 0x3DF])
def test_modes_that_no_guest_has(guest: Guest, value: int) -> None:
    with pytest.raises(ValueError, match="no mode"):
        guest.engine.pstate = value
    assert guest.engine.pstate == 0x3C5


def test_pstate_keeps_its_flags(guest: Guest) -> None:
    for value in (0xF000_03C5, 0x8000_0005, 0x6000_0000, 0x1000_0004):
        guest.engine.pstate = value
        assert guest.engine.pstate == value


@given(flags=st.integers(0, 15), rest=st.integers(0, 0xFFF), mode=st.sampled_from([0, 4, 5]))
def test_pstate_is_put_together_as_libunicorn_does(flags: int, rest: int, mode: int) -> None:
    engine = shared_engine()
    value = flags << 28 | rest << 10 & 0xC00 | rest & 0x3C0 | mode
    engine.pstate = value
    assert engine.pstate == value
    assert engine._read_register(arm64_const.UC_ARM64_REG_PSTATE) == value


@cache
def shared_engine() -> UnicornEngine:
    return UnicornEngine(PhysicalMemory(RAM_BASE, RAM_BYTES))


def test_xzr_is_not_stored(guest: Guest) -> None:
    assert len(guest.engine.x) == 31
    with pytest.raises(IndexError):
        guest.engine.x[31]


def test_wrong_values_are_refused(guest: Guest) -> None:
    with pytest.raises(struct.error):
        guest.engine.set_results(0, 0, 0, 1 << 64)
    with pytest.raises(ValueError, match="520 bytes"):
        guest.engine.set_fp_registers(bytes(512))


def test_fp_registers_as_the_guest_sets_them(guest: Guest) -> None:
    guest.engine.write_sysreg(reg.CPACR_EL1, 3 << 20)
    guest.run(*mov(0, 0x1111), *mov(1, 0x2222), fmov_to_d(31, 0), fmov_to_high(31, 1), hvc(0))
    assert guest.engine.fp_registers()[31 * 16 : 512] == struct.pack("<QQ", 0x1111, 0x2222)


def test_system_registers(make_guest: MakeGuest) -> None:
    engine = make_guest().engine
    assert engine.read_sysreg(reg.MIDR_EL1) == 0x410F_D083
    assert engine.read_sysreg(reg.ID_AA64MMFR0_EL1) & 0xF == 4
    with pytest.raises(KeyError):
        engine.read_sysreg(SysReg(3, 0, 15, 15, 7))
    with pytest.raises(KeyError):
        engine.write_sysreg(reg.ERXFR_EL1, 0)
    with pytest.raises(EngineError, match="ID_AA64ISAR0_EL1 is read-only"):
        engine.write_sysreg(reg.ID_AA64ISAR0_EL1, 0)
    engine.write_sysreg(reg.VPIDR_EL2, 0x1234)
    assert engine.read_sysreg(reg.MIDR_EL1) == 0x1234


def test_breakpoint_registers_store_and_nothing_matches(guest: Guest) -> None:
    guest.run(
        *mov(0, 0xA000),
        0xD5100240,  # MSR MDSCR_EL1, X0
        *mov(0, CODE + 16 * 4),
        0xD5100080,  # MSR DBGBVR0_EL1, X0
        *mov(0, 0x1E7),
        0xD51000A0,  # MSR DBGBCR0_EL1, X0
        0xD50348FF,  # MSR DAIFClr, #8
        hvc(2),
    )
    assert guest.exits[-1].iss == 2
    assert guest.engine.read_sysreg(reg.DBGBCR0_EL1) == 0x1E7


def test_several_gib_of_ram() -> None:
    try:
        memory = PhysicalMemory(RAM_BASE, 5 << 30)
    except MemoryError as error:
        pytest.skip(str(error))
    engine = UnicornEngine(memory)
    last = memory.ram_end - PAGE_SIZE
    memory.write(last, struct.pack("<2I", 0xD28000E0, 0xD4000022))  # MOVZ X0, #7; HVC #1
    engine.vector = lambda: False
    engine.pc = last
    assert engine.run() is StopReason.VECTOR
    assert (engine.x[0], engine.pc) == (7, last + 8)
    engine.close()
