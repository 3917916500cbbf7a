# SPDX-License-Identifier: GPL-2.0-or-later
"""EL2s with one guard missing: what a test that says to see everything must see.

`hyp` has no switch that turns a check off. A mutant replaces a named guard from
outside, for as long as `weakened` lasts; machines made meanwhile have it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from pkvm.check.mutants import dma, firmware, memory, registers
from pkvm.check.mutants.install import Install

MUTANTS: dict[str, Install] = {
    **registers.MUTANTS,
    **memory.MUTANTS,
    **dma.MUTANTS,
    **firmware.MUTANTS,
}
"""By the guard that is missing."""


@contextmanager
def weakened(name: str) -> Iterator[None]:
    """EL2 without the guard `name`, one of `MUTANTS`."""
    with ExitStack() as stack:
        MUTANTS[name](stack)
        yield
