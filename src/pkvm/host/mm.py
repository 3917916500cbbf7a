# SPDX-License-Identifier: GPL-2.0-or-later
"""The VMM's address space: mappings, what becomes of them, and user copies.

A mapping is a part of one run of physical pages at a user address of its own;
addresses are never used twice and gaps lie between mappings, so that an overrun
or a stale pointer meets nothing. Whatever address an ioctl carries is looked up
here; none is ever dereferenced raw. All pages are there from the start: nobody
can tell that from pages that come when they are touched.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

from pkvm.host.pages import PageAllocator, PageRun, Place
from pkvm.host.ports import PAGE_MASK, PAGE_SHIFT, Bus, BusFaults
from pkvm.uapi.memory import Backing, Change

USER_BASE = 0x7F00_0000_0000
USER_END = 1 << 48
"""First address that is not a user's (access_ok with 48-bit virtual addresses)."""
_GAP = 1 << 21
_RIGHTS = {
    Change.NO_ACCESS: (False, False),
    Change.READ_ONLY: (True, False),
    Change.READ_WRITE: (True, True),
}
"""May be read, may be written."""
_ANONYMOUS = frozenset({Backing.ANONYMOUS, Backing.HUGE, Backing.ZERO})


class Mapping:
    """Bytes [offset, offset + length) of `run` at user address `address`: a VMA."""

    __slots__ = (
        "address", "backing", "hold", "length", "locked", "offset", "readable", "run",
        "to_children", "whole", "writable",
    )  # fmt: skip

    def __init__(
        self, address: int, run: PageRun, backing: Backing = Backing.ANONYMOUS, offset: int = 0,
        length: int | None = None,
    ) -> None:  # fmt: skip
        self.address = address
        self.run = run
        self.backing = backing
        self.offset = offset
        self.length = run.length - offset if length is None else length
        self.hold = run.hold((offset >> PAGE_SHIFT, self.length >> PAGE_SHIFT))
        self.readable = self.writable = self.whole = True
        """`whole`: it is as it was made, and where, and may be read and written."""
        self.locked = backing is Backing.SECRET
        self.to_children = False

    @property
    def pa(self) -> int:
        """PA of its first byte."""
        return self.run.pa + self.offset

    @property
    def end(self) -> int:
        """First user address after it."""
        return self.address + self.length

    def move_to(self, run: PageRun, offset: int) -> None:
        """Map other pages in place of its own."""
        self.run.release(self.hold)
        self.run, self.offset = run, offset
        self.hold = run.hold((offset >> PAGE_SHIFT, self.length >> PAGE_SHIFT))

    def part(self, start: int, end: int, address: int) -> Mapping:
        """The same pages as those at user addresses [start, end), at `address`."""
        made = Mapping(
            address, self.run, self.backing, self.offset + start - self.address, end - start
        )
        made.readable, made.writable = self.readable, self.writable
        made.whole = self.readable and self.writable
        made.locked, made.to_children = self.locked, self.to_children
        return made


class Mapped(NamedTuple):
    """What a system call mapped."""

    address: int
    length: int
    object: int = 0
    """Where the object itself is mapped, if it has a descriptor: for the kernel's eyes only."""


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
        self.on_change: Callable[[int, int], None] = lambda address, length: None
        """Called before pages at [address, address + length) go or change their rights: the MMU
        notifier."""

    def map(self, length: int, backing: Backing = Backing.ANONYMOUS) -> Mapping:
        """mmap: `length` bytes, rounded up to pages, zeroed. Raises EINVAL for 0, ENOMEM."""
        if length <= 0:
            raise OSError(errno.EINVAL, f"cannot map {length} bytes")
        npages = -(-length // backing.page) * backing.page >> PAGE_SHIFT
        address = self._reserve(npages << PAGE_SHIFT)
        mapping = Mapping(address, PageRun(self._pages, npages), backing)
        self._put([], [mapping])
        return mapping

    def unmap(self, address: int, length: int) -> None:
        """munmap: whatever is mapped there. Pages that a VM pins live on."""
        inside = self._cut(address, address + length)
        self._changing(inside)
        self._put(inside, [])
        for mapping in inside:
            mapping.run.release(mapping.hold)

    def change(self, what: Change, address: int, length: int) -> None:
        """munmap, mprotect, madvise, ... of [address, address+length). Raises EINVAL for what does
        not go with the mapping, ENOMEM where nothing is mapped."""
        length = (length + PAGE_MASK) & ~PAGE_MASK
        for mapping in self._overlapping(address, address + length):
            if (address | length) % mapping.backing.page:
                self._change_part(what, mapping, address, length)
                return
        inside = self._cut(address, address + length)
        if what is Change.UNMAP:
            self.unmap(address, length)
        elif what is Change.REPLACE:
            fresh = Mapping(address, PageRun(self._pages, length >> PAGE_SHIFT))
            fresh.whole = False
            self.unmap(address, length)
            self._put([], [fresh])
        else:
            self._change_all(what, inside, address, length)

    def move(self, address: int, length: int) -> int:
        """mremap to a new address, which is returned. Raises EFAULT where nothing
        is mapped."""
        inside = self._cut(address, address + length)
        if sum(mapping.length for mapping in inside) < length:
            raise OSError(errno.EFAULT, "mremap: nothing is mapped in a part of that")
        self._changing(inside)
        target = self._copy(inside, address, length)
        self._put(inside, [])
        for mapping in inside:
            mapping.run.release(mapping.hold)
        return target

    def map_object(self, length: int, backing: Backing, of: int = 0) -> Mapped:
        """mmap of an object with a descriptor: a new one, or the one of `Mapped.object`. The object
        itself is a mapping, at an address that nobody is told. Raises as `map`."""
        first = of or self.map(length, backing).address
        length = -(-length // backing.page) * backing.page
        if of:
            of = self.alias(of, length)
        if backing.shared:
            return Mapped(self.alias(first, length), length, of or first)
        copy = self.map(length, backing).address
        self.copy_to_user(copy, self.copy_from_user(first, length))
        return Mapped(copy, length, of or first)

    def alias(self, address: int, length: int) -> int:
        """Map what is behind [address, address+length) at another address, which is returned."""
        return self._copy(self._overlapping(address, address + length), address, length)

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

    def place(self, address: int, npages: int) -> Place:
        """The `npages` pages at a page-aligned user address, contiguous. Raises EFAULT."""
        mapping = self.find(address, npages << PAGE_SHIFT)
        first = mapping.offset + address - mapping.address >> PAGE_SHIFT
        return Place(mapping.run, first, npages)

    def pinned(self, address: int, length: int, *, protected: bool) -> Mapping:
        """The mapping of what KVM takes for a guest to read and write (pin_user_pages). Raises
        EFAULT where nothing writable is mapped, and the errno of memory that cannot be pinned."""
        mapping = self.find(address, length)
        if not mapping.writable:
            raise OSError(errno.EFAULT, f"the VMM may not write to {address:#x}")
        backing = mapping.backing
        number = backing.protected_errno if protected else backing.plain_errno
        if number:
            raise OSError(number, f"{backing.words} is no memory for such a guest: {address:#x}")
        return mapping

    def pa(self, address: int, length: int) -> int:
        """PA of user address `address`; [address, address+length) is contiguous from there.
        Raises EFAULT."""
        mapping = self.find(address, length)
        return mapping.pa + address - mapping.address

    def pieces(self, address: int, length: int, *, write: bool) -> Iterator[tuple[int, int]]:
        """(PA, bytes) of [address, address+length), piece by piece. Raises EFAULT at the first that
        is not mapped, or not for that access."""
        end = address + length
        while address < end:
            mapping = self.find(address, 1)
            if not (mapping.writable if write else mapping.readable):
                verb = "write to" if write else "read"
                raise OSError(errno.EFAULT, f"the VMM may not {verb} {address:#x}")
            stop = min(end, mapping.end)
            yield mapping.pa + address - mapping.address, stop - address
            address = stop

    def copy_from_user(self, address: int, length: int) -> bytes:
        """Bytes at a user address. Raises EFAULT outside mappings and for a page that the host
        may not read."""
        read = self.bus.read
        try:
            parts = self.pieces(address, length, write=False)
            return b"".join([read(pa, count) for pa, count in parts])
        except self.bus_faults as fault:
            raise OSError(errno.EFAULT, f"copy from user {address:#x}: {fault}") from fault

    def copy_to_user(self, address: int, data: bytes) -> None:
        """Write to a user address. Errors as `copy_from_user`."""
        done = 0
        try:
            for pa, count in self.pieces(address, len(data), write=True):
                self.bus.write(pa, data[done : done + count])
                done += count
        except self.bus_faults as fault:
            raise OSError(errno.EFAULT, f"copy to user {address:#x}: {fault}") from fault

    def _change_all(self, what: Change, inside: list[Mapping], start: int, length: int) -> None:
        """mprotect, mlock or madvise of what is mapped, in order. At a hole madvise goes on, the
        others stop; both raise ENOMEM."""
        hole = OSError(errno.ENOMEM, f"{what.value}: nothing is mapped in a part of that")
        stops = what in _RIGHTS or what in (Change.LOCK, Change.POPULATE)
        for mapping in inside:
            if stops and mapping.address != start:
                raise hole
            start = mapping.end if stops else start
            self._changing([mapping])
            self._change_one(what, mapping)
        if sum(mapping.length for mapping in inside) < length:
            raise hole

    def _change_part(self, what: Change, mapping: Mapping, address: int, length: int) -> None:
        """A change of a part of a huge page (hugetlb). Raises EINVAL for most."""
        backing = mapping.backing
        if what in (Change.POPULATE, Change.LOCK):
            return
        if address % backing.page == 0:
            if what is Change.READ_WRITE and mapping.writable:
                return
            if what is Change.DONTNEED:
                return  # the pages that are wholly inside: none
            if what is Change.REMOVE and backing.shared:
                self.copy_to_user(address, bytes(length))
                return
            if what is Change.REMOVE:
                raise OSError(errno.EACCES, "the mapping is private")
        why = f"{address:#x} (+{length:#x}) are no whole pages of {backing.words}"
        raise OSError(errno.EINVAL, f"{what.value}: {why}")

    def _change_one(self, what: Change, mapping: Mapping) -> None:
        """mprotect, mlock or madvise of a whole mapping (madvise(2)). Raises EINVAL, EACCES."""
        backing = mapping.backing
        invalid = OSError(errno.EINVAL, f"{what.value} does not go with {backing.words}")
        if what in _RIGHTS:
            mapping.readable, mapping.writable = _RIGHTS[what]
        elif what is Change.LOCK:
            if backing.plain_errno:
                raise OSError(errno.ENOMEM, f"mlock: {backing.words} cannot be made present")
            mapping.locked = True
        elif what is Change.DOFORK:
            mapping.to_children = True
        elif what is Change.POPULATE:
            if not mapping.writable or backing.plain_errno:
                raise invalid
        elif mapping.locked:
            raise invalid
        elif what is Change.REMOVE:
            self._punch(mapping, invalid)
        elif what is Change.DONTNEED:
            if not backing.shared:
                self._renew(mapping)
        elif what is Change.FREE:
            if backing not in _ANONYMOUS:
                raise invalid
        elif backing.page != 1 << PAGE_SHIFT:
            raise invalid

    def _punch(self, mapping: Mapping, invalid: OSError) -> None:
        """MADV_REMOVE: the object loses these pages, in every mapping of it."""
        if not mapping.backing.shared:
            if mapping.backing not in (Backing.ANONYMOUS, Backing.HUGE):
                raise OSError(errno.EACCES, "the mapping is private")
            raise invalid
        run, start, end = mapping.run, mapping.offset, mapping.offset + mapping.length
        fresh = PageRun(self._pages, mapping.length >> PAGE_SHIFT)
        for other in self.mappings():
            low, high = max(other.offset, start), min(other.offset + other.length, end)
            if other.run is not run or low >= high:
                continue
            base = other.address - other.offset
            for part in self._cut(base + low, base + high):
                part.move_to(fresh, low - start)

    def _renew(self, mapping: Mapping) -> None:
        """Put new, zeroed pages into a private mapping."""
        fresh = PageRun(self._pages, mapping.length >> PAGE_SHIFT)
        mapping.move_to(fresh, 0)

    def _changing(self, mappings: list[Mapping]) -> None:
        for mapping in mappings:
            mapping.whole = False
            self.on_change(mapping.address, mapping.length)

    def _copy(self, inside: list[Mapping], address: int, length: int) -> int:
        """Map the pages of `inside` at a new address as they are at `address`."""
        target = self._reserve(length)
        made = []
        for one in inside:
            start, end = max(one.address, address), min(one.end, address + length)
            made.append(one.part(start, end, target + start - address))
        self._put([], made)
        return target

    def _reserve(self, size: int) -> int:
        """A user address with room for `size` bytes. Raises ENOMEM."""
        if self._next + size + _GAP > USER_END:
            raise OSError(errno.ENOMEM, f"the address space has no room for {size:#x} bytes")
        address = self._next
        self._next = (address + size + 2 * _GAP - 1) // _GAP * _GAP
        return address

    def _overlapping(self, start: int, end: int) -> list[Mapping]:
        """The mappings of which a part is in [start, end)."""
        return [one for one in self._table[1] if one.address < end and one.end > start]

    def _cut(self, start: int, end: int) -> list[Mapping]:
        """The mappings in [start, end), those at its ends cut there."""
        inside, gone, made = [], [], []
        for one in self._overlapping(start, end):
            if one.address >= start and one.end <= end:
                inside.append(one)
                continue
            gone.append(one)
            cuts = sorted({one.address, max(start, one.address), min(end, one.end), one.end})
            for low, high in pairwise(cuts):
                part = one.part(low, high, low)
                part.whole = False
                made.append(part)
                if low >= start and high <= end:
                    inside.append(part)
        if gone:
            self._put(gone, made)
            for one in gone:
                one.whole = False
                one.run.release(one.hold)
        return inside

    def _put(self, gone: list[Mapping], made: list[Mapping]) -> None:
        """Replace mappings in the tables."""
        kept = [one for one in self._table[1] if one not in gone]
        mappings = sorted([*kept, *made], key=lambda one: one.address)
        self._table = ([one.address for one in mappings], mappings)
