# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's cache of table pages: the host pays for its guest's page tables (facts §4.3)."""

from __future__ import annotations

import threading
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pkvm.arm64.stage2 import PAGE_MASK, PAGE_SHIFT
from pkvm.hyp.errors import Errno, Refused
from pkvm.hyp.pool import PageStack
from pkvm.hyp.vmemmap import Vmemmap
from pkvm.machine.memory import PhysicalMemory


class Donations(Protocol):
    """The two transitions that fill and empty a memcache; `MemProtect` has them."""

    @property
    def lock(self) -> threading.RLock:
        """The lock of all transitions."""
        ...

    def host_donate_hyp(self, pfn: int, nr: int) -> None:
        """Pages from the host to EL2."""
        ...

    def hyp_donate_host_list(self, pfns: npt.NDArray[np.int64]) -> None:
        """Pages from EL2 to the host."""
        ...


class Memcache(PageStack):
    """Pages that the host donated for one VM's stage-2 tables.

    It is the table source of the guest's `Stage2`: a table that is freed there comes back here.
    """

    def __init__(self, memory: PhysicalMemory, vmemmap: Vmemmap, donations: Donations) -> None:
        super().__init__(memory, vmemmap)
        self._memory = memory
        self._donations = donations

    def topup(self, head_pa: int, nr: int) -> int:
        """Take `nr` pages from the host's list that starts at PA `head_pa`, all or none; the
        first word of each page is the PA of the next. Returns `nr`.

        A page is donated before its link is read, so that the host cannot change it in between.
        Raises Refused: EINVAL for a number that cannot be, ENOMEM for the first page that EL2
        cannot have (not aligned, not RAM, not the host's own, twice in the list, list too short).
        """
        memory = self._memory
        if not 0 < nr <= memory.ram_bytes >> PAGE_SHIFT:
            raise Refused(Errno.EINVAL, "count", f"a list of {nr} pages cannot be")
        with self._donations.lock:
            taken: list[int] = []
            pa = head_pa
            while len(taken) < nr:
                try:
                    if pa & PAGE_MASK:
                        why = "the address is not that of a page"
                        raise Refused(Errno.EINVAL, "alignment", why)
                    self._donations.host_donate_hyp(pa >> PAGE_SHIFT, 1)
                except Refused as refused:
                    if taken:
                        self._give_back(taken)
                    why = f"page {len(taken)} of the list: {refused.why}"
                    raise Refused(Errno.ENOMEM, refused.check, why, pa=pa) from refused
                taken.append(pa)
                pa = memory.read_u64(pa)
            for page in reversed(taken):
                self.free(page)
        return nr

    def drain(self) -> tuple[int, int]:
        """Give every page back to the host, zero but for the link in its first word (0 in the
        last). Returns (PA of the first or 0, number of pages)."""
        with self._donations.lock:
            pages = self.pages()
            head, self._head, self._count = self._head, 0, 0
            if pages:
                self._give_back(pages)
        return head, len(pages)

    def _give_back(self, pages: list[int]) -> None:
        self._donations.hyp_donate_host_list(np.sort(np.array(pages, np.int64)) >> PAGE_SHIFT)
