# SPDX-License-Identifier: GPL-2.0-or-later
"""What memory a VMM can give to a guest, and what it can do to it meanwhile (mmap(2), madvise(2)).

The words are those of Linux; both kernels behind the seam know all of them. What a guest may be
made of is data of `Backing`: KVM pins a protected guest's page for good and for writing
(pin_user_pages with FOLL_LONGTERM and FOLL_WRITE), which some memory does not allow.

Standard library only.
"""

from __future__ import annotations

import errno
from enum import Enum

PAGE_SIZE = 4096
HUGE_PAGE = 2 << 20
"""Bytes of a huge page, with 4 KiB base pages."""


class Backing(Enum):
    """What is mapped: (words, whether the mapping is MAP_SHARED, bytes of its pages, the errno of
    pinning a page for a protected guest, the same for a non-protected one)."""

    ANONYMOUS = ("anonymous", False, PAGE_SIZE, 0, 0)
    SHARED = ("shared anonymous", True, PAGE_SIZE, 0, 0)
    ZERO = ("private mapping of /dev/zero", False, PAGE_SIZE, 0, 0)
    HUGE = ("anonymous, transparent huge pages", False, PAGE_SIZE, 0, 0)
    MEMFD = ("memfd", True, PAGE_SIZE, 0, 0)
    MEMFD_PRIVATE = ("private mapping of a memfd", False, PAGE_SIZE, 0, 0)
    TMPFS = ("file on tmpfs", True, PAGE_SIZE, 0, 0)
    TMPFS_PRIVATE = ("private mapping of a file on tmpfs", False, PAGE_SIZE, 0, 0)
    HUGETLB = ("hugetlb", False, HUGE_PAGE, errno.EIO, 0)
    HUGETLB_SHARED = ("shared hugetlb", True, HUGE_PAGE, errno.EIO, 0)
    HUGETLB_MEMFD = ("memfd of hugetlb", True, HUGE_PAGE, errno.EIO, 0)
    FILE = ("file", True, PAGE_SIZE, errno.EFAULT, 0)
    """On a file system that writes back: what it writes must not change under it."""
    FILE_PRIVATE = ("private mapping of a file", False, PAGE_SIZE, 0, 0)
    SECRET = ("memfd_secret", True, PAGE_SIZE, errno.EFAULT, errno.EFAULT)
    """Gone from the kernel's own map: nobody may pin it."""

    def __init__(
        self, words: str, shared: bool, page: int, protected_errno: int, plain_errno: int
    ) -> None:
        self.words = words
        self.shared = shared
        """Whether other mappings of the same object see what is stored."""
        self.page = page
        self.protected_errno = protected_errno
        """0, or what KVM_RUN of a protected VM fails with at the guest's first touch."""
        self.plain_errno = plain_errno

    @property
    def has_file(self) -> bool:
        """Whether the object has a descriptor of its own, to be read and mapped again."""
        return self in _FILES


_FILES = frozenset(
    {
        Backing.MEMFD,
        Backing.MEMFD_PRIVATE,
        Backing.TMPFS,
        Backing.TMPFS_PRIVATE,
        Backing.HUGETLB_MEMFD,
        Backing.FILE,
        Backing.FILE_PRIVATE,
    }
)


class Change(Enum):
    """What can be done to a part of a mapping; the words are the call's."""

    UNMAP = "munmap"
    REPLACE = "mmap MAP_FIXED"
    """A new anonymous mapping in its place."""
    NO_ACCESS = "mprotect PROT_NONE"
    READ_ONLY = "mprotect PROT_READ"
    READ_WRITE = "mprotect PROT_READ|PROT_WRITE"
    DONTNEED = "madvise MADV_DONTNEED"
    FREE = "madvise MADV_FREE"
    REMOVE = "madvise MADV_REMOVE"
    DOFORK = "madvise MADV_DOFORK"
    """Memory made through the seam is not given to children (MADV_DONTFORK) until then."""
    COLD = "madvise MADV_COLD"
    PAGEOUT = "madvise MADV_PAGEOUT"
    POPULATE = "madvise MADV_POPULATE_WRITE"
    LOCK = "mlock"


class SystemCall(Enum):
    """How a system call can use a buffer: (words, whether it writes into the buffer, whether it
    returns with a part done where the rest cannot be reached)."""

    WRITE = ("write to a pipe", False, False)
    WRITEV = ("writev to a pipe", False, False)
    SEND = ("send to a socket", False, False)
    PWRITE = ("pwrite to a memfd", False, True)
    OPEN = ("open of that path", False, False)
    NANOSLEEP = ("nanosleep", False, False)
    READ = ("read from a pipe", True, False)
    READV = ("readv from a pipe", True, False)
    RECV = ("recv from a socket", True, False)
    PREAD = ("pread from a memfd", True, True)
    URANDOM = ("read from /dev/urandom", True, True)
    UNAME = ("uname", True, False)

    def __init__(self, words: str, writes: bool, partial: bool) -> None:
        self.words = words
        self.writes = writes
        self.partial = partial


class Forced(Enum):
    """How the kernel comes to touch a page for itself, without a fix-up for what it may not."""

    PROC_MEM = "/proc/self/mem"
    PROCESS_VM = "process_vm_readv"
    VMSPLICE = "vmsplice"
    FILE = "read of the object behind the mapping"
    DEVICE = "a disk's DMA (O_DIRECT)"
    """Not the kernel's own access, but that of a device which it lets at the page, whole pages."""
