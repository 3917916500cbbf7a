# SPDX-License-Identifier: GPL-2.0-or-later
"""P1 and P2: who owns a page, and that all who have a part in it say the same (facts §11.3)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pkvm.arm64.stage2 import PAGE_SHIFT, PageState
from pkvm.check.view import UNCLAIMED, View
from pkvm.hyp.vmemmap import (
    GUEST_OWNED,
    GUEST_SHARED_WITH_HOST,
    HOST_OWNED,
    HOST_PINNED,
    HOST_SHARED,
    HOST_SHARED_WITH_HYP,
)

KNOWN = (HOST_OWNED, HOST_PINNED, HOST_SHARED_WITH_HYP, HOST_SHARED, GUEST_SHARED_WITH_HOST)
"""The state bytes that a page may have which is not lost to the host."""


def single_owner(view: View) -> Iterator[str]:
    """P1: a page has exactly one owner among the host, EL2 and the protected guests."""
    guests = (view.states == GUEST_OWNED) | (view.states == GUEST_SHARED_WITH_HOST)
    claimed = (view.claims == GUEST_OWNED) | (view.claims == GUEST_SHARED_WITH_HOST)
    owners = view.runs.part(view.runs.states < PageState.SHARED_BORROWED)
    # A page that two leaves claim would be counted twice here, and once there.
    if not (guests != claimed).any() and owners.sizes.sum() == np.count_nonzero(claimed):
        return
    count = np.bincount(owners.singles().pages, minlength=view.npages)
    count += ~guests
    for page in view.pages(count != 1):
        yield f"P1: PA {view.pa(page):#x} has {count[page]} owners"


def borrowed_from_lender(view: View) -> Iterator[str]:
    """P2: who borrows has a lender, and both call it so."""
    wrong = (view.claims != view.states) & (view.claims != UNCLAIMED)
    if wrong.any():
        runs = view.runs.singles()
        for tree, gfn, page, state in zip(
            runs.trees.tolist(), runs.gfns.tolist(), runs.pages.tolist(), runs.states.tolist(),
            strict=True,
        ):  # fmt: skip
            if wrong[page]:
                yield (
                    f"P2: {view.name(tree)} has gfn {gfn:#x} as {PageState(state).name}, but the "
                    f"record of PA {view.pa(page):#x} says {view.states[page]:#x}"
                )
    nobody = (view.states == GUEST_SHARED_WITH_HOST) & (view.claims != GUEST_SHARED_WITH_HOST)
    for page in view.pages(nobody):
        yield f"P2: the host borrows PA {view.pa(page):#x} of nobody"
    known = view.lost.copy()
    for states in KNOWN:
        known |= view.states == states
    for page in view.pages(~known):
        yield f"P2: PA {view.pa(page):#x} has the impossible states {view.states[page]:#x}"


def own_regions(view: View) -> Iterator[str]:
    """P5: the carve-out and the firmware region are EL2's for ever."""
    memory = view.mem.memory
    for region in (view.mem.carveout, view.mem.firmware):
        if region is not None:
            first = (region[0] - memory.ram_base) >> PAGE_SHIFT
            theirs = ~view.is_hyp[first : first + (region[1] >> PAGE_SHIFT)]
            for offset in view.pages(theirs):
                yield f"P5 (own memory): PA {view.pa(first + offset):#x} is not EL2's"
