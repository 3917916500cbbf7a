# SPDX-License-Identifier: GPL-2.0-or-later
"""The seam: a kernel at the level of system calls, as `Kvm`, `Vm` and `Vcpu` use it.

Two kernels stand behind it: the built-in host (`pkvm.host`) and, over
`fcntl.ioctl`, a real /dev/kvm. Nothing above the seam knows which it talks to.
Every call raises OSError with Linux's errno; the text of the error says more
where the kernel has more to say.

Memory is an object of the seam. On a real kernel a `Memory` is a mapping of
this process; on the built-in host it is pages of the machine's RAM,
reached through the host's stage-2. Both refuse the same accesses in the same
way: `pkvm.uapi.errors.ProtectedPageError`.
"""

from __future__ import annotations

from typing import Protocol

from pkvm.uapi.memory import Backing, Change, Forced, SystemCall


class Memory(Protocol):
    """A mapping made through the seam: the VMM's view of guest memory.

    Children of the process do not get it (MADV_DONTFORK). An access to a part that was unmapped or
    protected since (`change`) is an OSError with EFAULT, but no ProtectedPageError.
    """

    @property
    def address(self) -> int:
        """User address of the first byte: what `userspace_addr` and ioctl pointers take."""
        ...

    @property
    def length(self) -> int:
        """Bytes, a multiple of the page size."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Load `length` bytes at byte `offset`. Raises ValueError outside the mapping,
        ProtectedPageError where a page is not accessible to the host."""
        ...

    def write(self, offset: int, data: bytes) -> None:
        """Store `data` at byte `offset`. Errors as `read`; pages before the refused one may have
        been written, as with any store."""
        ...

    def syscall_read(self, offset: int, length: int) -> bytes:
        """What a system call reading the buffer sees (write(2) to a pipe): the bytes, or
        ProtectedPageError (EFAULT)."""
        ...

    def syscall_write(self, offset: int, data: bytes) -> None:
        """Let a system call write into the buffer (read(2) from a pipe). Errors as
        `syscall_read`."""
        ...

    def system_call(self, what: SystemCall, offset: int, length: int) -> int:
        """Use a part as the buffer of a system call: what that returned. Raises ValueError outside
        the mapping, OSError: EFAULT where the buffer cannot be reached."""
        ...

    def forced_read(self, offset: int, length: int, way: Forced = Forced.PROC_MEM) -> bytes:
        """What the kernel reads for itself where it has no fix-up. In some dialects that takes a
        guest's private page by force: it reads zero, and the guest has lost it for ever. Else
        HostOopsError. Raises OSError where nothing is mapped."""
        ...

    def forced_write(self, offset: int, data: bytes, way: Forced = Forced.PROC_MEM) -> None:
        """What the kernel writes for itself. As `forced_read`."""
        ...

    def change(self, what: Change, offset: int = 0, length: int | None = None) -> None:
        """munmap, mprotect, madvise, ... of a part, by default of all from `offset` on. Raises
        ValueError outside the mapping, OSError."""
        ...

    def move(self, offset: int = 0, length: int | None = None) -> Memory:
        """mremap(2) of a part to another address: what is there now. Errors as `change`."""
        ...

    def alias(self) -> Memory:
        """mmap(2) of the same object once more. Raises EINVAL where there is none to map: anonymous
        memory."""
        ...

    def close(self) -> None:
        """munmap. Idempotent. A VM that uses the pages keeps them."""
        ...


class RunPage(Protocol):
    """A vCPU's mmapped `struct kvm_run`."""

    @property
    def view(self) -> memoryview:
        """The bytes, writable, shared with the kernel."""
        ...

    def close(self) -> None:
        """munmap. Idempotent."""
        ...


class Kernel(Protocol):
    """open, ioctl, mmap, close: the system calls of a KVM user."""

    def open(self, path: str) -> int:
        """open(2) of a device: a file descriptor. The built-in host has "/dev/kvm" and
        "/dev/dma-copy"; ENOENT otherwise."""
        ...

    def ioctl(self, fd: int, request: int, arg: int | bytearray = 0) -> int:
        """ioctl(2). A `bytearray` stands for a pointer to a structure of its length and is written
        back in place; a buffer shorter than the request's structure is EFAULT. KVM_RUN blocks."""
        ...

    def mmap(self, length: int, backing: Backing = Backing.ANONYMOUS) -> Memory:
        """A new, zeroed mapping of `length` bytes (rounded up to pages), by default anonymous and
        private. Raises EINVAL for length 0, ENOMEM."""
        ...

    def mmap_vcpu(self, fd: int, length: int) -> RunPage:
        """mmap(2) of a vCPU file descriptor (GET_VCPU_MMAP_SIZE bytes)."""
        ...

    def close(self, fd: int) -> None:
        """close(2). EBADF if it is not open."""
        ...

    def kick(self, fd: int) -> None:
        """Make a KVM_RUN that is under way on this vCPU fd return EINTR, as a signal to its thread
        does. Nothing happens if none is; set `immediate_exit` first to catch the next."""
        ...

    def fork(self) -> None:
        """fork(2): a child that ends at once. It gets the memory for which MADV_DOFORK was said,
        and the kernel copies those private pages of it that a guest has."""
        ...

    def limit_memlock(self, limit: int | None) -> None:
        """setrlimit(2) of RLIMIT_MEMLOCK, bytes, and no privilege to ignore it; None is how it was
        at first."""
        ...
