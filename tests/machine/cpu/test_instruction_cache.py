# SPDX-License-Identifier: GPL-2.0-or-later
"""Code that a guest changes through another, not executable mapping, as Linux does."""

from __future__ import annotations

import struct

import pytest

from fakes.cpu_guest import (
    CODE,
    DATA,
    DSB,
    ISB,
    UNMAPPED,
    Guest,
    hvc,
    mov,
    movz,
    mrs,
    msr,
    str_,
)
from pkvm.arm64.registers import CTR_EL0
from pkvm.machine.cpu.instruction_cache import IC_IALLU, IC_IALLUIS, IC_IVAU, LINE_BYTES

FUNCTIONS = 0x5000
ALIAS = 0x2_0000
NEVER_EXECUTE = 3 << 53
COUNT = 4
RET = 0xD65F03C0
NOP_RET = RET << 32


def blr(rn: int) -> int:
    """BLR Xn."""
    return 0xD63F0000 | rn << 5


def function(number: int) -> int:
    return FUNCTIONS + 0x100 * number


def call_all() -> list[int]:
    """Function n puts a value into Xn."""
    words = []
    for number in range(COUNT):
        words += [*mov(9, function(number)), blr(9)]
    return words


def patch_all(value: int) -> list[int]:
    words = []
    for number in range(COUNT):
        words += mov(10, movz(number, value) | NOP_RET)
        words += [*mov(9, ALIAS + 0x100 * number), str_(10, 9)]
    return words


@pytest.fixture
def patching(guest: Guest) -> Guest:
    guest.enable_stage1()
    leaf = FUNCTIONS | 0x703 | NEVER_EXECUTE
    guest.write_bytes(DATA + 0x2000 + (ALIAS >> 12) * 8, struct.pack("<Q", leaf))
    for number in range(COUNT):
        guest.write(function(number), movz(number, 1), RET)
    return guest


def each_line() -> list[int]:
    words = []
    for address in range(FUNCTIONS, function(COUNT), LINE_BYTES):
        words += [*mov(9, address), msr(IC_IVAU, 9)]
    return words


@pytest.mark.parametrize("model", ["all", "all inner shareable", "each line"])
def test_after_an_ic_instruction_the_new_code_runs(patching: Guest, model: str) -> None:
    invalidate = {
        "all": [msr(IC_IALLU, 31)],
        "all inner shareable": [msr(IC_IALLUIS, 31)],
        "each line": each_line(),
    }[model]
    program = [*call_all(), *patch_all(2), DSB, *invalidate, DSB, ISB, *call_all(), hvc(1)]
    found = patching.run(*program)
    assert (found.iss, found.pc) == (1, CODE + 4 * len(program))
    assert [patching.engine.x[number] for number in range(COUNT)] == [2] * COUNT


def test_again_and_again(patching: Guest) -> None:
    program = []
    for value in range(3, 9):
        program += [*call_all(), *patch_all(value), *each_line(), DSB, ISB]
    patching.run(*program, *call_all(), hvc(1))
    assert [patching.engine.x[number] for number in range(COUNT)] == [8] * COUNT


def test_a_line_that_is_not_mapped_is_harmless(patching: Guest) -> None:
    for address in (UNMAPPED, 0xFFFF_0000_0000_0000, 1 << 63, 0x3F_F000):
        patching.run(*call_all(), *mov(9, address), msr(IC_IVAU, 9), *call_all(), hvc(1))
        assert patching.exits[-1].iss == 1


def test_a_line_is_a_page(guest: Guest) -> None:
    guest.run(mrs(0, CTR_EL0), hvc(0))
    assert 4 << (guest.engine.x[0] & 0xF) == LINE_BYTES
    assert not guest.engine.x[0] & 1 << 29  # DIC: instruction cache maintenance is needed
