# SPDX-License-Identifier: GPL-2.0-or-later
"""CPU time of the demonstration with the default recorder against one that does nothing.

Both run in this process, in turn, from making the machine to its end: the import
of numpy and Unicorn, which would dilute the figure, is not counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

from common import Result
from pkvm import guests
from pkvm.events import NullRecorder, Recorder
from pkvm.system import System
from pkvm.trace.counting import CountingRecorder
from pkvm.vmm.board import Board
from pkvm.vmm.loader import load_image
from pkvm.vmm.probes import Probes
from pkvm.vmm.vmm import Moment, Vmm

PAIRS = 41


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
    if isinstance(recorder, CountingRecorder):
        recorder.totals()
    return time.process_time() - start


def measure() -> Iterator[Result]:
    """The one figure of this file: the median over pairs, each pair in both orders."""
    _demonstration(NullRecorder())
    ratios, ours, base = [], [], []
    for pair in range(PAIRS):
        if pair % 2:
            counting, nothing = _demonstration(CountingRecorder()), _demonstration(NullRecorder())
        else:
            nothing, counting = _demonstration(NullRecorder()), _demonstration(CountingRecorder())
        ratios.append(counting / nothing)
        ours.append(counting)
        base.append(nothing)
    yield Result(
        "recorder-cpu",
        statistics.median(ratios),
        1.03,
        f"counting {min(ours) * 1e3:.1f} ms, nothing {min(base) * 1e3:.1f} ms (least of each)",
    )
