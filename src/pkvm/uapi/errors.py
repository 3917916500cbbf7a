# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VMM gets for touching a page that it may not, and what its kernel does."""

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


class HostOopsError(OSError):
    """The host kernel itself touched a page that it may not, and could not take it back.

    A real kernel dies of it, or the task does (oops: "access to hypervisor-protected memory"). Here
    it is this exception, with errno EFAULT, and the host lives.
    """

    def __init__(self, address: int, access: str, why: str) -> None:
        super().__init__(
            errno.EFAULT, f"the host kernel's {access} of {address:#x} is an oops: {why}"
        )
        self.address = address
        """User address of the first byte refused."""
