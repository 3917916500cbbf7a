# SPDX-License-Identifier: GPL-2.0-or-later
"""P7: what a guest loses is empty before anybody else can read it (facts §11.3)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pkvm.arm64.stage2 import PAGE_SHIFT
from pkvm.hyp.mem_protect import MemProtect
from pkvm.hyp.vmemmap import GUEST_OWNED, HOST_OWNED, HOST_SHARED_WITH_HYP


class PrivacyWatch:
    """P7: a page that leaves a guest's exclusive ownership, other than by the guest's own sharing,
    is zero before the host can read it. Look once, let a transition happen, look again."""

    def __init__(self) -> None:
        self._private: npt.NDArray[np.bool_] | None = None

    def look(self, mem: MemProtect) -> list[str]:
        """What the pages that were private at the last look give away now."""
        with mem.lock:
            states = mem.vmemmap.states.copy()
            private = states == GUEST_OWNED
            problems = []
            if self._private is not None:
                gone = np.flatnonzero(self._private & ~private)
                now = states[gone]
                for page in gone[(now == HOST_OWNED) | (now == HOST_SHARED_WITH_HYP)].tolist():
                    pa = mem.memory.ram_base + (page << PAGE_SHIFT)
                    if mem.memory.table(pa).any():
                        problems.append(f"P7: PA {pa:#x} was private and is not zero")
            self._private = private
            return problems
