# SPDX-License-Identifier: GPL-2.0-or-later
"""P6 and the refcounts: what EL2's records count (facts §11.3, §3.8)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pkvm.arm64.stage2 import PageState
from pkvm.check.view import View
from pkvm.hyp.vmemmap import GUEST_OWNED, HOST_PINNED, HOST_SHARED, HOST_SHARED_WITH_HYP


def share_counts(view: View) -> Iterator[str]:
    """P6: a page's share count is the number of leaves of non-protected VMs that map it, and it is
    lent if and only if there is one, or the secure world has it."""
    counts = view.mem.vmemmap.share_counts
    borrowed = view.runs.part(view.runs.states == PageState.SHARED_BORROWED)
    lent = view.states == HOST_SHARED
    involved = borrowed.sizes.size or view.secure.size or counts[view.counted].any()
    if not involved and not lent.any() and not view.is_secure.any():
        return
    expected = np.bincount(borrowed.singles().pages, minlength=view.npages)
    for page in view.pages(counts != expected):
        yield (
            f"P6: PA {view.pa(page):#x} has share count {counts[page]}, and {expected[page]} leaves"
        )
    has_borrower = counts != 0
    has_borrower[view.secure] = True
    known = np.zeros(view.npages, np.bool_)
    known[view.secure] = True
    for page in view.pages(view.is_secure & ~known):
        yield f"P6: PA {view.pa(page):#x} is the secure world's, which has it not"
    has_borrower &= ~view.is_secure
    for page in view.pages(lent != has_borrower):
        yield f"P6: PA {view.pa(page):#x} has share count {counts[page]}, against its state"


def refcounts(view: View) -> Iterator[str]:
    """Refcounts are for pages of EL2's, for pins of pages shared with it, and for mappings for DMA
    by host and guests, nothing else."""
    pages = view.counted
    counted = (HOST_SHARED_WITH_HYP, HOST_PINNED, GUEST_OWNED)
    may = view.is_hyp[pages] | np.isin(view.states[pages], counted)
    wrong = (view.mem.vmemmap.refcounts[pages] != 0) & ~may
    for page in pages[wrong].tolist():
        yield f"refcounts: PA {view.pa(page):#x} is neither EL2's nor shared with it, and has one"
