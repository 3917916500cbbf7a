# SPDX-License-Identifier: GPL-2.0-or-later
"""Counting translated blocks: the unit of virtual time and of preemption."""

from __future__ import annotations

import pytest

from fakes.cpu_fixtures import MakeGuest
from fakes.cpu_guest import CODE, Guest, add, b, cbnz, hvc, mov, str_, sub, svc
from pkvm.arm64 import registers as reg
from pkvm.machine.cpu import thunks
from pkvm.machine.cpu.engine import StopReason

LOOP = [*mov(1, 0x1_0000), add(0, 0, 1), str_(0, 1), svc(0), b(-3)]
"""Counts in X0, with a store and an exception to EL1 in each round."""
RETURN_FROM_SVC = [add(2, 2, 1), 0xD69F03E0]


def looping_guest(make_guest: MakeGuest) -> Guest:
    guest = make_guest(count_blocks=True)
    guest.write(CODE, *LOOP)
    guest.write(0x8200, *RETURN_FROM_SVC)
    guest.engine.pc = CODE
    return guest


def stops(guest: Guest, slices: list[int]) -> list[tuple[int, ...]]:
    engine = guest.engine
    seen: list[tuple[int, ...]] = []
    for blocks in slices:
        before = engine.blocks
        engine.set_slice(blocks)
        assert engine.run() is StopReason.SLICE
        assert engine.blocks - before == blocks
        seen.append((engine.pc, engine.x[0], engine.x[2], engine.blocks))
    return seen


def test_slices_are_exact_and_repeat(make_guest: MakeGuest) -> None:
    slices = [1, 1, 2, 1000, 7, 0, 999, 1]
    first = stops(looping_guest(make_guest), slices)
    assert first == stops(looping_guest(make_guest), slices)
    assert first[-1][3] == sum(slices)
    assert first[-1][1] > 300


def test_native_and_python_hooks_count_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    if thunks.host_code() is None:
        pytest.skip("no native hooks on this host")
    found = []
    for _ in range(2):
        guest = Guest(count_blocks=True)
        guest.write(CODE, *LOOP)
        guest.write(0x8200, *RETURN_FROM_SVC)
        guest.engine.pc = CODE
        found.append(stops(guest, [1, 10, 100, 1000, 3]))
        guest.engine.close()
        monkeypatch.setattr(thunks, "host_code", lambda: None)
    assert found[0] == found[1]


def test_slice_cuts_the_work_where_it_says(make_guest: MakeGuest) -> None:
    guest = make_guest(count_blocks=True)
    guest.write(CODE, *mov(9, 1000), sub(9, 9, 1), cbnz(9, -1), hvc(0))
    guest.engine.pc = CODE
    guest.engine.set_slice(10)
    assert guest.engine.run() is StopReason.SLICE
    assert (guest.engine.x[9], guest.engine.pc) == (990, CODE + 16)


def test_slice_outlasts_runs_that_end_otherwise_and_fires_once(make_guest: MakeGuest) -> None:
    guest = make_guest(count_blocks=True)
    engine = guest.engine
    guest.write(CODE, hvc(0), b(-1))
    engine.vector = lambda: False
    engine.pc = CODE
    engine.set_slice(5)
    reasons = [engine.run() for _ in range(6)]
    assert reasons == [StopReason.VECTOR] * 3 + [StopReason.SLICE] + [StopReason.VECTOR] * 2
    engine.set_slice(1)
    engine.set_slice(None)
    assert engine.run() is StopReason.VECTOR


def test_storm_of_exceptions_ends_with_the_slice(make_guest: MakeGuest) -> None:
    """With its vector unmapped in stage 1, a guest faults for ever without executing a block."""
    guest = make_guest(count_blocks=True)
    engine = guest.engine
    guest.enable_stage1()
    guest.write(CODE, svc(0))
    engine.write_sysreg(reg.VBAR_EL1, 0x7000_0000)
    engine.pc = CODE
    stops(guest, [1, 1000, 1000])
    assert engine.pc == 0x7000_0200
    guest.run_known_program()


def test_engine_without_counting(guest: Guest) -> None:
    guest.run(hvc(0))
    assert guest.engine.blocks == 0
    with pytest.raises(ValueError, match="does not count"):
        guest.engine.set_slice(1)
    guest.engine.set_slice(None)


def test_negative_slice(make_guest: MakeGuest) -> None:
    with pytest.raises(ValueError, match="-1 blocks"):
        make_guest(count_blocks=True).engine.set_slice(-1)
