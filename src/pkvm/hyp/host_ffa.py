# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages that the host shares with the secure world (FF-A; facts §3.3, §3.4).

Only the host's state changes: the secure world reaches all memory anyway, and
who borrows the page is the FF-A proxy's to know. A page is shared so if the host
has it SHARED_OWNED, EL2 does not, and it is lent to no guest.
"""

from __future__ import annotations

import numpy as np

from pkvm.arm64.stage2 import PAGE_SHIFT
from pkvm.events import Transition
from pkvm.hyp.errors import Errno, Refused
from pkvm.hyp.ownership import Ownership
from pkvm.hyp.vmemmap import HOST_OWNED, HOST_SHARED


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
        """The secure world has given `nr` pages back."""
        with self.lock:
            page = self._shared_ffa(pfn, nr)
            self.vmemmap.states[page : page + nr] = HOST_OWNED
            self._record(Transition("host_unshare_ffa", pfn << PAGE_SHIFT, nr))

    def host_check_shared_ffa(self, pfn: int, nr: int) -> None:
        """Refuse what `host_unshare_ffa` would refuse; nothing changes."""
        with self.lock:
            self._shared_ffa(pfn, nr)

    def _shared_ffa(self, pfn: int, nr: int) -> int:
        """Page number of the first of `nr` pages that the host may unshare."""
        page = self._ram_pages(pfn, nr)
        self._check_states(page, nr, HOST_SHARED)
        lent = self.vmemmap.share_counts[page : page + nr] != 0
        if lent.any():
            pa = pfn + int(np.argmax(lent)) << PAGE_SHIFT
            raise Refused(Errno.EPERM, "share_count", "the page is lent to guests", pa=pa)
        return page
