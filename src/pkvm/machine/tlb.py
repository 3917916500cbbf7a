# SPDX-License-Identifier: GPL-2.0-or-later
"""What a bus master keeps of its translations, until it is told to forget them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pkvm.arm64.stage2 import BLOCK_1G, BLOCK_2M, PAGE_SIZE
from pkvm.machine.stage2 import Access

TLB_PAGES = 1 << 16
"""Page translations that a TLB holds at most; when full it forgets them all, as a TLB may."""


class TlbEntry(NamedTuple):
    """A cached translation of [ipa, ipa+size) to [pa, pa+size), bytes, for one access."""

    ipa: int
    size: int
    pa: int
    access: Access


class Tlb:
    """Translations for one access: by page, 2 MiB and 1 GiB number, what to add to an IPA."""

    __slots__ = ("access", "blocks_1g", "blocks_2m", "pages")

    def __init__(self, access: Access) -> None:
        self.access = access
        self.pages: dict[int, int] = {}
        self.blocks_2m: dict[int, int] = {}
        self.blocks_1g: dict[int, int] = {}

    def find(self, ipa: int) -> int | None:
        """PA minus IPA of a cached translation, or None."""
        delta = self.pages.get(ipa >> 12)
        if delta is None:
            delta = self.blocks_2m.get(ipa >> 21)
            if delta is None:
                delta = self.blocks_1g.get(ipa >> 30)
        return delta

    def size_of(self, ipa: int) -> int:
        """Bytes that the translation `find` uses for `ipa` covers."""
        if ipa >> 12 in self.pages:
            return PAGE_SIZE
        return BLOCK_2M if ipa >> 21 in self.blocks_2m else BLOCK_1G

    def fill_pages(self, ipa: int, count: int, delta: int) -> None:
        """Keep `count` pages from `ipa` on; they all have the same distance to their PA."""
        if len(self.pages) + count > TLB_PAGES:
            self.pages.clear()
        first = ipa >> 12
        if count == 1:
            self.pages[first] = delta
        else:
            self.pages.update(dict.fromkeys(range(first, first + count), delta))

    def fill_block(self, ipa: int, size: int, delta: int) -> None:
        """Keep a block of 2 MiB or 1 GiB."""
        if size == BLOCK_2M:
            self.blocks_2m[ipa >> 21] = delta
        else:
            self.blocks_1g[ipa >> 30] = delta

    def forget_all(self) -> None:
        """Keep nothing."""
        self.pages.clear()
        self.blocks_2m.clear()
        self.blocks_1g.clear()

    def tables(self) -> tuple[tuple[int, dict[int, int]], ...]:
        """By size: what is cached."""
        return (PAGE_SIZE, self.pages), (BLOCK_2M, self.blocks_2m), (BLOCK_1G, self.blocks_1g)

    def entries(self) -> Iterator[TlbEntry]:
        """Everything, one by one."""
        for size, table in self.tables():
            for number, delta in table.items():
                yield TlbEntry(number * size, size, number * size + delta, self.access)


class TlbPair:
    """The translations of one tree: those for loads and those for stores. Not safe for threads:
    whoever owns it has a lock."""

    __slots__ = ("_blocks", "_load_pages", "_store_pages", "has_blocks", "loads", "stores")

    def __init__(self) -> None:
        self.loads = Tlb(Access.READ)
        self.stores = Tlb(Access.WRITE)
        self.has_blocks = False
        """Whether there may be blocks in it."""
        self._load_pages, self._store_pages = self.loads.pages, self.stores.pages
        self._blocks = tuple(
            (shift, table)
            for tlb in (self.loads, self.stores)
            for shift, table in ((21, tlb.blocks_2m), (30, tlb.blocks_1g))
        )

    def forget(self, ipa: int) -> None:
        """Drop the translation of `ipa`, the whole block if it was one."""
        page = ipa >> 12
        self._load_pages.pop(page, None)
        self._store_pages.pop(page, None)
        if self.has_blocks:
            for shift, blocks in self._blocks:
                blocks.pop(ipa >> shift, None)

    def forget_all(self) -> None:
        """Keep nothing."""
        self.loads.forget_all()
        self.stores.forget_all()
        self.has_blocks = False

    def holds(self, ipa: int) -> bool:
        """Whether there is a translation of `ipa`, for any access."""
        return self.loads.find(ipa) is not None or self.stores.find(ipa) is not None

    def entries(self) -> list[TlbEntry]:
        """Everything, one by one."""
        return [*self.loads.entries(), *self.stores.entries()]

    def columns(self) -> list[tuple[Access, int, list[int], list[int]]]:
        """The same for those who look often: of each access and size the numbers of what is cached,
        IPA // size, and PA minus IPA of each."""
        return [
            (tlb.access, size, list(table), list(table.values()))
            for tlb in (self.loads, self.stores)
            for size, table in tlb.tables()
        ]
