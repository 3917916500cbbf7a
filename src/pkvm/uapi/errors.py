# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VMM gets for touching a page that it may not."""

from __future__ import annotations

import errno


class ProtectedPageError(OSError):
    """The page belongs to a protected guest (or to EL2) and is not shared.

    A VMM on Linux gets SIGSEGV with si_code SEGV_ACCERR and this exact address
    for a load or store, and EFAULT for a system call on the buffer; here both
    are this exception, with errno EFAULT, and the process lives.
    """

    def __init__(self, address: int, access: str) -> None:
        super().__init__(
            errno.EFAULT,
            f"{access} of {address:#x} refused: the page belongs to a protected guest or to EL2; "
            "only the guest can share it (MEM_SHARE)",
        )
        self.address = address
        """User address of the first byte refused."""
