# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory of this process that a real kernel gives to guests, and safe ways to its bytes.

A load of a page that belongs to a protected guest ends in SIGSEGV, and with it
the process. A system call that is given such a page ends in EFAULT, and the
page stays as it is. So no load or store is ever made here: bytes come and go
by pwrite(2) and pread(2) between the memory and a file of memory (memfd), and
the first byte that such a call cannot reach is the first one that is refused.

Not every system call will do. process_vm_readv(2), vmsplice(2) and
/proc/self/mem make the kernel touch the page without a fix-up, which takes it
from its guest by force; of those, only `forced_read` and `forced_write` use the
last one. fork(2) would do the same to every page that a guest has, so that
mappings are not given to children (MADV_DONTFORK).
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import weakref
from collections.abc import Callable

from pkvm.kvm import libc
from pkvm.uapi.errors import ProtectedPageError

PAGE_SIZE = mmap.PAGESIZE
STAGE_BYTES = 256 << 10
"""Moved at a time."""


class Stage:
    """The file through which bytes come and go: one for all memory of a kernel, any thread. It is
    mapped too, as no guest ever gets it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fd = os.memfd_create("pkvm-stage", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self._fd)
        os.ftruncate(self._fd, STAGE_BYTES)
        self._bytes = mmap.mmap(self._fd, STAGE_BYTES)

    def load(self, address: int, length: int, access: str) -> bytes:
        """Bytes at a user address. Raises ProtectedPageError, naming `access`."""
        parts = []
        for start in range(0, length, STAGE_BYTES):
            size = min(STAGE_BYTES, length - start)
            with self._lock:
                _whole(libc.pwrite, self._fd, address + start, size, access)
                parts.append(self._bytes[:size])
        return b"".join(parts)

    def store(self, address: int, data: bytes, access: str) -> None:
        """Put bytes to a user address. Errors as `load`; what comes before the byte refused has
        been written."""
        for start in range(0, len(data), STAGE_BYTES):
            part = data[start : start + STAGE_BYTES]
            with self._lock:
                self._bytes[: len(part)] = part
                _whole(libc.pread, self._fd, address + start, len(part), access)


def _whole(
    move: Callable[[int, int, int, int], int], fd: int, address: int, length: int, access: str
) -> None:
    """Move all of it between the start of the file and memory."""
    done, step = 0, length
    while done < length:
        try:
            done += move(fd, address + done, min(step, length - done), done)
            step = length
        except OSError as error:
            if error.errno == errno.EINTR:
                continue
            if error.errno != errno.EFAULT:
                raise
            if step == 1:
                raise ProtectedPageError(address + done, access) from error
            step = 1  # a call may refuse more than the byte that it cannot reach


class DevMemory:
    """[address, address+length) of this process: what a VMM does to guest memory's bytes."""

    def __init__(self, stage: Stage, address: int, length: int) -> None:
        self._stage = stage
        self._address = address
        self._length = length
        self._closed = False

    @property
    def address(self) -> int:
        """User address of the first byte."""
        return self._address

    @property
    def length(self) -> int:
        """Bytes, a multiple of the host's page size."""
        return self._length

    def read(self, offset: int, length: int) -> bytes:
        """Load bytes, or rather what a load would give. Raises ValueError outside the mapping,
        ProtectedPageError."""
        return self._stage.load(self._at(offset, length), length, "load")

    def write(self, offset: int, data: bytes) -> None:
        """Store bytes; those before the refused one have been written. Errors as `read`."""
        self._stage.store(self._at(offset, len(data)), data, "store")

    def syscall_read(self, offset: int, length: int) -> bytes:
        """What copy_from_user in a system call gets. Errors as `read`."""
        return self._stage.load(self._at(offset, length), length, "system call's read")

    def syscall_write(self, offset: int, data: bytes) -> None:
        """copy_to_user in a system call. Errors as `read`."""
        self._stage.store(self._at(offset, len(data)), data, "system call's write")

    def forced_read(self, offset: int, length: int) -> bytes:
        """pread(2) of /proc/self/mem: takes a guest's page by force. Raises ValueError outside the
        mapping, OSError. A kernel that has no forced reclaim (before 7.3) may die of it."""
        address = self._at(offset, length)
        fd = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = b""
            while len(data) < length:
                part = os.pread(fd, length - len(data), address + len(data))
                if not part:
                    raise OSError(errno.EIO, f"/proc/self/mem ends at {address + len(data):#x}")
                data += part
            return data
        finally:
            os.close(fd)

    def forced_write(self, offset: int, data: bytes) -> None:
        """pwrite(2) of /proc/self/mem. As `forced_read`."""
        address = self._at(offset, len(data))
        fd = os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(fd, data[done:], address + done)
        finally:
            os.close(fd)

    def _at(self, offset: int, length: int) -> int:
        """The user address of [offset, offset+length)."""
        if self._closed:
            raise ValueError(f"the mapping at {self._address:#x} is closed")
        if offset < 0 or length < 0 or offset + length > self._length:
            raise ValueError(
                f"[{offset:#x}, +{length:#x}) is outside the mapping of {self._length:#x} bytes"
            )
        return self._address + offset
