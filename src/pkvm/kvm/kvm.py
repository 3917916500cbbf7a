# SPDX-License-Identifier: GPL-2.0-or-later
"""`Kvm`: the owner of a /dev/kvm file descriptor, on whichever kernel."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from pkvm.kvm.kernel import Kernel, Memory
from pkvm.kvm.vm import Vm
from pkvm.uapi import kvm as uapi
from pkvm.uapi.dialects import DIALECTS, UPSTREAM, Dialect


class Kvm:
    """/dev/kvm, opened on `kernel`. Every method raises OSError with the kernel's errno.

    `on_close` is called once, after the descriptor is closed: `pkvm.open` lets the machine behind
    the descriptor end there.
    """

    def __init__(
        self,
        kernel: Kernel,
        path: str = "/dev/kvm",
        *,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self.kernel = kernel
        self.fd = kernel.open(path)
        self._on_close = on_close
        self._mmap_size = 0
        self._closed = False

    def api_version(self) -> int:
        """KVM_GET_API_VERSION (KVM API 4.1): 12."""
        return self.kernel.ioctl(self.fd, uapi.Ioctl.GET_API_VERSION)

    def create_vm(self, machine_type: int = 0) -> Vm:
        """KVM_CREATE_VM (KVM API 4.2). With `uapi.kvm.TYPE_PROTECTED` the VM is protected, where
        the dialect makes it so."""
        return Vm(self, self.kernel.ioctl(self.fd, uapi.Ioctl.CREATE_VM, machine_type))

    def dialect(self) -> Dialect:
        """What protected KVM this kernel speaks, by the capability that it has. The upstream one
        has none, and an ordinary kernel neither: whether that one protects VMs, only making one
        tells."""
        for dialect in DIALECTS.values():
            if dialect.capability is not None and self.check_extension(dialect.capability):
                return dialect
        return UPSTREAM

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION (KVM API 4.4): 0 if the kernel does not have it."""
        return self.kernel.ioctl(self.fd, uapi.Ioctl.CHECK_EXTENSION, int(cap))

    def vcpu_mmap_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE (KVM API 4.5): bytes of a vCPU's mapping. Asked once."""
        if not self._mmap_size:
            self._mmap_size = self.kernel.ioctl(self.fd, uapi.Ioctl.GET_VCPU_MMAP_SIZE)
        return self._mmap_size

    def mmap(self, length: int) -> Memory:
        """`length` bytes of zeroed user memory, to be given to VMs."""
        return self.kernel.mmap(length)

    def close(self) -> None:
        """Close the descriptor. VMs made from it live on until theirs are closed. Idempotent."""
        if not self._closed:
            self._closed = True
            self.kernel.close(self.fd)
            if self._on_close is not None:
                self._on_close()

    def __enter__(self) -> Kvm:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
