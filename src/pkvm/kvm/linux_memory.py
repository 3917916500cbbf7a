# SPDX-License-Identifier: GPL-2.0-or-later
"""Mappings at addresses, and system calls on buffers.

Every function raises OSError with Linux's errno. Addresses are user addresses of this process,
lengths are bytes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from pkvm.kvm.libc import call
from pkvm.uapi.memory import HUGE_PAGE, Backing, Change, Forced, SystemCall

_PROT_READ, _PROT_WRITE = 1, 2
_SHARED, _PRIVATE, _FIXED, _ANONYMOUS, _HUGETLB = 0x1, 0x2, 0x10, 0x20, 0x4_0000
_REMAP_MAYMOVE, _REMAP_FIXED = 1, 2
_MFD_CLOEXEC, _MFD_HUGETLB = 1, 4
_MADV_DONTFORK, _MADV_HUGEPAGE = 10, 14
_ADVICE = {
    Change.DONTNEED: 4,
    Change.FREE: 8,
    Change.REMOVE: 9,
    Change.DOFORK: 11,
    Change.COLD: 20,
    Change.PAGEOUT: 21,
    Change.POPULATE: 23,
}
_PROTECTION = {
    Change.NO_ACCESS: 0,
    Change.READ_ONLY: _PROT_READ,
    Change.READ_WRITE: _PROT_READ | _PROT_WRITE,
}
_MEMFD_SECRET = 447
"""memfd_secret(2), of which the C library knows nothing; the number is the same everywhere."""
_DISK_FILESYSTEMS = frozenset({0xEF53, 0x58465342, 0x9123683E, 0xF2F52010})
"""f_type of ext4, xfs, btrfs and f2fs: a file there is written back."""
_STATFS_BYTES = 256
"""More than a struct statfs has, of which f_type is the first word."""
_PLACES = threading.Lock()
_next_place, _LAST_PLACE = 1 << 36, 1 << 45
"""Far from where the kernel puts mappings, which is from the top down, and from programs."""
_CAPABILITY_VERSION_3 = 0x2008_0522
_CAP_IPC_LOCK = 14


def view(address: int, length: int) -> memoryview:
    """The bytes at `address`, for a system call: Python itself must not touch them."""
    return memoryview((ctypes.c_char * length).from_address(address)).cast("B")


def map_backing(backing: Backing, length: int) -> tuple[int, int, int]:
    """A new mapping of at least `length` bytes: (address, length, descriptor of its object or
    -1)."""
    length = -(-length // backing.page) * backing.page
    if backing is Backing.HUGE:
        return _map_aligned(length), length, -1
    fd = _object(backing, length)
    try:
        return map_object(backing, length, fd), length, fd
    except OSError:
        if fd >= 0:
            os.close(fd)
        raise


def map_object(backing: Backing, length: int, fd: int) -> int:
    """Map an object (-1: anonymous memory) as `backing` says: the address."""
    flags = _SHARED if backing.shared else _PRIVATE
    if fd < 0:
        flags |= _ANONYMOUS
        flags |= _HUGETLB if backing.page == HUGE_PAGE else 0
    return call("mmap", _place(length), length, _PROT_READ | _PROT_WRITE, flags, fd, 0)


def _map_aligned(length: int) -> int:
    """Anonymous memory that transparent huge pages fit into."""
    address = call(
        "mmap", _place(length), length, _PROT_READ | _PROT_WRITE, _PRIVATE | _ANONYMOUS, -1, 0
    )
    call("madvise", address, length, _MADV_HUGEPAGE)
    return address


def _place(length: int) -> int:
    """An address for a mapping, a multiple of huge pages. None is used twice, and the kernel puts
    nothing of its own choice there: where something was unmapped that a guest's slot still names,
    nothing must ever be but what is put there on purpose. 0, the kernel's choice, for what cannot
    fit."""
    global _next_place
    with _PLACES:
        address = _next_place
        end = address + -(-length // HUGE_PAGE) * HUGE_PAGE + HUGE_PAGE
        if end > _LAST_PLACE:
            return 0
        _next_place = end
    return address


def _object(backing: Backing, length: int) -> int:
    """The object that such a mapping is of; -1 for anonymous memory."""
    match backing:
        case Backing.MEMFD | Backing.MEMFD_PRIVATE:
            fd = os.memfd_create("guest", _MFD_CLOEXEC)
        case Backing.HUGETLB_MEMFD:
            fd = os.memfd_create("guest", _MFD_CLOEXEC | _MFD_HUGETLB)
        case Backing.TMPFS | Backing.TMPFS_PRIVATE:
            fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC)
        case Backing.FILE | Backing.FILE_PRIVATE:
            fd = _disk_file()
        case Backing.SECRET:
            fd = call("syscall", _MEMFD_SECRET, 0)
        case Backing.ZERO:
            return os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC)
        case _:
            return -1
    os.ftruncate(fd, length)
    return fd


def _disk_file() -> int:
    """A nameless file in TMPDIR, by default /tmp. Raises ENODEV where that folder's file
    system is one in memory."""
    folder = os.environ.get("TMPDIR", "/tmp")
    answer = ctypes.create_string_buffer(_STATFS_BYTES)
    call("statfs", ctypes.create_string_buffer(folder.encode()), answer)
    if int.from_bytes(answer.raw[:8], "little") not in _DISK_FILESYSTEMS:
        raise OSError(
            errno.ENODEV, f"{folder} is on no disk: name a folder on one, TMPDIR=/var/tmp"
        )
    return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC)


def change(what: Change, address: int, length: int) -> None:
    """Do `what` to the pages of [address, address+length)."""
    if what is Change.UNMAP:
        call("munmap", address, length)
    elif what is Change.REPLACE:
        prot, flags = _PROT_READ | _PROT_WRITE, _PRIVATE | _ANONYMOUS | _FIXED
        call("mmap", address, length, prot, flags, -1, 0)
    elif what is Change.LOCK:
        call("mlock", address, length)
    elif what in _PROTECTION:
        call("mprotect", address, length, _PROTECTION[what])
    else:
        call("madvise", address, length, _ADVICE[what])


def move(address: int, length: int) -> int:
    """mremap to another place: the new address."""
    target = call("mmap", _place(length), length, 0, _PRIVATE | _ANONYMOUS, -1, 0)
    return call("mremap", address, length, length, _REMAP_MAYMOVE | _REMAP_FIXED, target)


def mapped(address: int) -> str:
    """How the page at `address` is mapped, such as "rw-p", by /proc/self/maps; "" if it is not."""
    for line in Path("/proc/self/maps").read_text(encoding="ascii").splitlines():
        start, _, end = line.split(" ", 1)[0].partition("-")
        if int(start, 16) <= address < int(end, 16):
            return line.split(" ")[1]
    return ""


def forced_read(way: Forced, address: int, length: int, fd: int, offset: int) -> bytes:
    """Have the kernel read a part of this process's memory; by way of FILE, of the object `fd` at
    `offset`. /proc/self/mem is another's (`DevMemory.forced_read`)."""
    if way is Forced.FILE:
        return os.pread(fd, length, offset)
    if way is Forced.PROCESS_VM:
        target = ctypes.create_string_buffer(length)
        local, remote = _iovec(ctypes.addressof(target), length), _iovec(address, length)
        _whole(call("process_vm_readv", os.getpid(), local, 1, remote, 1, 0), length)
        return target.raw
    if way is Forced.DEVICE:
        with _direct() as (plain, direct):
            count = os.pwrite(direct, view(address, length), 0)
            return os.pread(plain, count, 0)
    with _pipe() as (reader, writer):
        _whole(call("vmsplice", writer, _iovec(address, length), 1, 0), length)
        return os.read(reader, length)


def forced_write(way: Forced, address: int, data: bytes, fd: int, offset: int) -> None:
    """Have the kernel write into this process's memory. As `forced_read`; raises EINVAL by way of
    vmsplice, which only reads."""
    if way is Forced.FILE:
        os.pwrite(fd, data, offset)
    elif way is Forced.DEVICE:
        with _direct() as (plain, direct):
            os.pwrite(plain, data, 0)
            os.fsync(plain)
            os.preadv(direct, [view(address, len(data))], 0)
    elif way is Forced.PROCESS_VM:
        source = ctypes.create_string_buffer(data, len(data))
        local, remote = _iovec(ctypes.addressof(source), len(data)), _iovec(address, len(data))
        _whole(call("process_vm_writev", os.getpid(), local, 1, remote, 1, 0), len(data))
    else:
        raise OSError(errno.EINVAL, "vmsplice only reads")


@contextmanager
def _direct() -> Iterator[tuple[int, int]]:
    """A file on a disk, twice: as any file, and past the page cache, so that the disk itself reads
    and writes the buffers (O_DIRECT). Raises ENODEV as `_disk_file`."""
    plain = _disk_file()
    try:
        direct = os.open(f"/proc/self/fd/{plain}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        try:
            yield plain, direct
        finally:
            os.close(direct)
    finally:
        os.close(plain)


def _whole(count: int, length: int) -> None:
    """Raise EFAULT if a part could not be reached, which the kernel says by a smaller count."""
    if count < length:
        raise OSError(errno.EFAULT, f"{count} of {length} bytes could be reached")


def _iovec(address: int, length: int) -> ctypes.Array[ctypes.c_char]:
    """A struct iovec."""
    packed = address.to_bytes(8, "little") + length.to_bytes(8, "little")
    return ctypes.create_string_buffer(packed, len(packed))


@contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    try:
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


def system_call(what: SystemCall, address: int, length: int) -> int:
    """Make a system call on the buffer [address, address+length): what it returned."""
    return _READERS[what](address, length) if what in _READERS else _WRITERS[what](address, length)


def _write(address: int, length: int) -> int:
    with _pipe() as (_, writer):
        return os.write(writer, view(address, length))


def _writev(address: int, length: int) -> int:
    with _pipe() as (_, writer):
        return os.writev(writer, [view(address, length)])


def _send(address: int, length: int) -> int:
    one, other = socket.socketpair()
    with one, other:
        return one.send(view(address, length))


def _pwrite(address: int, length: int) -> int:
    with _memfd(length) as fd:
        return os.pwrite(fd, view(address, length), 0)


def _open(address: int, length: int) -> int:
    os.close(call("open", address, os.O_RDONLY))
    return 0


def _nanosleep(address: int, length: int) -> int:
    return call("nanosleep", address, 0)


def _read(address: int, length: int) -> int:
    with _pipe() as (reader, writer):
        os.write(writer, bytes(length))
        return call("read", reader, address, length)


def _readv(address: int, length: int) -> int:
    with _pipe() as (reader, writer):
        os.write(writer, bytes(length))
        return os.readv(reader, [view(address, length)])


def _recv(address: int, length: int) -> int:
    one, other = socket.socketpair()
    with one, other:
        one.send(bytes(length))
        return other.recv_into(view(address, length))


def _pread(address: int, length: int) -> int:
    with _memfd(length) as fd:
        return os.preadv(fd, [view(address, length)], 0)


def _urandom(address: int, length: int) -> int:
    with Path("/dev/urandom").open("rb", buffering=0) as device:
        return os.readv(device.fileno(), [view(address, length)])


@contextmanager
def _memfd(length: int) -> Iterator[int]:
    fd = os.memfd_create("buffer", _MFD_CLOEXEC)
    try:
        os.ftruncate(fd, length)
        yield fd
    finally:
        os.close(fd)


_READERS: dict[SystemCall, Callable[[int, int], int]] = {
    SystemCall.WRITE: _write,
    SystemCall.WRITEV: _writev,
    SystemCall.SEND: _send,
    SystemCall.PWRITE: _pwrite,
    SystemCall.OPEN: _open,
    SystemCall.NANOSLEEP: _nanosleep,
}
"""The system calls that read the buffer."""
_WRITERS: dict[SystemCall, Callable[[int, int], int]] = {
    SystemCall.READ: _read,
    SystemCall.READV: _readv,
    SystemCall.RECV: _recv,
    SystemCall.PREAD: _pread,
    SystemCall.URANDOM: _urandom,
    SystemCall.UNAME: lambda address, length: call("uname", address),
}
"""The system calls that write into it."""


def fork() -> None:
    """Copy this process, let the copy end at once, and wait for that."""
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)


def limit_memlock(limit: int | None) -> None:
    """Set RLIMIT_MEMLOCK (None: as it was at first) and obey it: CAP_IPC_LOCK, with which no limit
    counts, is put aside meanwhile."""
    soft, hard = _first_memlock()
    if limit is not None:
        soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))
    header = ctypes.create_string_buffer(_CAPABILITY_VERSION_3.to_bytes(4, "little") + bytes(4), 8)
    sets = ctypes.create_string_buffer(24)
    call("capget", header, sets)
    effective, permitted = (int.from_bytes(sets.raw[at : at + 4], "little") for at in (0, 4))
    bit = permitted & 1 << _CAP_IPC_LOCK
    effective = effective & ~bit if limit is not None else effective | bit
    wanted = effective.to_bytes(4, "little") + sets.raw[4:]
    call("capset", header, ctypes.create_string_buffer(wanted, len(wanted)))


@cache
def _first_memlock() -> tuple[int, int]:
    return resource.getrlimit(resource.RLIMIT_MEMLOCK)


def dont_fork(address: int, length: int) -> None:
    """MADV_DONTFORK: children do not get it."""
    call("madvise", address, length, _MADV_DONTFORK)
