# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory of every kind on a real kernel, and all that can be done to it while a guest has it.

What a page may not be touched for is told apart here: the kernel says EFAULT both where this
process has taken away its own right (munmap, mprotect) and where EL2 has.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from pkvm.kvm import linux_memory
from pkvm.kvm.dev_memory import DevMemory, Stage
from pkvm.uapi.errors import ProtectedPageError
from pkvm.uapi.memory import Backing, Change, Forced, SystemCall


class DevMapping(DevMemory):
    """A mapping that `linux_memory.map_backing` made, or `move` and `alias` of one.

    `fd` is the descriptor of its object, which it closes in the end, or -1.
    """

    def __init__(self, stage: Stage, backing: Backing, address: int, length: int, fd: int) -> None:
        super().__init__(stage, address, length)
        self.backing = backing
        self._fd = fd
        self._parts = [(0, length)]
        """What is still mapped here, as offsets: other memory may be where the rest was."""
        linux_memory.dont_fork(address, length)

    @classmethod
    def new(cls, stage: Stage, length: int, backing: Backing) -> DevMapping:
        """Memory of that kind. Raises OSError."""
        if length <= 0:
            raise OSError(errno.EINVAL, f"cannot map {length} bytes")
        return cls(stage, backing, *linux_memory.map_backing(backing, length))

    def read(self, offset: int, length: int) -> bytes:
        """What a load would give. Raises ValueError outside the mapping, ProtectedPageError, and
        OSError (EFAULT) where this process itself has no right to read."""
        with _own_right("r"):
            return super().read(offset, length)

    def write(self, offset: int, data: bytes) -> None:
        """A store. Errors as `read`; what comes before the byte refused has been written."""
        with _own_right("w"):
            super().write(offset, data)

    def syscall_read(self, offset: int, length: int) -> bytes:
        """copy_from_user in a system call. Errors as `read`."""
        with _own_right("r"):
            return super().syscall_read(offset, length)

    def syscall_write(self, offset: int, data: bytes) -> None:
        """copy_to_user in a system call. Errors as `read`."""
        with _own_right("w"):
            super().syscall_write(offset, data)

    def system_call(self, what: SystemCall, offset: int, length: int) -> int:
        """Use a part as a system call's buffer; what it returned. Raises ValueError outside the
        mapping, OSError."""
        return linux_memory.system_call(what, self._at(offset, length), length)

    def forced_read(self, offset: int, length: int, way: Forced = Forced.PROC_MEM) -> bytes:
        """What the kernel reads for itself, which takes a guest's page by force. Errors as
        `system_call`. A kernel that has no forced reclaim (before 7.3) may die of it."""
        address = self._at(offset, length)
        if way is Forced.PROC_MEM:
            return super().forced_read(offset, length)
        return linux_memory.forced_read(way, address, length, self._fd, offset)

    def forced_write(self, offset: int, data: bytes, way: Forced = Forced.PROC_MEM) -> None:
        """What the kernel writes for itself. As `forced_read`."""
        address = self._at(offset, len(data))
        if way is Forced.PROC_MEM:
            super().forced_write(offset, data)
        else:
            linux_memory.forced_write(way, address, data, self._fd, offset)

    def change(self, what: Change, offset: int = 0, length: int | None = None) -> None:
        """Do `what` to a part. Errors as `system_call`."""
        length = self._length - offset if length is None else length
        linux_memory.change(what, self._at(offset, length), length)
        if what in (Change.UNMAP, Change.REPLACE):
            self._parts = _without(self._parts, offset, offset + length)
        if what is Change.REPLACE:
            self._parts.append((offset, offset + length))

    def move(self, offset: int = 0, length: int | None = None) -> DevMapping:
        """mremap of a part to another address. Errors as `system_call`."""
        length = self._length - offset if length is None else length
        address = linux_memory.move(self._at(offset, length), length)
        self._parts = _without(self._parts, offset, offset + length)
        return DevMapping(self._stage, self.backing, address, length, self._object())

    def alias(self) -> DevMapping:
        """Another mapping of the same object. Raises EINVAL for anonymous memory."""
        if not self.backing.has_file:
            raise OSError(errno.EINVAL, f"{self.backing.words} cannot be mapped again")
        address = linux_memory.map_object(self.backing, self._length, self._fd)
        return DevMapping(self._stage, self.backing, address, self._length, self._object())

    def close(self) -> None:
        """munmap. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._fd >= 0:
            os.close(self._fd)
        for start, end in self._parts:
            linux_memory.change(Change.UNMAP, self._address + start, end - start)

    def _object(self) -> int:
        """A descriptor of the object for another mapping."""
        return os.dup(self._fd) if self._fd >= 0 else -1


def _without(parts: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """The parts, as (start, end), that are not in [start, end)."""
    cut = [
        piece for low, high in parts for piece in ((low, min(high, start)), (max(low, end), high))
    ]
    return [(low, high) for low, high in cut if low < high]


@contextmanager
def _own_right(letter: str) -> Iterator[None]:
    """Say so where it is not EL2 that refuses: the mapping has no such right in /proc/self/maps."""
    try:
        yield
    except ProtectedPageError as error:
        rights = linux_memory.mapped(error.address)
        if letter in rights:
            raise
        why = f"it is mapped {rights}" if rights else "nothing is mapped there"
        raise OSError(errno.EFAULT, f"no access to {error.address:#x}: {why}") from None
