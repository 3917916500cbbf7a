# SPDX-License-Identifier: GPL-2.0-or-later
"""A real Linux kernel behind the seam: `pkvm.kvm.kernel.Kernel` over open, ioctl and mmap.

Structures are bytearrays, as everywhere above the seam; `fcntl.ioctl` hands
their bytes to the kernel and brings back what it wrote. What a structure points
to lies in a `DevMapping`, whose address never changes.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

from pkvm.kvm import libc, linux_memory
from pkvm.kvm.advice import explained
from pkvm.kvm.dev_mapping import DevMapping
from pkvm.kvm.dev_memory import PAGE_SIZE, Stage
from pkvm.kvm.kicks import INTERRUPTER, Runners, Self
from pkvm.uapi.kvm import Ioctl
from pkvm.uapi.memory import Backing

_ioctl = fcntl.ioctl
_RUN = int(Ioctl.RUN)
_REG_LIST = int(Ioctl.GET_REG_LIST)
_INT_MAX = (1 << 31) - 1
_MASK64 = (1 << 64) - 1


class DevRunPage:
    """A vCPU's mmapped struct kvm_run (`pkvm.kvm.kernel.RunPage`). Raises OSError."""

    def __init__(self, fd: int, length: int) -> None:
        if length <= 0:
            raise OSError(errno.EINVAL, f"cannot map {length} bytes")
        size = (length + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE
        self._map = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._view = memoryview(self._map)
        self._closed = False
        INTERRUPTER.take()

    @property
    def view(self) -> memoryview:
        """The bytes, writable, shared with the kernel."""
        return self._view

    def close(self) -> None:
        """munmap. Idempotent."""
        if not self._closed:
            self._closed = True
            INTERRUPTER.drop()
            self._view.release()
            self._map.close()


class DevKernel:
    """This computer's kernel. Any thread may call; every call raises OSError with the kernel's
    errno."""

    def __init__(self) -> None:
        self._stage = Stage()
        self._runners = Runners()
        self._self = Self()

    def open(self, path: str) -> int:
        """open(2) of a device, for reading and writing."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def ioctl(self, fd: int, request: int, arg: int | bytearray = 0) -> int:
        """ioctl(2); see `pkvm.kvm.kernel.Kernel`. KVM_RUN lets other threads run meanwhile, and an
        interrupted one is EINTR: nothing is tried again."""
        if request == _RUN and arg == 0:
            return self._run(fd)
        _check_fd(fd)
        try:
            if isinstance(arg, bytearray):
                _check_room(request, arg)
                result: int = fcntl.ioctl(fd, request, arg, True)
                return result
            if 0 <= arg <= _INT_MAX:
                return fcntl.ioctl(fd, request, arg)
            # `fcntl.ioctl` knows no more than a C int.
            return libc.ioctl(fd, request, arg & _MASK64)
        except OSError as error:
            raise explained(request, arg, error) from None

    def mmap(self, length: int, backing: Backing = Backing.ANONYMOUS) -> DevMapping:
        """A new, zeroed mapping. Raises EINVAL, ENOMEM (also where the kernel has no huge pages at
        hand: vm.nr_hugepages), ENODEV for a file where there is no disk."""
        return DevMapping.new(self._stage, length, backing)

    def mmap_vcpu(self, fd: int, length: int) -> DevRunPage:
        """mmap(2) of a vCPU. Raises EBADF, ENODEV, EINVAL."""
        _check_fd(fd)
        return DevRunPage(fd, length)

    def close(self, fd: int) -> None:
        """close(2). Raises EBADF."""
        _check_fd(fd)
        os.close(fd)

    def kick(self, fd: int) -> None:
        """End a KVM_RUN under way on a vCPU with EINTR. From any thread, also out of a signal
        handler of Python's."""
        self._runners.kick(fd)

    def fork(self) -> None:
        """fork(2); the child ends at once. Raises OSError."""
        linux_memory.fork()

    def limit_memlock(self, limit: int | None) -> None:
        """RLIMIT_MEMLOCK, obeyed even by root; None: as it was at first. Raises OSError."""
        linux_memory.limit_memlock(limit)

    def _run(self, fd: int) -> int:
        """KVM_RUN. The path of every device access: no check that Python makes as well."""
        runners = self._runners
        runners[fd] = self._self.tid
        try:
            return _ioctl(fd, _RUN, 0)
        except OSError as error:
            raise explained(_RUN, 0, error) from None
        except (OverflowError, ValueError):
            raise OSError(errno.EBADF, f"descriptor {fd} is not open") from None
        finally:
            runners.pop(fd, None)


def _check_fd(fd: int) -> None:
    """Raises EBADF for a number that no descriptor has."""
    if not 0 <= fd <= _INT_MAX:
        raise OSError(errno.EBADF, f"descriptor {fd} is not open")


def _check_room(request: int, argument: bytearray) -> None:
    """Raises EFAULT if the kernel would read or write beyond the buffer. A request says how long
    its structure is (asm-generic/ioctl.h); a register list goes on behind it."""
    size = request >> 16 & 0x3FFF
    if request == _REG_LIST:
        size += 8 * int.from_bytes(argument[:8], "little")
    if len(argument) < size:
        raise OSError(errno.EFAULT, f"the request's structure needs a bytearray of {size} bytes")
