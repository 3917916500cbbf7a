# SPDX-License-Identifier: GPL-2.0-or-later
"""RLIMIT_MEMLOCK of the VMM's process: how many pages guests may pin (facts §2.1).

A guest's page cannot be swapped out or migrated, so it counts as locked from
its first touch to the VM's end.
"""

from __future__ import annotations

import errno

from pkvm.host.ports import PAGE_SHIFT


class Memlock:
    """`limit` in bytes; None: unlimited, as for a process with CAP_IPC_LOCK."""

    __slots__ = ("limit", "pages")

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.pages = 0
        """Pages that count: VmLck of /proc/self/status."""

    def charge(self, npages: int) -> None:
        """Count `npages` more. Raises ENOMEM beyond the limit."""
        pages = self.pages + npages
        if self.limit is not None and pages << PAGE_SHIFT > self.limit:
            raise OSError(
                errno.ENOMEM,
                f"the guest touches more memory than the VMM's process may lock: RLIMIT_MEMLOCK is "
                f"{self.limit} bytes, and each page of a protected guest counts (raise it with "
                "ulimit -l)",
            )
        self.pages = pages

    def release(self, npages: int) -> None:
        """Count `npages` less."""
        self.pages -= npages
