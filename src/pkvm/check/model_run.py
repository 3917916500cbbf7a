# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenarios on the model: a machine that speaks `upstream`, in virtual time.

What a scenario waits for comes by the machine's own clock, which jumps ahead when nothing runs: a
run repeats exactly, however busy the computer is. Topics do not know of each other, so that half of
them can run in a second process, on a machine of their own.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from multiprocessing.connection import Connection

from pkvm.check.scenarios import TOPICS, runner
from pkvm.check.scenarios.bench import SECONDS
from pkvm.check.scenarios.observation import Observation
from pkvm.events import NullRecorder
from pkvm.machine.machine import Machine
from pkvm.system import System

NS_PER_SECOND = 1_000_000
"""A scenario waits as long as a real kernel may need; here a thousandth of that is plenty."""


class ModelRunError(Exception):
    """The second process ended without a word."""


def run(topics: Iterable[str] = TOPICS, *, seconds: float = SECONDS) -> list[Observation]:
    """What the scenarios of `topics` see, each in no more than `seconds` of real time. Raises
    UnknownTopicError, EngineError, ModelRunError."""
    wanted = list(topics)
    # A fork copies one thread: where there are others, none is made.
    if len(wanted) < 2 or sys.platform != "linux" or threading.active_count() > 1:
        return _run(wanted, seconds)
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    child = fork.Process(target=_tell, args=(theirs, wanted[1::2], seconds), daemon=True)
    child.start()
    theirs.close()
    try:
        seen = _run(wanted[::2], seconds)
        answer = ours.recv()
    except EOFError:
        raise ModelRunError("the second half of the scenarios ended without a word") from None
    finally:
        ours.close()
        child.kill()
        child.join()
    if isinstance(answer, Exception):
        raise answer
    return sorted([*seen, *answer], key=lambda row: wanted.index(row.topic))


def _tell(connection: Connection, topics: Sequence[str], seconds: float) -> None:
    """In the second process: run, and send what was seen, or what was raised instead."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first one ends this one
    try:
        connection.send(_run(topics, seconds))
    except Exception as error:
        # Whatever it is, it is raised again in the first process.
        connection.send(error)


def _run(topics: Iterable[str], seconds: float) -> list[Observation]:
    # Nobody asks what was recorded.
    with (
        System(dialect="upstream", clock="virtual", recorder=NullRecorder()) as system,
        system.open() as kvm,
    ):
        return runner.run(kvm, topics, seconds=seconds, after=partial(_after, system.machine))


def _after(machine: Machine, seconds: float, callback: Callable[[], None]) -> Callable[[], object]:
    """`bench.After` in virtual time."""

    def ring() -> bool:
        callback()
        return False

    alarm = machine.alarms.new(ring)
    alarm.set(machine.clock.now_ns() + int(seconds * NS_PER_SECOND))
    return alarm.close
