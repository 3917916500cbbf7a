# SPDX-License-Identifier: GPL-2.0-or-later
"""`pkvm.open`: KVM of the built-in machine, or of this computer's own kernel.

Standard library only, until the built-in machine is asked for.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Unpack

from pkvm.kvm.kvm import Kvm
from pkvm.uapi.kvm import API_VERSION

if TYPE_CHECKING:
    from pkvm.kvm.kernel import Kernel
    from pkvm.system import Options

MODEL = "model"
_MACHINES = ("aarch64", "arm64")
_GROUP_MAY = 0o060
"""Reading and writing, in a file's mode."""


def open(backend: str = MODEL, **options: Unpack[Options]) -> Kvm:
    """Open KVM: "model" is a machine of its own, a path such as "/dev/kvm" this computer's kernel.

    `options` are those of `System`, for the model; the machine ends when the returned `Kvm` is
    closed, and every VM on it. Raises ValueError for any other back-end and for options that a
    device has not; what `System` raises, or OSError, which says what this computer lacks.
    """
    if backend == MODEL:
        # Imported here: it needs numpy and Unicorn.
        from pkvm.system import System

        system = System(**options)
        return Kvm(system.kernel, on_close=system.close)
    if not backend.startswith("/"):
        raise ValueError(
            f'there is no back-end {backend!r}; use the built-in machine, "model", or a device '
            'such as "/dev/kvm"'
        )
    if options:
        raise ValueError(
            f"{backend} is a device of this computer, and the built-in machine's options mean "
            f"nothing to it: leave out {', '.join(options)}"
        )
    return open_device(backend)


def open_device(path: str = "/dev/kvm", kernel: Kernel | None = None) -> Kvm:
    """Open KVM of this computer's own kernel at `path`; `kernel` is how its system calls are made.

    Raises OSError, with the path and what is missing: another computer, the module, the user's
    right to use it. Whether the kernel protects VMs, only making one tells.
    """
    machine = os.uname().machine
    if machine not in _MACHINES:
        raise OSError(
            errno.ENODEV,
            f"this computer is {machine}, and protected VMs need arm64: use the built-in machine, "
            "or run this on an arm64 host",
            path,
        )
    if kernel is None:
        # Imported here: it loads the C library, which the built-in machine does not need.
        from pkvm.kvm.dev_kernel import DevKernel

        kernel = DevKernel()
    try:
        kvm = Kvm(kernel, path)
    except OSError as error:
        number = error.errno or errno.EIO
        raise OSError(number, _missing(path, number), path) from error
    try:
        version = kvm.api_version()
    except OSError as error:
        kvm.close()
        words = f"that is not KVM: it does not know KVM_GET_API_VERSION ({error.strerror})"
        raise OSError(error.errno or errno.EIO, words, path) from error
    if version != API_VERSION:
        kvm.close()
        words = f"its KVM API has version {version}, and {API_VERSION} is the only one in use"
        raise OSError(errno.EPROTO, words, path)
    return kvm


def _missing(path: str, number: int) -> str:
    """Why `path` could not be opened, and what to do."""
    match number:
        case errno.ENOENT:
            return (
                "there is no such file: the kernel has no KVM (CONFIG_KVM), or did not start at "
                "EL2, which KVM needs; its log says which (dmesg | grep kvm)"
            )
        case errno.EACCES | errno.EPERM:
            group = _group(path)
            advice = f"join the group {group} and log in again" if group else "become root"
            return f"it is not yours to open: {advice}"
        case errno.ENODEV | errno.ENXIO:
            return "the file is there and its driver is not: load it (modprobe kvm)"
    return os.strerror(number)


def _group(path: str) -> str:
    """The name of the group whose members may open the file; "" if there is no such group."""
    # Imported here: only a refusal needs it.
    from pathlib import Path

    file = Path(path)
    try:
        mode, group = file.stat().st_mode, file.group()
    except (KeyError, OSError):
        return ""
    return group if mode & _GROUP_MAY == _GROUP_MAY and group != "root" else ""
