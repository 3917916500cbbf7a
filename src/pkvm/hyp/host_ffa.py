# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages that the host gives to the secure world (FF-A; facts §3.3, §3.4).

Of a page that is shared only the host's state changes: the secure world reaches
all memory anyway, and who borrows the page is the FF-A proxy's to know. A page is
shared so if the host has it SHARED_OWNED, EL2 does not, and it is lent to no
guest. A page that is donated, in dialects that lend so, the host and devices
lose; its entry in the host's stage-2 names the owner.
"""

from __future__ import annotations

import numpy as np

from pkvm.arm64.stage2 import ANNOTATION_FFA, PAGE_SHIFT
from pkvm.events import Transition
from pkvm.hyp.bulk import one_run
from pkvm.hyp.errors import Errno, Refused
from pkvm.hyp.ownership import Ownership
from pkvm.hyp.vmemmap import HOST_OWNED, HOST_SHARED, SECURE_OWNED


class HostFfa(Ownership):
    """Transitions between host and secure world. Numbers are PFNs and pages; all raise Refused:
    EINVAL or EPERM by the memory map, EPERM for a wrong state."""

    def host_share_ffa(self, pfn: int, nr: int) -> None:
        """The host lets the secure world into `nr` pages that it owns."""
        with self.lock:
            page = self._ram_pages(pfn, nr)
            self._check_states(page, nr, HOST_OWNED)
            self.vmemmap.states[page : page + nr] = HOST_SHARED
            self._record(Transition("host_share_ffa", pfn << PAGE_SHIFT, nr))

    def host_unshare_ffa(self, pfn: int, nr: int) -> None:
        """The secure world has given `nr` shared pages back."""
        with self.lock:
            page = self._shared_ffa(pfn, nr)
            self.vmemmap.states[page : page + nr] = HOST_OWNED
            self._record(Transition("host_unshare_ffa", pfn << PAGE_SHIFT, nr))

    def host_donate_ffa(self, pfn: int, nr: int) -> None:
        """The host leaves `nr` pages that it owns to the secure world."""
        with self.lock:
            page = self._ram_pages(pfn, nr)
            self._check_states(page, nr, HOST_OWNED)
            self.host.take_runs(one_run(pfn, nr), np.array([ANNOTATION_FFA], np.uint64), 0)
            self.vmemmap.states[page : page + nr] = SECURE_OWNED
            self._record(Transition("host_donate_ffa", pfn << PAGE_SHIFT, nr))

    def host_reclaim_ffa(self, pfn: int, nr: int) -> None:
        """The secure world has given `nr` donated pages back, with what it left in them."""
        with self.lock:
            page = self._ram_pages(pfn, nr)
            self._check_states(page, nr, SECURE_OWNED)
            self.host.give_runs(one_run(pfn, nr))
            self.vmemmap.states[page : page + nr] = HOST_OWNED
            self._record(Transition("host_reclaim_ffa", pfn << PAGE_SHIFT, nr))

    def host_check_given_ffa(self, pfn: int, nr: int) -> None:
        """Refuse what `host_return_ffa` would refuse; nothing changes."""
        with self.lock:
            self._is_donated(pfn, nr)

    def host_return_ffa(self, pfn: int, nr: int) -> None:
        """`host_unshare_ffa` or `host_reclaim_ffa`, as these pages were all given."""
        with self.lock:
            if self._is_donated(pfn, nr):
                self.host_reclaim_ffa(pfn, nr)
            else:
                self.host_unshare_ffa(pfn, nr)

    def _is_donated(self, pfn: int, nr: int) -> bool:
        """Whether the secure world has these pages for itself; refused unless it has them."""
        page = self._ram_pages(pfn, nr)
        if self._state[page] == SECURE_OWNED:
            self._check_states(page, nr, SECURE_OWNED)
            return True
        self._shared_ffa(pfn, nr)
        return False

    def _shared_ffa(self, pfn: int, nr: int) -> int:
        """Page number of the first of `nr` pages that the host may unshare."""
        page = self._ram_pages(pfn, nr)
        self._check_states(page, nr, HOST_SHARED)
        lent = self.vmemmap.share_counts[page : page + nr] != 0
        if lent.any():
            pa = pfn + int(np.argmax(lent)) << PAGE_SHIFT
            raise Refused(Errno.EPERM, "share_count", "the page is lent to guests", pa=pa)
        return page
