# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenarios on the model: a machine that speaks `upstream`, in virtual time.

What a scenario waits for comes by the machine's own clock, which jumps ahead when nothing runs: a
run repeats exactly, however busy the computer is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from pkvm.check.scenarios import TOPICS, runner
from pkvm.check.scenarios.bench import SECONDS
from pkvm.check.scenarios.observation import Observation
from pkvm.machine.machine import Machine
from pkvm.system import System

NS_PER_SECOND = 1_000_000
"""A scenario waits as long as a real kernel may need; here a thousandth of that is plenty."""


def run(topics: Iterable[str] = TOPICS, *, seconds: float = SECONDS) -> list[Observation]:
    """What the scenarios of `topics` see, each in no more than `seconds` of real time. Raises
    UnknownTopicError, EngineError."""
    with System(dialect="upstream", clock="virtual") as system, system.open() as kvm:
        return runner.run(kvm, topics, seconds=seconds, after=partial(_after, system.machine))


def _after(machine: Machine, seconds: float, callback: Callable[[], None]) -> Callable[[], object]:
    """`bench.After` in virtual time."""

    def ring() -> bool:
        callback()
        return False

    alarm = machine.alarms.new(ring)
    alarm.set(machine.clock.now_ns() + int(seconds * NS_PER_SECOND))
    return alarm.close
