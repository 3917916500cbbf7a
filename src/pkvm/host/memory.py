# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory as the VMM sees it: `pkvm.kvm.kernel.Memory` of the built-in host.

Loads and stores take the host CPU's way, through its stage-2, and need no
system call. Whatever else is done is one of the kernel's, which is handed in.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol, TypeVar

from pkvm.host.mm import Mapped, UserSpace
from pkvm.host.ports import PAGE_SIZE
from pkvm.uapi.errors import ProtectedPageError
from pkvm.uapi.memory import Backing, Change, Forced, SystemCall

_UTSNAME = b"Linux".ljust(390, b"\0")
_TIMESPEC_BYTES = 16
T = TypeVar("T")
U = TypeVar("U")


class MemoryCalls(Protocol):
    """The system calls of the host kernel that a memory needs."""

    def take(self, pa: int, address: int) -> None:
        """Get the page at a PA and user address back by force, or raise HostOopsError."""
        ...

    def unmap(self, address: int, length: int) -> None:
        """munmap(2)."""
        ...

    def change(self, what: Change, address: int, length: int) -> None:
        """mprotect(2), madvise(2), ... Raises OSError."""
        ...

    def device_read(self, address: int, length: int) -> bytes:
        """What a device reads at a user address, by DMA. Raises EIO where it may not."""
        ...

    def device_write(self, address: int, data: bytes) -> None:
        """A device's DMA to a user address. Errors as `device_read`."""
        ...

    def place(self, make: Callable[[], Mapped], backing: Backing) -> HostMemory:
        """The memory that `make` maps. Raises OSError."""
        ...


class HostMemory:
    """A mapping in the VMM's hands."""

    def __init__(
        self, users: UserSpace, calls: MemoryCalls, mapped: Mapped, backing: Backing
    ) -> None:
        address, length, self._object = mapped
        self.address = address
        """User address of the first byte."""
        self.length = length
        """Bytes, a multiple of the page size."""
        self.backing = backing
        self.mapping = users.find(address, 1)
        """The mapping that is, or was at first, at `address`."""
        self._users = users
        self._calls = calls
        self._simple = self.mapping.length == length
        self._bus = users.bus
        self._faults = users.bus_faults
        self._closed = False

    def read(self, offset: int, length: int) -> bytes:
        """Load bytes. Raises ValueError outside the mapping, ProtectedPageError, EFAULT where it
        was unmapped or protected."""
        return self._load(offset, length, "load")

    def write(self, offset: int, data: bytes) -> None:
        """Store bytes; pages before a refused one have been written. Errors as `read`."""
        self._store(offset, data, "store")

    def syscall_read(self, offset: int, length: int) -> bytes:
        """What copy_from_user in a system call gets. Errors as `read`."""
        return self._load(offset, length, "system call's read")

    def syscall_write(self, offset: int, data: bytes) -> None:
        """copy_to_user in a system call. Errors as `read`."""
        self._store(offset, data, "system call's write")

    def system_call(self, what: SystemCall, offset: int, length: int) -> int:
        """Use a part as a system call's buffer; what it returned. Raises ValueError outside the
        mapping, EFAULT, ENOENT for the path of a file."""
        if what is SystemCall.NANOSLEEP:
            length = _TIMESPEC_BYTES
        elif what is SystemCall.OPEN:
            length = 1
        data = _UTSNAME if what is SystemCall.UNAME else bytes(length)
        done = 0
        while done < len(data):
            count = min(len(data) - done, PAGE_SIZE - (offset + done) % PAGE_SIZE)
            try:
                if what.writes:
                    self._store(offset + done, data[done : done + count], what.words)
                else:
                    self._load(offset + done, count, what.words)
            except OSError as error:
                if done and what.partial:
                    return done
                raise OSError(errno.EFAULT, error.strerror) from error
            done += count
        if what is SystemCall.OPEN:
            raise OSError(errno.ENOENT, "open: the built-in host has no such file")
        return done if what not in (SystemCall.NANOSLEEP, SystemCall.UNAME) else 0

    def forced_read(self, offset: int, length: int, way: Forced = Forced.PROC_MEM) -> bytes:
        """A load of the kernel's own, which takes what it may not touch by force. Raises ValueError
        outside the mapping, HostOopsError, EIO or EFAULT where nothing is mapped."""
        self._check(offset, length)
        if way is Forced.DEVICE:
            return self._calls.device_read(self._block(offset, length), length)
        read = self._bus.read
        parts = [
            self._forced(pa, at, partial(_swapped, read, count))
            for pa, at, count in self._forced_pieces(offset, length, way)
        ]
        return b"".join(parts)

    def forced_write(self, offset: int, data: bytes, way: Forced = Forced.PROC_MEM) -> None:
        """A store of the kernel's own. Errors as `forced_read`."""
        self._check(offset, len(data))
        if way is Forced.VMSPLICE:
            raise OSError(errno.EINVAL, "vmsplice only reads")
        if way is Forced.DEVICE:
            self._calls.device_write(self._block(offset, len(data)), data)
            return
        done = 0
        for pa, at, count in self._forced_pieces(offset, len(data), way, write=True):
            part = data[done : done + count]
            self._forced(pa, at, partial(_swapped, self._bus.write, part))
            done += count

    def change(self, what: Change, offset: int = 0, length: int | None = None) -> None:
        """munmap, mprotect, madvise, ... of a part. Raises ValueError outside the mapping,
        OSError."""
        length = self.length - offset if length is None else length
        self._check(offset, length)
        self._calls.change(what, self.address + offset, length)

    def move(self, offset: int = 0, length: int | None = None) -> HostMemory:
        """mremap of a part to another address: what is there now. Errors as `change`."""
        size = self.length - offset if length is None else length
        self._check(offset, size)
        users, at, whole = self._users, self.address + offset, self.length

        def make() -> Mapped:
            of = self._object and users.alias(self._object, whole)
            return Mapped(users.move(at, size), size, of)

        return self._calls.place(make, self.backing)

    def alias(self) -> HostMemory:
        """Another mapping of the same object. Raises EINVAL for anonymous memory."""
        if not self.backing.has_file:
            raise OSError(errno.EINVAL, f"{self.backing.words} cannot be mapped again")
        make = partial(self._users.map_object, self.length, self.backing, self._object)
        return self._calls.place(make, self.backing)

    def close(self) -> None:
        """munmap. Idempotent."""
        if not self._closed:
            self._closed = True
            self._calls.unmap(self.address, self.length)
            if self._object:
                self._calls.unmap(self._object, self.length)

    def _load(self, offset: int, length: int, access: str) -> bytes:
        self._check(offset, length)
        if self._simple and self.mapping.whole:
            try:
                return self._bus.read(self.mapping.pa + offset, length)
            except self._faults as fault:
                raise self._refused(fault, self.mapping.pa, self.address, access) from fault
        parts, at = [], self.address + offset
        for pa, count in self._users.pieces(at, length, write=False):
            try:
                parts.append(self._bus.read(pa, count))
            except self._faults as fault:
                raise self._refused(fault, pa, at, access) from fault
            at += count
        return b"".join(parts)

    def _store(self, offset: int, data: bytes, access: str) -> None:
        self._check(offset, len(data))
        if self._simple and self.mapping.whole:
            try:
                self._bus.write(self.mapping.pa + offset, data)
            except self._faults as fault:
                raise self._refused(fault, self.mapping.pa, self.address, access) from fault
            return
        at, done = self.address + offset, 0
        for pa, count in self._users.pieces(at, len(data), write=True):
            try:
                self._bus.write(pa, data[done : done + count])
            except self._faults as fault:
                raise self._refused(fault, pa, at + done, access) from fault
            done += count

    def _block(self, offset: int, length: int) -> int:
        """The user address of a buffer for O_DIRECT. Raises EINVAL if it is not made of pages."""
        if (offset | length) % PAGE_SIZE:
            raise OSError(errno.EINVAL, "a disk reads and writes whole blocks")
        return self.address + offset

    def _forced_pieces(
        self, offset: int, length: int, way: Forced, *, write: bool = False
    ) -> Iterator[tuple[int, int, int]]:
        """(PA, user address, bytes) of what the kernel finds there, piece by piece. /proc/self/mem
        minds no protection but that of shared memory from being written (FOLL_FORCE). Raises EIO
        by that way, else EFAULT, where nothing is mapped or nobody may look."""
        number = errno.EIO if way is Forced.PROC_MEM else errno.EFAULT
        base = self._object if way is Forced.FILE else self.address
        if not base:
            raise OSError(errno.EBADF, f"{self.backing.words} has no descriptor")
        at, end = base + offset, base + offset + length
        while at < end:
            try:
                mapping = self._users.find(at, 1)
            except OSError as error:
                raise OSError(number, f"{way.value}: nothing is mapped at {at:#x}") from error
            allowed = mapping.writable if write else mapping.readable
            if way is Forced.PROC_MEM and not (write and mapping.backing.shared):
                allowed = True
            if mapping.backing.plain_errno or not allowed:
                raise OSError(number, f"{way.value}: {at:#x} may not be touched")
            stop = min(end, mapping.end)
            yield mapping.pa + at - mapping.address, at, stop - at
            at = stop

    def _forced(self, pa: int, address: int, access: Callable[[int], T]) -> T:
        """`access` at `pa`, as often as it takes to have all pages back."""
        while True:
            try:
                return access(pa)
            except self._faults as fault:
                refused: int = getattr(fault, "ipa", pa)
                self._calls.take(refused, address + refused - pa)

    def _check(self, offset: int, length: int) -> None:
        if self._closed:
            raise ValueError(f"the mapping at {self.address:#x} is closed")
        if offset < 0 or length < 0 or offset + length > self.length:
            raise ValueError(
                f"[{offset:#x}, +{length:#x}) is outside the mapping of {self.length:#x} bytes"
            )

    def _refused(self, fault: Exception, pa: int, address: int, access: str) -> ProtectedPageError:
        """The error for an access to `pa`, at user address `address`, that met `fault`; the fault
        knows the first byte that the host may not touch."""
        ipa: int = getattr(fault, "ipa", pa)
        return ProtectedPageError(address + ipa - pa, access)


def _swapped(access: Callable[[int, U], T], argument: U, pa: int) -> T:
    """`access` with its arguments the other way round."""
    return access(pa, argument)
