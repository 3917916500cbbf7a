# SPDX-License-Identifier: GPL-2.0-or-later
"""An interrupt line calls the kernel for a change of its level, and for nothing else."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvm.vmm.irq import IrqLine, NoLine


class Calls:
    """A VM that keeps what its lines were set to."""

    def __init__(self, *errors: OSError) -> None:
        self.calls: list[tuple[int, bool]] = []
        self.errors = list(errors)

    def irq_line(self, irq: int, level: bool) -> None:
        if self.errors:
            raise self.errors.pop()
        self.calls.append((irq, level))


def test_an_spi_has_arms_encoding() -> None:
    vm = Calls()
    IrqLine(vm, 1).set(True)
    IrqLine(vm, 47).set(True)
    assert vm.calls == [(1 << 24 | 33, True), (1 << 24 | 79, True)]


@given(st.lists(st.booleans()))
def test_only_a_change_costs_a_call(levels: list[bool]) -> None:
    vm = Calls()
    line = IrqLine(vm, 0)
    now, changes = False, []
    for level in levels:
        line.set(level)
        if level != now:
            changes.append(level)
        now = level
    assert [level for _, level in vm.calls] == changes


def test_a_refused_change_is_tried_again() -> None:
    vm = Calls(OSError(22, "Invalid argument"))
    line = IrqLine(vm, 0)
    with pytest.raises(OSError, match="Invalid"):
        line.set(True)
    line.set(True)
    assert vm.calls == [(1 << 24 | 32, True)]


def test_threads_leave_the_level_that_the_kernel_was_told() -> None:
    vm = Calls()
    line = IrqLine(vm, 0)

    def flip() -> None:
        for n in range(500):
            line.set(n % 2 == 0)

    threads = [threading.Thread(target=flip) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    levels = [level for _, level in vm.calls]
    assert all(one != other for one, other in pairwise(levels))
    line.set(False)
    assert vm.calls[-1] == (1 << 24 | 32, False)


def test_a_line_that_ends_nowhere() -> None:
    NoLine().set(True)
