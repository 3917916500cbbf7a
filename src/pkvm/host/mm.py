# SPDX-License-Identifier: GPL-2.0-or-later
"""The VMM's address space: anonymous mappings, user copies, and memory as the VMM sees it.

A mapping is one run of physical pages at a user address of its own; addresses
are never used twice and gaps lie between mappings, so that an overrun or a
stale pointer meets nothing. Whatever address an ioctl carries is looked up
here; none is ever dereferenced raw.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Callable

from pkvm.host.pages import PageAllocator, PageRun
from pkvm.host.ports import PAGE_MASK, PAGE_SHIFT, Bus, BusFaults
from pkvm.uapi.errors import ProtectedPageError

USER_BASE = 0x7F00_0000_0000
USER_END = 1 << 48
"""First address that is not a user's (access_ok with 48-bit virtual addresses)."""
_GAP = 1 << 21


class Mapping:
    """An anonymous mapping: `run`'s pages at user address `address`."""

    __slots__ = ("address", "length", "run")

    def __init__(self, address: int, run: PageRun) -> None:
        self.address = address
        self.length = run.length
        self.run = run


class UserSpace:
    """The mappings of the VMM's process. The kernel lock covers changes; lookups may run beside
    them, as each change replaces the tables."""

    def __init__(self, bus: Bus, bus_faults: BusFaults, pages: PageAllocator) -> None:
        self.bus = bus
        self.bus_faults = bus_faults
        self._pages = pages
        self._next = USER_BASE
        self._table: tuple[list[int], list[Mapping]] = ([], [])
        """Start addresses, sorted, and the mappings in the same order."""

    def map(self, length: int) -> Mapping:
        """mmap: `length` bytes, rounded up to pages, zeroed. Raises EINVAL for 0, ENOMEM."""
        if length <= 0:
            raise OSError(errno.EINVAL, f"cannot map {length} bytes")
        npages = (length + PAGE_MASK) >> PAGE_SHIFT
        size = npages << PAGE_SHIFT
        if self._next + size + _GAP > USER_END:
            raise OSError(errno.ENOMEM, f"the address space has no room for {length:#x} bytes")
        mapping = Mapping(self._next, PageRun(self._pages, npages))
        self._next = (self._next + size + 2 * _GAP - 1) // _GAP * _GAP
        starts, mappings = self._table
        self._table = ([*starts, mapping.address], [*mappings, mapping])
        return mapping

    def unmap(self, mapping: Mapping) -> None:
        """munmap. Idempotent. Pages that a VM pins live on."""
        starts, mappings = self._table
        if mapping in mappings:
            index = mappings.index(mapping)
            self._table = (
                starts[:index] + starts[index + 1 :],
                mappings[:index] + mappings[index + 1 :],
            )
            mapping.run.put()

    def mappings(self) -> tuple[Mapping, ...]:
        """All of them, by address."""
        return tuple(self._table[1])

    def find(self, address: int, length: int) -> Mapping:
        """The mapping that holds [address, address+length). Raises EFAULT."""
        starts, mappings = self._table
        index = bisect_right(starts, address) - 1
        if index >= 0:
            mapping = mappings[index]
            if address + length <= mapping.address + mapping.length:
                return mapping
        raise OSError(
            errno.EFAULT, f"address {address:#x} (+{length:#x}) is in no mapping of the VMM's"
        )

    def pa(self, address: int, length: int) -> int:
        """PA of user address `address`; [address, address+length) is contiguous from there.
        Raises EFAULT."""
        mapping = self.find(address, length)
        return mapping.run.pa + address - mapping.address

    def copy_from_user(self, address: int, length: int) -> bytes:
        """Bytes at a user address. Raises EFAULT outside mappings and for a page that the host
        may not read."""
        pa = self.pa(address, length)
        try:
            return self.bus.read(pa, length)
        except self.bus_faults as fault:
            raise OSError(errno.EFAULT, f"copy from user {address:#x}: {fault}") from fault

    def copy_to_user(self, address: int, data: bytes) -> None:
        """Write to a user address. Errors as `copy_from_user`."""
        pa = self.pa(address, len(data))
        try:
            self.bus.write(pa, data)
        except self.bus_faults as fault:
            raise OSError(errno.EFAULT, f"copy to user {address:#x}: {fault}") from fault


class HostMemory:
    """A mapping in the VMM's hands: `pkvm.kvm.kernel.Memory` of the built-in host.

    Loads and stores take the host CPU's way, through its stage-2, and need no system call. `take`
    gets a page at a PA and user address back by force, or raises HostOopsError.
    """

    def __init__(
        self,
        users: UserSpace,
        mapping: Mapping,
        unmap: Callable[[HostMemory], None],
        take: Callable[[int, int], None],
    ) -> None:
        self.mapping = mapping
        self._users = users
        self._unmap = unmap
        self._take = take
        self._pa = mapping.run.pa
        self._bus = users.bus
        self._faults = users.bus_faults
        self._closed = False

    @property
    def address(self) -> int:
        """User address of the first byte."""
        return self.mapping.address

    @property
    def length(self) -> int:
        """Bytes, a multiple of the page size."""
        return self.mapping.length

    def read(self, offset: int, length: int) -> bytes:
        """Load bytes. Raises ValueError outside the mapping, ProtectedPageError."""
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

    def forced_read(self, offset: int, length: int) -> bytes:
        """A load of the kernel's own, which takes what it may not touch by force. Raises ValueError
        outside the mapping, HostOopsError."""
        return self._forced(offset, length, lambda pa: self._bus.read(pa, length))

    def forced_write(self, offset: int, data: bytes) -> None:
        """A store of the kernel's own. Errors as `forced_read`."""

        def store(pa: int) -> bytes:
            self._bus.write(pa, data)
            return b""

        self._forced(offset, len(data), store)

    def close(self) -> None:
        """munmap. Idempotent."""
        if not self._closed:
            self._closed = True
            self._unmap(self)

    def _load(self, offset: int, length: int, access: str) -> bytes:
        self._check(offset, length)
        try:
            return self._bus.read(self._pa + offset, length)
        except self._faults as fault:
            raise self._refused(fault, offset, access) from fault

    def _store(self, offset: int, data: bytes, access: str) -> None:
        self._check(offset, len(data))
        try:
            self._bus.write(self._pa + offset, data)
        except self._faults as fault:
            raise self._refused(fault, offset, access) from fault

    def _forced(self, offset: int, length: int, access: Callable[[int], bytes]) -> bytes:
        """`access` at the PA of `offset`, as often as it takes to have all pages back."""
        self._check(offset, length)
        while True:
            try:
                return access(self._pa + offset)
            except self._faults as fault:
                pa: int = getattr(fault, "ipa", self._pa + offset)
                self._take(pa, self.address + pa - self._pa)

    def _check(self, offset: int, length: int) -> None:
        if self._closed:
            raise ValueError(f"the mapping at {self.address:#x} is closed")
        if offset < 0 or length < 0 or offset + length > self.mapping.length:
            raise ValueError(
                f"[{offset:#x}, +{length:#x}) is outside the mapping of {self.length:#x} bytes"
            )

    def _refused(self, fault: Exception, offset: int, access: str) -> ProtectedPageError:
        """The error for an access at `offset` that met `fault`; the fault knows the first byte
        that the host may not touch."""
        ipa: int = getattr(fault, "ipa", self._pa + offset)
        return ProtectedPageError(self.address + ipa - self._pa, access)
