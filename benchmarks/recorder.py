# SPDX-License-Identifier: GPL-2.0-or-later
"""CPU time of the demonstration with the default recorder against one that does nothing.

The difference of two whole runs is smaller than the noise between two equal
ones. So the demonstration runs once with a recorder that keeps its events, and
the same events are then announced to both recorders in turn; what the default
one costs more is put on top of the demonstration's CPU time, from making the
machine to its end. The import of numpy and Unicorn, which would dilute the
figure, is not counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

from common import Result
from pkvm import guests
from pkvm.events import Event, NullRecorder, Recorder
from pkvm.system import System
from pkvm.trace.counting import CountingRecorder
from pkvm.vmm.board import Board
from pkvm.vmm.loader import load_image
from pkvm.vmm.probes import Probes
from pkvm.vmm.vmm import Moment, Vmm

RUNS = 9
PAIRS = 21


def _demonstration(recorder: Recorder) -> float:
    """CPU seconds of one demonstration."""
    start = time.process_time()
    board = Board(ram_bytes=16 << 20)
    image = load_image(guests.image("sharing"), board)
    probes = Probes(seed=0)
    with System(memory=64 << 20, recorder=recorder) as system:

        def observe(moment: Moment) -> None:
            probes.attempt(vmm, moment)

        with Vmm(system.open(), board, image, console=lambda data: None, observe=observe) as vmm:
            outcome = vmm.run()
        if outcome.kind != "powered-off":
            raise RuntimeError(f"the demonstration failed: {outcome.detail}")
    return time.process_time() - start


class _Keep:
    """Keeps every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def record(self, event: Event, /) -> None:
        self.events.append(event)


def _announce(recorder: Recorder, events: list[Event]) -> float:
    """CPU seconds to announce `events`."""
    start = time.process_time()
    for event in events:
        recorder.record(event)
    return time.process_time() - start


def measure() -> Iterator[Result]:
    """The one figure of this file."""
    keep = _Keep()
    _demonstration(keep)
    run = statistics.median(_demonstration(NullRecorder()) for _ in range(RUNS))
    more = []
    for _ in range(PAIRS):
        nothing = _announce(NullRecorder(), keep.events)
        recorder = CountingRecorder()
        counting = _announce(recorder, keep.events)
        if sum(recorder.totals().values()) != len(keep.events):
            raise RuntimeError("the recorder lost events")
        more.append(counting - nothing)
    cost = statistics.median(more)
    yield Result(
        "recorder-cpu",
        1 + cost / run,
        1.03,
        f"{cost * 1e3:.2f} ms more for {len(keep.events)} events, the run {run * 1e3:.0f} ms",
    )
