# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages between the host and EL2: shared for structures that both use, donated for EL2's own.

EL2 reads a host page only while it is shared and pinned, or after it was
donated; its own accesses need no mapping here, for Python has all of RAM.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pkvm.arm64.stage2 import ANNOTATION_HYP, PAGE_SHIFT
from pkvm.events import Transition
from pkvm.hyp.bulk import one_run, runs_in
from pkvm.hyp.errors import Errno, HypBug, Refused
from pkvm.hyp.ownership import Ownership
from pkvm.hyp.vmemmap import HOST_OWNED, HOST_SHARED_WITH_HYP, HYP_OWNED, MAX_REFCOUNT


class HostHyp(Ownership):
    """Transitions between host and EL2 (facts §3.3). Numbers are PFNs (PA >> 12) and pages.

    All raise Refused: EINVAL or EPERM by the memory map, EPERM for a wrong state.
    """

    def host_share_hyp(self, pfn: int) -> None:
        """The host lets EL2 into one page that it owns."""
        with self.lock:
            page = self._ram_pages(pfn, 1)
            self._check_states(page, 1, HOST_OWNED)
            self._state[page] = HOST_SHARED_WITH_HYP
            self._record(Transition("host_share_hyp", pfn << PAGE_SHIFT, 1))

    def host_unshare_hyp(self, pfn: int) -> None:
        """The host takes a shared page back. Raises Refused(EBUSY) while EL2 has it pinned."""
        with self.lock:
            page = self._ram_pages(pfn, 1)
            self._check_states(page, 1, HOST_SHARED_WITH_HYP)
            if self.vmemmap.refcount[page]:
                why = "EL2 still uses the page"
                raise Refused(Errno.EBUSY, "refcount", why, pa=pfn << PAGE_SHIFT)
            self._state[page] = HOST_OWNED
            self._record(Transition("host_unshare_hyp", pfn << PAGE_SHIFT, 1))

    def host_donate_hyp(self, pfn: int, nr: int) -> None:
        """The host gives `nr` pages to EL2; their content stays until EL2 changes it.

        EL2 writes its pages without telling the CPU, so code translated from them goes now.
        """
        with self.lock:
            page = self._ram_pages(pfn, nr)
            self._check_states(page, nr, HOST_OWNED)
            pa = pfn << PAGE_SHIFT
            if nr == 1:
                self.host.take_page(pa, ANNOTATION_HYP)
                self._state[page] = HYP_OWNED
            else:
                annotation = np.array([ANNOTATION_HYP], np.uint64)
                self.host.take_runs(one_run(pfn, nr), annotation, 0)
                self.vmemmap.states[page : page + nr] = HYP_OWNED
            self._invalidate_code(pa, nr << PAGE_SHIFT)
            self._record(Transition("host_donate_hyp", pa, nr))

    def hyp_donate_host(self, pfn: int, nr: int) -> None:
        """EL2 gives `nr` pages to the host, with what is in them: the caller has zeroed them.

        Raises Refused(EBUSY) for a page in use, such as a table.
        """
        with self.lock:
            page = self._ram_pages(pfn, nr)
            self._check_states(page, nr, HYP_OWNED)
            pa = pfn << PAGE_SHIFT
            if self.vmemmap.refcounts[page : page + nr].any():
                raise Refused(Errno.EBUSY, "refcount", "EL2 still uses a page", pa=pa)
            if nr == 1:
                self.host.give_page(pa)
                self._state[page] = HOST_OWNED
            else:
                self.host.give_runs(one_run(pfn, nr))
                self.vmemmap.states[page : page + nr] = HOST_OWNED
            self._record(Transition("hyp_donate_host", pa, nr))

    def hyp_donate_host_list(self, pfns: npt.NDArray[np.int64]) -> None:
        """As `hyp_donate_host`, for pages that lie anywhere; EL2's own numbers, rising.

        Raises HypBug for a page that is not EL2's to give.
        """
        with self.lock:
            pages = self._pages_of(pfns)
            if (self.vmemmap.states[pages] != HYP_OWNED).any():
                raise HypBug("EL2 gives away a page that it does not own")
            if self.vmemmap.refcounts[pages].any():
                raise HypBug("EL2 gives away a page that it uses")
            self.host.give_runs(runs_in(pfns))
            self.vmemmap.states[pages] = HOST_OWNED
            for pfn in pfns.tolist():
                self._record(Transition("hyp_donate_host", pfn << PAGE_SHIFT, 1))

    def pin_shared(self, pa: int) -> None:
        """Keep the shared page that holds byte `pa` from being unshared, once more.

        Raises Refused(EPERM) if the page is not shared with EL2, EBUSY if the count is full.
        """
        with self.lock:
            page = self._ram_pages(pa >> PAGE_SHIFT, 1)
            self._check_states(page, 1, HOST_SHARED_WITH_HYP)
            if self.vmemmap.refcount[page] == MAX_REFCOUNT:
                raise Refused(Errno.EBUSY, "refcount", "the page is pinned too often", pa=pa)
            self.vmemmap.refcount[page] += 1

    def pins(self, pa: int) -> int:
        """How often the shared page that holds byte `pa`, which is RAM, is pinned."""
        return self.vmemmap.refcount[self._page_of(pa >> PAGE_SHIFT)]

    def unpin_shared(self, pa: int) -> None:
        """Undo one `pin_shared`. Raises HypBug if there was none."""
        with self.lock:
            page = self._page_of(pa >> PAGE_SHIFT)
            if self._state[page] != HOST_SHARED_WITH_HYP or not self.vmemmap.refcount[page]:
                raise HypBug(f"PA {pa:#x} was not pinned")
            self.vmemmap.refcount[page] -= 1
