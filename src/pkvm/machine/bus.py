# SPDX-License-Identifier: GPL-2.0-or-later
"""A bus master's way to physical memory: `Master`, and `Bus`, the host CPU's.

A `Bus` is behind a stage-2 of its own that EL2 attaches; a device's master is
behind the SMMU (`pkvm.machine.smmu_streams`). Both keep a TLB, as on silicon: a
translation stays usable until it is invalidated, whatever has become of the
tables, so that a missing invalidation is a visible bug. Faults are never kept,
so making an invalid entry valid needs none.

Locking. `_lock` covers each translation and the access made with it, so that an
invalidation returns only when no access with the old translation is under way
(TLBI, then DSB). It is the innermost lock but for that of whatever `on_write`
calls: EL2 invalidates with its own lock held. Therefore `_refused`, by which a
`Bus` enters EL2, and a device's `work` are called without it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

from pkvm.arm64.stage2 import (
    BLOCK_1G,
    LAST_LEVEL,
    PAGE_MASK,
    PAGE_SHIFT,
    PAGE_SIZE,
    level_size,
)
from pkvm.machine.memory import DeviceWindow, PhysicalMemory
from pkvm.machine.stage2 import Access, Stage2Context, Stage2Fault, like_pages, permits, walk
from pkvm.machine.tlb import Tlb, TlbEntry, TlbPair

FAULT_RETRIES = 4
"""How often one access asks `on_fault` about one page before it gives up."""


class Master:
    """One bus master. Safe for threads.

    Addresses are IPAs of the master, in bytes. An access that crosses pages is split: when it is
    refused, pages before the refused one have been read or written.
    """

    def __init__(
        self, memory: PhysicalMemory, name: str, lock: AbstractContextManager[object]
    ) -> None:
        self.name = name
        self.on_write: Callable[[int, int], None] | None = None
        """Told (pa, bytes) after each write to RAM, before the write counts as complete: the
        CPU engine must forget code translated from there. Must not use this bus."""
        self._memory = memory
        self._context: Stage2Context | None = None
        self._lock = lock
        self._use(TlbPair())

    @property
    def context(self) -> Stage2Context | None:
        """The stage-2 in force; None is bypass, IPA = PA."""
        return self._context

    def tlb_entries(self) -> list[TlbEntry]:
        """What the TLB holds now, for those who check it against the tables."""
        with self._lock:
            return self._tlb.entries()

    def holds(self, ipa: int) -> bool:
        """Whether the TLB has a translation of `ipa`, for any access."""
        with self._lock:
            return self._tlb.holds(ipa)

    def read(self, ipa: int, length: int) -> bytes:
        """Load `length` bytes. Raises Stage2Fault where refused, BusError where nothing answers,
        ValueError for a negative length. A device answers 1, 2, 4 or 8 bytes."""
        if 0 < length <= PAGE_SIZE - (ipa & PAGE_MASK):
            # What is read most: part of one page of RAM whose translation is cached.
            with self._lock:
                delta = self._loads.pages.get(ipa >> 12)
                if delta is not None:
                    data = self._memory.read_ram(ipa + delta, length)
                    if data:
                        return data
        if length < 0:
            raise ValueError(f"cannot read {length} bytes")
        parts: list[bytes] = []
        while length:
            part = self._load(ipa, length)
            if len(part) == length and not parts:
                return part
            parts.append(part)
            ipa += len(part)
            length -= len(part)
        return b"".join(parts)

    def write(self, ipa: int, data: bytes | bytearray | memoryview) -> None:
        """Store `data`. Errors as `read`."""
        length = len(data)
        done = self._store(ipa, data) if length else 0
        if done == length:
            return
        view = memoryview(data)
        while done < length:
            done += self._store(ipa + done, view[done:])

    def read_u64(self, ipa: int) -> int:
        """Load a 64-bit little-endian word; of RAM in one piece if aligned. Errors as `read`."""
        if not ipa & 7:
            memory = self._memory
            with self._lock:
                delta = self._loads.find(ipa)
                if delta is not None:
                    pa = ipa + delta
                    if memory.ram_base <= pa < memory.ram_end:
                        return memory.words[(pa - memory.ram_base) >> 3]
        return int.from_bytes(self.read(ipa, 8), "little")

    def write_u64(self, ipa: int, value: int) -> None:
        """Store an unsigned 64-bit word; to RAM in one piece if aligned. Errors as `read`, and
        ValueError if `value` has more than 64 bits."""
        if not ipa & 7:
            memory = self._memory
            with self._lock:
                delta = self._stores.find(ipa)
                if delta is not None:
                    pa = ipa + delta
                    if memory.ram_base <= pa < memory.ram_end:
                        memory.words[(pa - memory.ram_base) >> 3] = value
                        if self.on_write is not None:
                            self.on_write(pa, 8)
                        return
        if value >> 64:
            raise ValueError(f"{value:#x} is not an unsigned 64-bit word")
        self.write(ipa, value.to_bytes(8, "little"))

    def span(self, ipa: int, length: int, access: Access) -> int:
        """How many bytes from `ipa`, at most `length`, an access can move in one piece: to the end
        of the page, and on while RAM follows in sequence and is permitted. Refuses nothing: the
        access itself does."""
        try:
            with self._lock:
                return self._locate(ipa, length, access)[1]
        except Stage2Fault:
            return min(length, PAGE_SIZE - (ipa & PAGE_MASK))

    def _use(self, tlb: TlbPair) -> None:
        """Look translations up here from now on. Called with the lock held."""
        self._tlb = tlb
        self._loads, self._stores = tlb.loads, tlb.stores

    def _refused(self, fault: Stage2Fault, retries: int) -> None:
        """An access was refused. Returns if it may be tried again, which `retries` bounds; else
        raises the fault. Called without the lock."""
        raise fault

    def _load(self, ipa: int, length: int) -> bytes:
        """Load from `ipa` at least one byte and at most `length`: what one translation gives."""
        memory = self._memory
        retries = FAULT_RETRIES
        while True:
            try:
                with self._lock:
                    pa, length = self._locate(ipa, length, Access.READ)
                    if memory.is_ram(pa):
                        return memory.read(pa, length)
                    window = memory.window_at(pa, length)
                    value = window.read(pa - window.base, length)
            except Stage2Fault as fault:
                self._refused(fault, retries)
                retries -= 1
                continue
            _let_work(window)
            return value.to_bytes(length, "little")

    def _store(self, ipa: int, data: bytes | bytearray | memoryview) -> int:
        """Store at least the first byte of `data`, and return how many were stored."""
        memory = self._memory
        retries = FAULT_RETRIES
        while True:
            try:
                with self._lock:
                    pa, length = self._locate(ipa, len(data), Access.WRITE)
                    piece = data if length == len(data) else data[:length]
                    if memory.is_ram(pa):
                        memory.write(pa, piece)
                        if self.on_write is not None:
                            self.on_write(pa, length)
                        return length
                    window = memory.window_at(pa, length)
                    window.write(pa - window.base, length, int.from_bytes(piece, "little"))
            except Stage2Fault as fault:
                self._refused(fault, retries)
                retries -= 1
                continue
            _let_work(window)
            return length

    def _locate(self, ipa: int, length: int, access: Access) -> tuple[int, int]:
        """PA of `ipa`, and how many bytes from it, at most `length`, follow each other in RAM as
        they do in the IPA space; outside RAM, to the page's end. Called with the lock held.

        Raises Stage2Fault if the first byte's page is refused; a later one only ends the run.
        """
        tlb = self._loads if access is Access.READ else self._stores
        delta = tlb.find(ipa)
        if delta is None:
            delta = self._fill(ipa, length, tlb)
        pa = ipa + delta
        rest = PAGE_SIZE - (ipa & PAGE_MASK)
        if length <= rest:
            return pa, length
        memory = self._memory
        if not memory.is_ram(pa):
            return pa, rest
        stop = min(ipa + length, memory.ram_end - delta)
        end = (ipa | tlb.size_of(ipa) - 1) + 1
        while end < stop:
            following = tlb.find(end)
            if following is None:
                try:
                    following = self._fill(end, stop - end, tlb)
                except Stage2Fault:
                    break
            if following != delta:
                break
            end = (end | tlb.size_of(end) - 1) + 1
        return pa, min(end, stop) - ipa

    def _fill(self, ipa: int, length: int, tlb: Tlb) -> int:
        """Walk the tables for `ipa`, keep the result for loads and stores, return PA minus IPA.

        Of the pages up to `ipa + length`, those that follow in sequence are kept with it.
        """
        ctx = self._context
        if ctx is None:
            if self._memory.is_ram(ipa):
                self._loads.fill_block(ipa, BLOCK_1G, 0)
                self._stores.fill_block(ipa, BLOCK_1G, 0)
                self._tlb.has_blocks = True
            return 0
        found = walk(self._memory, ctx, ipa, tlb.access)
        delta = found.pa - ipa
        count = 1
        if found.level == LAST_LEVEL and length > PAGE_SIZE:
            count = like_pages(self._memory, ctx, found, length + (ipa & PAGE_MASK) >> PAGE_SHIFT)
            if count > 1 and self._holds_any(range(ipa >> PAGE_SHIFT, (ipa >> PAGE_SHIFT) + count)):
                count = 1
        for one in (self._loads, self._stores):
            if not permits(found.descriptor, one.access):
                continue
            if found.level == LAST_LEVEL:
                one.fill_pages(ipa, count, delta)
            else:
                one.fill_block(ipa, level_size(found.level), delta)
                self._tlb.has_blocks = True
        return delta

    def _holds_any(self, pages: range) -> bool:
        """Whether the TLB has a translation of its own for one of these page numbers."""
        return not (
            self._loads.pages.keys().isdisjoint(pages)
            and self._stores.pages.keys().isdisjoint(pages)
        )


class Bus(Master):
    """A master behind a stage-2 of its own: EL2 attaches and invalidates it directly.

    `boot`: another CPU's bus whose invalidations reach this one too, as TLBI does (inner
    shareable). The two share a lock.
    """

    def __init__(self, memory: PhysicalMemory, name: str, boot: Bus | None = None) -> None:
        lock: threading.Lock = threading.Lock() if boot is None else boot.lock
        super().__init__(memory, name, lock)
        self.lock: threading.Lock = lock
        self.on_fault: Callable[[int, Access, int], bool] | None = None
        """EL2's abort handler: (ipa, access, fault status code) -> whether to try again. May
        invalidate this bus; must not access memory through it."""
        self._boot = boot
        self.peers: tuple[Bus, ...] = ()
        """The buses that this one is `boot` of."""
        if boot is not None:
            boot.peers += (self,)
        self._used: list[TlbPair] = []
        """TLBs of peers that may hold something."""
        self._take, self._drop = lock.acquire, lock.release
        self._load_pages, self._store_pages = self._loads.pages, self._stores.pages

    def attach(self, ctx: Stage2Context | None) -> None:
        """Put the master behind a stage-2, or behind none; forgets every cached translation."""
        with self._lock:
            self._context = ctx
            self._tlb.forget_all()

    def invalidate(self, ipa: int | None = None) -> None:
        """TLBI and DSB: forget the translation of `ipa`, the whole block if it was one; None:
        all. When it returns no access with a forgotten translation is under way."""
        self._take()  # spelt out: EL2 does this at every change of ownership
        try:
            if ipa is None:
                for tlb in (self._tlb, *self._used):
                    tlb.forget_all()
                self._used.clear()
            elif self._used or self._tlb.has_blocks:
                for tlb in (self._tlb, *self._used):
                    tlb.forget(ipa)
            else:
                page = ipa >> PAGE_SHIFT
                if page in self._load_pages:
                    del self._load_pages[page]
                if page in self._store_pages:
                    del self._store_pages[page]
        finally:
            self._drop()

    def tlb_columns(self) -> list[tuple[Access, int, list[int], list[int]]]:
        """What the TLB holds, as `TlbPair.columns`."""
        with self._lock:
            return self._tlb.columns()

    def _fill(self, ipa: int, length: int, tlb: Tlb) -> int:
        """As any master; what is kept must be reached by the boot CPU's invalidations."""
        if self._boot is not None and self._tlb not in self._boot._used:
            self._boot._used.append(self._tlb)
        return super()._fill(ipa, length, tlb)

    def _refused(self, fault: Stage2Fault, retries: int) -> None:
        """Let EL2 handle a fault; raise it if EL2 does not or cannot."""
        if self.on_fault is None or retries == 0:
            raise fault
        if not self.on_fault(fault.ipa, fault.access, fault.fsc):
            raise fault


def _let_work(window: DeviceWindow) -> None:
    if window.work is not None:
        window.work()
