# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's attempts on a guest's memory: what a hostile VMM would try, tried in earnest.

On a page that the guest has not shared, each of six ways in is tried: a load
and a store by user space, a system call that reads and one that writes the
buffer, and DMA from and to it. All must be refused. On a page that the guest
shared, all must be allowed, and whoever reads must see what the guest says it
wrote. An attempt to write puts back the bytes that a read found; where no read
gets through there is nothing to put back, and nothing that a write should
reach.
"""

from __future__ import annotations

import errno
import random
import zlib
from collections.abc import Callable, Container, Iterable
from typing import NamedTuple

from pkvm.kvm import Kernel, Memory
from pkvm.uapi.errors import ProtectedPageError
from pkvm.uapi.kvm import DmaCopy
from pkvm.vmm import board
from pkvm.vmm.board import PAGE_SIZE
from pkvm.vmm.sharing import SharedRange
from pkvm.vmm.vmm import Moment, Vmm

SAMPLE_PAGES = 64
SEGMENT_PAGES = 256
"""A kernel has ten thousand pages, and six attempts on each would outlast its boot."""
WORD = 8
"""Bytes of an attempt on a private page."""
PATTERN = b"intruder"
MAX_EXAMPLES = 8

KINDS = {
    "load": "load",
    "store": "store",
    "syscall_read": "system call reading the buffer",
    "syscall_write": "system call writing the buffer",
    "dma_read": "DMA from it",
    "dma_write": "DMA to it",
}
"""The six ways in, and their names for people."""


class Page(NamedTuple):
    """A page of guest memory as both sides see it."""

    ipa: int
    memory: Memory
    offset: int
    """Its first byte in `memory`."""


class Tally:
    """Attempts of one kind."""

    def __init__(self) -> None:
        self.tried = 0
        self.refused = 0
        self.words = ""
        """The first refusal, as the kernel put it."""


class Dma:
    """The machine's copy engine, as its driver offers it to user space."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._fd = kernel.open("/dev/dma-copy")
        self._buffer = kernel.mmap(PAGE_SIZE)

    def read(self, memory: Memory, offset: int, length: int) -> bytes:
        """Copy out of `memory` by DMA; at most a page. Raises OSError (EIO) if it is stopped."""
        self._copy(memory.address + offset, self._buffer.address, length)
        return self._buffer.read(0, length)

    def write(self, memory: Memory, offset: int, data: bytes) -> None:
        """Copy `data` into `memory` by DMA; at most a page. Errors as `read`."""
        self._buffer.write(0, data)
        self._copy(self._buffer.address, memory.address + offset, len(data))

    def close(self) -> None:
        """Give the buffer back and close the device."""
        self._buffer.close()
        self._kernel.close(self._fd)

    def _copy(self, source: int, target: int, length: int) -> None:
        args = bytearray(DmaCopy.ARGS.pack(source, target, length))
        self._kernel.ioctl(self._fd, DmaCopy.COPY, args)


class Ways:
    """The ways into guest memory that this kernel has, by kind."""

    def __init__(self, kernel: Kernel) -> None:
        self.readers: dict[str, Callable[[Memory, int, int], bytes]] = {
            "load": lambda memory, at, length: memory.read(at, length),
            "syscall_read": lambda memory, at, length: memory.syscall_read(at, length),
        }
        self.writers: dict[str, Callable[[Memory, int, bytes], None]] = {
            "store": lambda memory, at, data: memory.write(at, data),
            "syscall_write": lambda memory, at, data: memory.syscall_write(at, data),
        }
        self.missing = ""
        """Why a way is missing, in words."""
        self._dma: Dma | None = None
        try:
            self._dma = Dma(kernel)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
            self.missing = "DMA was not tried: this machine has no copy engine"
        else:
            self.readers["dma_read"] = self._dma.read
            self.writers["dma_write"] = self._dma.write

    def close(self) -> None:
        """Close the copy engine."""
        if self._dma is not None:
            self._dma.close()


class Probes:
    """Attempts on the memory of a `Vmm`'s guest, and what became of them.

    `attempt` is an observer for `Vmm`. The pages are those that hold the image (of a long segment
    `SEGMENT_PAGES` of them, drawn with `seed`), the firmware, the device tree and shared memory,
    and `SAMPLE_PAGES` more over all slots, drawn likewise; or `everything`. When the guest takes
    memory back, it is that memory only.

    A guest may share memory that it announces to nobody, as Linux does for its devices: `account`
    gives the IPAs of the pages that are shared now, for those who can know. Where a guest gets its
    memory at the first touch, what it has not touched is the host's, and nothing is tried on it;
    `private` gives the IPAs of the others.

    Who cannot know, as on a real kernel, goes by what a load finds: a page that still holds what
    the VMM put there, and is not where the guest started, was not touched; one of the bounce pool
    is shared.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        everything: bool = False,
        account: Callable[[], Container[int]] | None = None,
        private: Callable[[], Container[int]] | None = None,
    ) -> None:
        self._random = random.Random(seed)
        self._everything = everything
        self._account = account
        self._private = private
        self.private = {kind: Tally() for kind in KINDS}
        """Attempts on pages that the guest has not shared: each should be refused."""
        self.shared = {kind: Tally() for kind in KINDS}
        """Attempts on shared pages: none should be refused."""
        self.got_through: list[str] = []
        """Attempts on private pages that were not refused, in words; the first 8."""
        self.shared_trouble: list[str] = []
        """Shared pages that the host could not use or saw differently, in words; the first 8."""
        self.not_tried = ""
        """What was not tried and why, if anything."""
        self.pages = 0
        """Pages looked at, all moments together."""
        self.untouched = 0
        """Pages among those that are the host's still, since the guest never touched them."""
        self.moments: list[str] = []
        """The moments at which attempts were made."""

    @property
    def guesses(self) -> bool:
        """Whether what the guest never touched is known by its content alone."""
        return self._private is None

    @property
    def tried(self) -> int:
        """Attempts on private pages."""
        return sum(tally.tried for tally in self.private.values())

    @property
    def refused(self) -> int:
        """Attempts on private pages that were refused."""
        return sum(tally.refused for tally in self.private.values())

    def attempt(self, vmm: Vmm, moment: Moment) -> None:
        """Try every way into every page chosen, now. Raises OSError for an error that is not a
        refusal."""
        self.moments.append(moment.value)
        ways = Ways(vmm.kvm.kernel)
        try:
            self.not_tried = ways.missing
            # What the guest took back is private, whatever else may be believed.
            if self._account is None or not vmm.protected or moment is Moment.UNSHARED:
                unannounced: Container[int] = ()
            else:
                unannounced = self._account()
            by_touch = vmm.protected and vmm.gets_memory_by_touch
            touched = self._private() if self._private is not None and by_touch else None
            blind = by_touch and moment is not Moment.UNSHARED
            for page in self._choose(vmm, moment):
                self.pages += 1
                announced = any(shared.holds(page.ipa) for shared in _usable(vmm))
                if announced or page.ipa in unannounced:
                    self._attempt_shared(ways, page)
                elif touched is not None and page.ipa not in touched:
                    self.untouched += 1
                elif self._account is None and blind and _bounces(vmm, page):
                    self._attempt_shared(ways, page)
                elif self._private is None and blind and _is_as_loaded(vmm, page):
                    self.untouched += 1
                else:
                    self._attempt_private(ways, page)
            latest = vmm.sharing.latest
            if moment is Moment.SHARED and latest is not None and latest in _usable(vmm):
                self._compare(ways, vmm, latest)
        finally:
            ways.close()

    def _choose(self, vmm: Vmm, moment: Moment) -> Iterable[Page]:
        slots = [(board.RAM_BASE, vmm.ram)]
        if vmm.firmware_memory is not None:
            slots.append((board.FIRMWARE_BASE, vmm.firmware_memory))
        chosen: dict[int, Page] = {}

        def take(ipa: int, length: int) -> None:
            for base, memory in slots:
                if base <= ipa < base + memory.length:
                    for page in range(ipa - ipa % PAGE_SIZE, ipa + length, PAGE_SIZE):
                        chosen[page] = Page(page, memory, page - base)

        if moment is Moment.UNSHARED:
            if vmm.sharing.taken_back is not None:
                take(vmm.sharing.taken_back.ipa, vmm.sharing.taken_back.length)
            return chosen.values()
        if self._everything:
            for base, memory in slots:
                take(base, memory.length)
            return chosen.values()
        take(board.DTB_BASE, len(vmm.device_tree))
        take(board.FIRMWARE_BASE, vmm.firmware_bytes)
        for segment in vmm.image.segments:
            pages = -(-segment.memory_bytes // PAGE_SIZE)
            if pages <= SEGMENT_PAGES:
                take(segment.ipa, segment.memory_bytes)
                continue
            for index in self._random.sample(range(pages), SEGMENT_PAGES):
                take(segment.ipa + index * PAGE_SIZE, 1)
        for shared in vmm.sharing.ranges.values():
            take(shared.ipa, shared.length)
        for _ in range(SAMPLE_PAGES):
            offset = self._random.randrange(sum(memory.length for _, memory in slots))
            for base, memory in slots:
                if offset < memory.length:
                    take(base + offset, 1)
                    break
                offset -= memory.length
        return chosen.values()

    def _attempt_private(self, ways: Ways, page: Page) -> None:
        inside = self._random.randrange(PAGE_SIZE // WORD) * WORD
        at = page.offset + inside
        content = PATTERN
        through = []
        for kind, read in ways.readers.items():
            found = _try_read(self.private[kind], read, page.memory, at, WORD)
            if found is not None:
                content = found
                through.append(kind)
        for kind, write in ways.writers.items():
            if _try_write(self.private[kind], write, page.memory, at, content):
                through.append(kind)
        for kind in through[: MAX_EXAMPLES - len(self.got_through)]:
            self.got_through.append(f"IPA {page.ipa + inside:#x}: {KINDS[kind]}")

    def _attempt_shared(self, ways: Ways, page: Page) -> None:
        at = page.offset + self._random.randrange(PAGE_SIZE // WORD) * WORD
        found = {
            kind: _try_read(self.shared[kind], read, page.memory, at, WORD)
            for kind, read in ways.readers.items()
        }
        refused = [kind for kind, content in found.items() if content is None]
        if not refused and len(set(found.values())) > 1:
            self._trouble(page.ipa, f"the ways in see different bytes: {found}")
        content = found["load"]
        if content is not None:
            for kind, write in ways.writers.items():
                if not _try_write(self.shared[kind], write, page.memory, at, content):
                    refused.append(kind)
        for kind in refused:
            self._trouble(page.ipa, f"{KINDS[kind]} was refused, and the guest shares the page")

    def _compare(self, ways: Ways, vmm: Vmm, shared: SharedRange) -> None:
        start = shared.ipa - board.RAM_BASE
        for kind, read in ways.readers.items():
            crc = 0
            for at in range(start, start + shared.length, PAGE_SIZE):
                length = min(PAGE_SIZE, start + shared.length - at)
                crc = zlib.crc32(_try_read(Tally(), read, vmm.ram, at, length) or b"", crc)
            if crc != shared.crc:
                self._trouble(shared.ipa, f"{KINDS[kind]} sees other content than the guest wrote")

    def _trouble(self, ipa: int, text: str) -> None:
        if len(self.shared_trouble) < MAX_EXAMPLES:
            self.shared_trouble.append(f"IPA {ipa:#x}: {text}")


def _usable(vmm: Vmm) -> list[SharedRange]:
    """The announced ranges that the host should be able to use: in a protected VM those that the
    guest shared by MEM_SHARE."""
    ranges = vmm.sharing.ranges.values()
    return [shared for shared in ranges if shared.by_hypercall or not vmm.protected]


def _content(page: Page) -> bytes | None:
    """The page as a load finds it; None where that is refused."""
    try:
        return page.memory.read(page.offset, PAGE_SIZE)
    except ProtectedPageError:
        return None


def _bounces(vmm: Vmm, page: Page) -> bool:
    """Whether the page is one of the bounce pool that can be used."""
    return (
        bool(vmm.board.bounce_bytes)
        and page.memory is vmm.ram
        and page.ipa >= vmm.board.bounce_base
        and _content(page) is not None
    )


def _is_as_loaded(vmm: Vmm, page: Page) -> bool:
    """Whether the page can be used and holds what the VMM put there before the guest ran; never so
    where the guest started, if it did."""
    if vmm.ran and page.ipa <= vmm.image.entry < page.ipa + PAGE_SIZE:
        return False
    parts = [(segment.ipa, segment.data) for segment in vmm.image.segments]
    parts.append((board.DTB_BASE, vmm.device_tree))
    if vmm.initrd is not None:
        parts.append((vmm.initrd.ipa, vmm.initrd.data))
    loaded = bytearray(PAGE_SIZE)
    for ipa, data in parts:
        start, end = max(ipa, page.ipa), min(ipa + len(data), page.ipa + PAGE_SIZE)
        if start < end:
            loaded[start - page.ipa : end - page.ipa] = data[start - ipa : end - ipa]
    return _content(page) == bytes(loaded)


def _try_read(
    tally: Tally, read: Callable[[Memory, int, int], bytes], memory: Memory, at: int, length: int
) -> bytes | None:
    """The bytes, or None if the attempt was refused."""
    tally.tried += 1
    try:
        return read(memory, at, length)
    except OSError as error:
        _refused(tally, error)
        return None


def _try_write(
    tally: Tally, write: Callable[[Memory, int, bytes], None], memory: Memory, at: int, data: bytes
) -> bool:
    """Whether the attempt got through."""
    tally.tried += 1
    try:
        write(memory, at, data)
    except OSError as error:
        _refused(tally, error)
        return False
    return True


def _refused(tally: Tally, error: OSError) -> None:
    if not isinstance(error, ProtectedPageError) and error.errno != errno.EIO:
        raise error
    tally.refused += 1
    if not tally.words:
        tally.words = error.strerror or str(error)
