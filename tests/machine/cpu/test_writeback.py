# SPDX-License-Identifier: GPL-2.0-or-later
"""Which accesses the syndrome of a data abort describes (Arm ARM, ISS: ISV)."""

from __future__ import annotations

import pytest

from fakes.cpu_guest import CODE, DATA, UNMAPPED, Guest, ldr, mov, set_virtual_irq
from pkvm.arm64.esr import EC, ISV, SRT_SHIFT, WNR

LDR_POST, LDR_PRE, STR_POST, STR_PRE = 0xF840_8401, 0xF840_8C01, 0xF800_8401, 0xF800_8C01
LDRB_POST, LDRSW_PRE, STRH_POST = 0x3840_1401, 0xB880_4C01, 0x7800_2401
LDUR, LDR_REGISTER, LDRSB, LDAR = 0xF840_8001, 0xF862_6801, 0x3980_0001, 0xC8DF_FC01
LDR_Q_POST, LDP, LDP_POST = 0x3CC1_0401, 0xA940_0801, 0xA8C1_0801
ONLY_WITH_ISV = 0x7FF << 14


@pytest.mark.parametrize(
    "word", [LDR_POST, LDR_PRE, STR_POST, STR_PRE, LDRB_POST, LDRSW_PRE, STRH_POST]
)
def test_writeback_has_no_valid_syndrome(guest: Guest, word: int) -> None:
    found = guest.run(*mov(0, UNMAPPED), word)
    assert found.ec == EC.DABT_LOW
    assert not found.iss & ONLY_WITH_ISV
    assert bool(found.iss & WNR) == (word in (STR_POST, STR_PRE, STRH_POST))
    assert guest.engine.x[0] == UNMAPPED


@pytest.mark.parametrize("word", [LDUR, LDR_REGISTER, LDRSB, LDAR])
def test_other_single_registers_have_one(guest: Guest, word: int) -> None:
    found = guest.run(*mov(0, UNMAPPED), *mov(2, 0), word)
    assert found.iss & ISV
    assert found.iss >> SRT_SHIFT & 31 == 1


@pytest.mark.parametrize("word", [LDR_Q_POST, LDP, LDP_POST])
def test_pairs_and_vectors_have_none(guest: Guest, word: int) -> None:
    assert not guest.run(*mov(0, UNMAPPED), word).iss & ISV


def test_new_code_at_the_same_place_is_looked_at_again(guest: Guest) -> None:
    assert not guest.run(*mov(0, UNMAPPED), LDR_POST).iss & ISV
    assert guest.run(*mov(0, UNMAPPED), ldr(1, 0)).iss & ISV
    assert not guest.run(*mov(0, UNMAPPED), LDR_POST).iss & ISV


def test_with_stage_1_on_and_a_virtual_interrupt_pending(guest: Guest) -> None:
    guest.enable_stage1()
    page = DATA + 0x5000
    guest.unmap(page)
    set_virtual_irq(guest.engine, level=True)
    found = guest.run(*mov(0, page), STR_POST)
    assert found.ec == EC.DABT_LOW
    assert not found.iss & ISV
    assert found.pc == CODE + 4 * len(mov(0, page))
