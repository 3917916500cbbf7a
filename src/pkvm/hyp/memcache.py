# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's cache of table pages: the host pays for its guest's page tables (facts §4.3, memcache)."""

from __future__ import annotations


class Memcache:
    """Pages that the host donated for one VM's stage-2 tables, linked through their first word.

    Made by `MemProtect.new_memcache`. Implements the table source of `Stage2`: tables freed from
    the guest's stage-2 come back here, zeroed.
    """

    @property
    def available(self) -> int:
        """Pages in the cache."""
        raise NotImplementedError

    def topup(self, head_pa: int, nr: int) -> int:
        """Take `nr` pages from the host's linked list that starts at PA `head_pa` (next PA in the
        first word of each). All or none. Returns nr.

        Each page is donated before its link is read, so the host cannot change it in between.
        Raises Refused: EINVAL for nr out of range, ENOMEM for the first page that cannot be
        donated (unaligned, not RAM, not host-owned, list too short or circular).
        """
        raise NotImplementedError

    def drain(self) -> tuple[int, int]:
        """Give every page back to the host, zeroed but for the link in its first word.

        Returns (PA of the first page or 0, number of pages): HostVm.TEARDOWN_HEAD and _NR.
        """
        raise NotImplementedError

    def alloc(self) -> int:
        """PA of a zeroed page, refcount 1. Raises HypBug if empty: callers check first."""
        raise NotImplementedError

    def free(self, pa: int) -> None:
        """Put the table page at `pa` back, zeroed."""
        raise NotImplementedError
