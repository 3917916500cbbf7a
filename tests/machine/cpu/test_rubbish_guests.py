# SPDX-License-Identifier: GPL-2.0-or-later
"""No guest, however hostile or broken, ends the process or spoils the engine."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.cpu_guest import CODE, HCR, TABLE, Guest, hvc, set_virtual_irq
from pkvm.arm64 import registers as reg
from pkvm.machine.cpu.engine import StopReason

EL1_REGISTERS = [register for register in reg.BY_NAME.values() if register.op1 < 4]
word64 = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([0, 1, 0x1000, 0x1001, 0x3C5, 0x30, 0x1D3, 1 << 63, (1 << 64) - 1]),
)
system_access = st.builds(
    lambda register, read, rt: (
        0xD5000000
        | read << 21
        | register.op0 << 19
        | register.op1 << 16
        | register.crn << 12
        | register.crm << 8
        | register.op2 << 5
        | rt
    ),
    st.sampled_from(EL1_REGISTERS),
    st.integers(0, 1),
    st.integers(0, 31),
)
instruction = st.one_of(
    st.integers(0, (1 << 32) - 1),
    st.integers(0, (1 << 22) - 1).map(lambda bits: 0xD5000000 | bits),
    system_access,
    st.integers(0, (1 << 16) - 1).flatmap(
        lambda number: st.sampled_from([1, 2, 3]).map(lambda kind: 0xD4000000 | number << 5 | kind)
    ),
    st.sampled_from([0xD69F03E0, 0xD503207F, 0xD503205F, 0xD508871F, 0x14000000, 0xD61F0020]),
)
program = st.lists(instruction, min_size=1, max_size=64)


@pytest.fixture(scope="module", params=["cortex-a72", "max"])
def hostile(request: pytest.FixtureRequest) -> Iterator[Guest]:
    guest = Guest(cpu_model=request.param, count_blocks=True)
    yield guest
    guest.engine.close()


@settings(max_examples=150, deadline=None)
@given(
    words=program,
    registers=st.lists(word64, min_size=31, max_size=31),
    pstate=st.sampled_from([0x3C5, 0x5, 0x4, 0x0, 0x3C4]),
    control=st.tuples(word64, word64, word64, word64),
    slices=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    choices=st.lists(st.integers(0, 5), min_size=30, max_size=30),
)
def test_random_programs(
    hostile: Guest,
    words: list[int],
    registers: list[int],
    pstate: int,
    control: tuple[int, int, int, int],
    slices: list[int],
    choices: list[int],
) -> None:
    guest, engine = hostile, hostile.engine
    engine.reset_context()
    guest.write(0, *(words * (1024 // len(words))))
    for index, value in enumerate(registers):
        engine.x[index] = value
    for register, value in zip(
        (reg.VBAR_EL1, reg.TTBR0_EL1, reg.TCR_EL1, reg.CPACR_EL1), control, strict=True
    ):
        engine.write_sysreg(register, value)
    engine.pstate = pstate
    engine.pc = 0
    answers = iter(choices)

    def vector() -> bool:
        choice = next(answers, 0)
        if choice == 0:
            return False
        if engine.pstate & reg.PSTATE_NRW or choice == 1:
            engine.take_exception_to_el1(engine.esr_el2 ^ 0x400_0000, engine.far_el2)
        elif choice == 2:
            set_virtual_irq(engine, level=not engine.pc & 4)
        else:
            engine.pc = (engine.pc + 4) & ((1 << 64) - 1)
        return True

    engine.vector = vector
    for blocks in slices:
        engine.set_slice(blocks)
        assert engine.run() in (StopReason.SLICE, StopReason.VECTOR)
    engine.set_slice(None)
    guest.run_known_program()


@settings(max_examples=60, deadline=None)
@given(
    entries=st.lists(word64, min_size=1, max_size=32),
    root=st.one_of(st.just(0x8000_0000), word64.map(lambda value: value & (1 << 48) - 1 & ~0xFFF)),
    vtcr=st.one_of(st.just(0x8002_3560), st.integers(0, (1 << 32) - 1)),
)
def test_rubbish_in_stage2_tables(hostile: Guest, entries: list[int], root: int, vtcr: int) -> None:
    """EL2 writes no rubbish, but a walk of it has to end, in EL2 or at an error of the engine."""
    guest, engine = hostile, hostile.engine
    saved = bytes(guest.memory.read(TABLE, 512))
    engine.reset_context()
    guest.memory.write(TABLE, struct.pack(f"<{len(entries)}Q", *entries))
    engine.write_sysreg(reg.VTCR_EL2, vtcr)
    engine.write_sysreg(reg.VTTBR_EL2, root)
    engine.write_sysreg(reg.HCR_EL2, HCR)
    engine.flush_tlb()
    engine.pc = CODE
    engine.vector = lambda: False
    engine.set_slice(50)
    assert engine.run() in (StopReason.SLICE, StopReason.VECTOR)
    engine.set_slice(None)
    guest.memory.write(TABLE, saved)
    engine.flush_tlb()
    guest.run_known_program()


@pytest.mark.parametrize("target", [0x1001, 0x1002, 0x1003, (1 << 64) - 4, 1 << 48, 0x4000_0000])
def test_pc_to_nowhere(hostile: Guest, target: int) -> None:
    engine = hostile.engine
    engine.reset_context()
    hostile.write(CODE, hvc(1), hvc(2), hvc(3))
    engine.vector = lambda: False
    engine.pc = target
    engine.set_slice(100)
    assert engine.run() in (StopReason.SLICE, StopReason.VECTOR)
    engine.set_slice(None)
    hostile.run_known_program()
