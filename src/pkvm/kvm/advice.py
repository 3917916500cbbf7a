# SPDX-License-Identifier: GPL-2.0-or-later
"""What a kernel's errno means for a user of protected VMs, and what to do about it."""

from __future__ import annotations

import errno
import os

from pkvm.uapi.kvm import TYPE_PROTECTED, Ioctl

NOT_PROTECTED = (
    "this kernel makes no protected VMs: boot it with kvm-arm.mode=protected on its command line "
    "(arm64, started at EL2)"
)

_ADVICE: dict[tuple[int, int], str] = {
    (Ioctl.CREATE_VM, errno.ENOMEM): (
        "the kernel has no memory for a VM, or as many as EL2 has room for: close one"
    ),
    (Ioctl.RUN, errno.ENOMEM): (
        "a page for the guest could not be pinned: raise RLIMIT_MEMLOCK (ulimit -l unlimited) or "
        "give the guest less memory"
    ),
    (Ioctl.RUN, errno.EFAULT): (
        "the guest touched a page that it lost to the host, or that the VMM has not mapped"
    ),
    (Ioctl.CREATE_DEVICE, errno.ENODEV): "this computer's interrupt controller has no such device",
}
"""By request and errno."""


def explained(request: int, argument: int | bytearray, error: OSError) -> OSError:
    """The same error of the request, with words that say more if there are any."""
    number = error.errno or 0
    words = _ADVICE.get((request & 0xFFFF_FFFF, number))
    if (request, argument, number) == (Ioctl.CREATE_VM, TYPE_PROTECTED, errno.EINVAL):
        words = NOT_PROTECTED
    return error if words is None else OSError(number, f"{os.strerror(number)}: {words}")
