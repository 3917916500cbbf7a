# SPDX-License-Identifier: GPL-2.0-or-later
"""How a CPU is set up: TLBs for the translation regimes that a guest has, and for no other."""

from __future__ import annotations

import ctypes

import pytest

from pkvm.machine.cpu.cpu_models import CPU_MODELS, shrink_unused_tlbs
from pkvm.machine.cpu.unicorn_engine import UnicornEngine
from pkvm.machine.cpu.unicorn_layout import LAYOUT
from pkvm.machine.memory import PhysicalMemory

FULL = (LAYOUT.tlb_entries - 1) * LAYOUT.tlb_entry_bytes


def sizes(env: int) -> list[int]:
    """The mask of each regime's TLB."""
    at = env + LAYOUT.tlb_masks
    return [ctypes.c_uint64.from_address(at + 16 * n).value for n in range(LAYOUT.tlb_modes)]


@pytest.mark.parametrize("model", CPU_MODELS)
def test_only_a_guests_regimes_have_a_tlb_of_full_size(model: str) -> None:
    engine = UnicornEngine(PhysicalMemory(0x8000_0000, 1 << 20), cpu_model=model)
    try:
        found = sizes(engine._addresses.env)
        expected = [FULL if n in LAYOUT.tlb_guest_modes else 0 for n in range(LAYOUT.tlb_modes)]
        assert found == expected
    finally:
        engine.close()


def test_tlbs_that_are_not_as_expected_are_left_alone() -> None:
    words = (ctypes.c_uint64 * (2 * LAYOUT.tlb_modes))(*([FULL, 1] * (LAYOUT.tlb_modes - 1)), 7, 1)
    env = ctypes.addressof(words) - LAYOUT.tlb_masks
    shrink_unused_tlbs(env, LAYOUT)
    assert sizes(env) == [FULL] * (LAYOUT.tlb_modes - 1) + [7]
