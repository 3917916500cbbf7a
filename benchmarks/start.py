# SPDX-License-Identifier: GPL-2.0-or-later
"""Whole process of `pkvm run` (the demonstration, to power-off) against importing what it needs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

from common import Result, median_ratio

PAIRS = 9


def _seconds(*command: str) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return time.perf_counter() - start


def measure() -> Iterator[Result]:
    """The one figure of this file."""

    def demonstration() -> float:
        return _seconds(sys.executable, "-m", "pkvm", "run")

    def imports() -> float:
        return _seconds(sys.executable, "-c", "import numpy, unicorn")

    demonstration()
    imports()
    ratio, ours, unit = median_ratio(demonstration, imports, PAIRS)
    yield Result(
        "demonstration-start",
        ratio,
        3,
        f"pkvm run {ours * 1e3:.0f} ms, import numpy, unicorn {unit * 1e3:.0f} ms",
    )
