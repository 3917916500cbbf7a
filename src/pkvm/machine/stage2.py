# SPDX-License-Identifier: GPL-2.0-or-later
"""The stage-2 table walker of every bus master but the CPU engine (Arm ARM D8.2, D8.3, D8.5).

The engine has its own; this one serves the host CPU's loads and stores,
devices, the dumper and the checkers, over the same tables in physical memory.
It has the 4 KiB granule, up to 48 bits of input, concatenated tables at the
start level, and no hardware update of the access flag (VTCR_EL2.HA is ignored).
Whatever the tables hold, an access ends in a `Translation` or a `Stage2Fault`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import numpy as np

from pkvm.arm64.esr import (
    FSC_ACCESS_FLAG,
    FSC_ADDRESS_SIZE,
    FSC_EXTERNAL_ON_WALK,
    FSC_PERMISSION,
    FSC_TRANSLATION,
)
from pkvm.arm64.stage2 import (
    ADDRESS_MASK,
    AF,
    DESCRIPTOR,
    LAST_LEVEL,
    PAGE_SHIFT,
    PAGE_SIZE,
    PARANGE_BITS,
    S2AP_R,
    S2AP_W,
    TABLE_ENTRIES,
    TABLE_OR_PAGE,
    VALID,
    VTCR,
    VTTBR_BADDR_MASK,
    VTTBR_VMID_SHIFT,
    is_leaf,
    is_table,
    level_shift,
    level_size,
)
from pkvm.machine.memory import BusError, PhysicalMemory

MAX_IPA_BITS = 48
_INDEX_BITS = 9
_LEVEL_SIZES = tuple(level_size(level) for level in range(LAST_LEVEL + 1))
_PAGE_STEPS = np.arange(TABLE_ENTRIES, dtype=np.uint64) * np.uint64(PAGE_SIZE)
_XN_SHIFT = DESCRIPTOR["XN"].lo
_XN_EL1_MAY_EXECUTE = (0, 3)


class Access(Enum):
    """What a bus master wants to do. A fetch is one of EL1."""

    READ = "read"
    WRITE = "write"
    FETCH = "fetch"


_FSC_WORDS = {
    FSC_ADDRESS_SIZE: "address size fault",
    FSC_TRANSLATION: "translation fault",
    FSC_ACCESS_FLAG: "access flag fault",
    FSC_PERMISSION: "permission fault",
    FSC_EXTERNAL_ON_WALK: "external abort on the table walk",
}


class Stage2Fault(Exception):
    """An access that stage 2 refused.

    `ipa` is the byte address refused, `fsc` the fault status code as ESR_EL2 has it, `level` the
    lookup level that it names.
    """

    def __init__(self, ipa: int, access: Access, level: int, fsc: int) -> None:
        super().__init__(ipa, access, level, fsc)
        self.ipa = ipa
        self.access = access
        self.level = level
        self.fsc = fsc

    @property
    def words(self) -> str:
        """The kind of fault and its level in the Arm ARM's words."""
        return f"{_FSC_WORDS[self.fsc - self.level]} at level {self.level}"

    def __str__(self) -> str:
        return f"{self.access.value} of IPA {self.ipa:#x} refused by stage 2: {self.words}"


@dataclass(frozen=True, slots=True)
class Stage2Context:
    """What selects a stage-2 tree: VTTBR_EL2 and VTCR_EL2, and what follows from them."""

    vttbr: int
    vtcr: int
    vmid: int = field(init=False, compare=False)
    root: int = field(init=False, compare=False)
    """PA of the first table of the start level; address bits below its size are ignored."""
    ipa_bits: int = field(init=False, compare=False)
    start_level: int = field(init=False, compare=False)
    output_end: int = field(init=False, compare=False)
    """First PA (bytes) beyond the physical address size that VTCR_EL2.PS says."""
    root_entries: int = field(init=False, compare=False)
    """Entries of the start level: more than 512 if tables are concatenated."""
    refusal: int | None = field(init=False, compare=False)
    """Status code of the level 0 fault that every access gets, if the registers contradict
    themselves or ask for what the walker has not (another granule); else None."""

    def __post_init__(self) -> None:
        vtcr = VTCR.decode(self.vtcr)
        ipa_bits = 64 - vtcr["T0SZ"]
        start_level = 2 - vtcr["SL0"]
        output_end = 1 << PARANGE_BITS.get(vtcr["PS"], MAX_IPA_BITS)
        root_bits = ipa_bits - level_shift(start_level)
        consistent = (
            ipa_bits <= MAX_IPA_BITS
            and start_level >= 0
            and 1 <= root_bits <= _INDEX_BITS + 4
            and vtcr["TG0"] == 0
        )
        root_entries = 1 << root_bits if consistent else 0
        root = self.vttbr & VTTBR_BADDR_MASK & -max(root_entries * 8, 1)
        refusal = None
        if not consistent:
            refusal = FSC_TRANSLATION
        elif root >= output_end:
            refusal = FSC_ADDRESS_SIZE
        for name, value in (
            ("vmid", self.vttbr >> VTTBR_VMID_SHIFT),
            ("root", root),
            ("ipa_bits", ipa_bits),
            ("start_level", start_level),
            ("output_end", output_end),
            ("root_entries", root_entries),
            ("refusal", refusal),
        ):
            object.__setattr__(self, name, value)

    @property
    def root_tables(self) -> int:
        """Pages that the start level takes: 1, or 2 to 16 concatenated ones."""
        return max(1, self.root_entries // TABLE_ENTRIES)


class Translation(NamedTuple):
    """Where an IPA leads: its PA (bytes), and the leaf that said so, its level and its own PA."""

    pa: int
    level: int
    descriptor: int
    entry: int


class TablePage(NamedTuple):
    """A table of a tree: its PA, the level of its entries, the IPA that its first entry covers,
    and how many entries it has (512, or fewer at the start level of a narrow IPA space)."""

    pa: int
    level: int
    ipa: int
    entries: int


def walk(memory: PhysicalMemory, ctx: Stage2Context, ipa: int, access: Access) -> Translation:
    """Translate `ipa` (bytes) for `access`. Raises Stage2Fault, and nothing else.

    Checks in the architecture's order: the registers and the input size, each table, the
    output size, the access flag, permissions.
    """
    if ctx.refusal is not None:
        raise Stage2Fault(ipa, access, 0, ctx.refusal)
    if ipa >> ctx.ipa_bits:
        raise Stage2Fault(ipa, access, 0, FSC_TRANSLATION)
    descriptor, level, entry = _descend(memory, ctx, ipa)
    if not is_leaf(descriptor, level):
        if not is_table(descriptor, level):
            raise Stage2Fault(ipa, access, level, FSC_TRANSLATION + level)
        if descriptor & ADDRESS_MASK >= ctx.output_end:
            raise Stage2Fault(ipa, access, level, FSC_ADDRESS_SIZE + level)
        raise Stage2Fault(ipa, access, level + 1, FSC_EXTERNAL_ON_WALK + level + 1)
    size = _LEVEL_SIZES[level]
    base = descriptor & ADDRESS_MASK & -size
    if base >= ctx.output_end:
        raise Stage2Fault(ipa, access, level, FSC_ADDRESS_SIZE + level)
    if not descriptor & AF:
        raise Stage2Fault(ipa, access, level, FSC_ACCESS_FLAG + level)
    if not permits(descriptor, access):
        raise Stage2Fault(ipa, access, level, FSC_PERMISSION + level)
    return Translation(base | ipa & size - 1, level, descriptor, entry)


def like_pages(memory: PhysicalMemory, ctx: Stage2Context, page: Translation, limit: int) -> int:
    """How many pages, at least 1 and at most `limit`, the page's entry and those after it in
    their table map alike and in physical sequence. For a leaf of level 3 only."""
    start = (page.entry - memory.ram_base) >> 3
    limit = min(
        limit,
        TABLE_ENTRIES - (start & TABLE_ENTRIES - 1),
        ctx.output_end - page.pa + PAGE_SIZE - 1 >> PAGE_SHIFT,
    )
    if limit < 2 or memory.words[start + 1] != page.descriptor + PAGE_SIZE:
        return 1
    expected = _PAGE_STEPS[:limit] + np.uint64(page.descriptor)
    differing = (memory.u64[start : start + limit] != expected).nonzero()[0]
    return int(differing[0]) if differing.size else limit


def permits(descriptor: int, access: Access) -> bool:
    """Whether a valid leaf allows `access`: S2AP for data, XN (with FEAT_XNX) for fetches."""
    if access is Access.READ:
        return bool(descriptor & S2AP_R)
    if access is Access.WRITE:
        return bool(descriptor & S2AP_W)
    return descriptor >> _XN_SHIFT & 3 in _XN_EL1_MAY_EXECUTE


def leaf(memory: PhysicalMemory, ctx: Stage2Context, ipa: int) -> tuple[int, int]:
    """The entry on which the walk for `ipa` ends, and its level, whatever it allows.

    A valid leaf, an annotated entry or zero; in a broken tree a reserved encoding, or a table
    entry that points outside RAM. Raises ValueError if `ipa` is beyond the input size or the
    registers describe no tree, BusError if the root is not in RAM.
    """
    if ctx.refusal is not None or ipa >> ctx.ipa_bits:
        raise ValueError(f"IPA {ipa:#x} is not one of {ctx.ipa_bits} bits, or VTCR describes none")
    descriptor, level, _ = _descend(memory, ctx, ipa)
    if level < ctx.start_level:
        raise BusError(ctx.root, PAGE_SIZE)
    return descriptor, level


def _descend(memory: PhysicalMemory, ctx: Stage2Context, ipa: int) -> tuple[int, int, int]:
    """The last entry that can be read on the way to `ipa`, its level, and its PA.

    A table outside RAM or beyond the output size ends the walk at the entry that names it.
    VTTBR counts as such an entry, of the level above the start level. There the PA is -1.
    """
    words = memory.words
    ram_base = memory.ram_base
    end = memory.ram_end if memory.ram_end < ctx.output_end else ctx.output_end
    limit = end - ram_base
    level = ctx.start_level
    shift = PAGE_SHIFT + _INDEX_BITS * (LAST_LEVEL - level)
    descriptor = ctx.root | VALID | TABLE_OR_PAGE
    offset = ctx.root - ram_base + (ipa >> shift << 3)
    while 0 <= offset < limit:
        descriptor = words[offset >> 3]
        if descriptor & 3 != 3 or level == LAST_LEVEL:
            return descriptor, level, ram_base + offset
        level += 1
        shift -= _INDEX_BITS
        offset = (descriptor & ADDRESS_MASK) - ram_base + ((ipa >> shift & TABLE_ENTRIES - 1) << 3)
    return descriptor, level - 1, -1


def walk_tables(memory: PhysicalMemory, ctx: Stage2Context) -> Iterator[TablePage]:
    """Every table of the tree, parents before children, by rising IPA.

    A table that lies outside RAM is left out; one that a broken tree reaches twice comes twice.
    Raises BusError if the root is not in RAM, ValueError if there is no tree.
    """
    for root in _roots(memory, ctx):
        yield from _tables_from(memory, root)


def iter_tables(memory: PhysicalMemory, ctx: Stage2Context) -> Iterator[int]:
    """PAs of all tables of the tree, in the order and with the errors of `walk_tables`."""
    for table in walk_tables(memory, ctx):
        yield table.pa


def iter_leaves(memory: PhysicalMemory, ctx: Stage2Context) -> Iterator[tuple[int, int, int]]:
    """(ipa, level, descriptor) of every entry that is neither zero nor a table, by rising IPA.

    That is valid leaves and annotations; in a broken tree also reserved encodings and table
    entries that point outside RAM. Errors as `walk_tables`.
    """
    for table in _roots(memory, ctx):
        yield from _leaves_from(memory, table)


def _roots(memory: PhysicalMemory, ctx: Stage2Context) -> list[TablePage]:
    """The start level's tables. One of a narrow IPA space may have fewer than 512 entries."""
    if ctx.refusal is not None:
        raise ValueError(f"VTCR_EL2 {ctx.vtcr:#x} and VTTBR_EL2 {ctx.vttbr:#x} describe no tree")
    if not memory.is_ram(ctx.root, ctx.root_entries * 8):
        raise BusError(ctx.root, ctx.root_entries * 8)
    entries = min(ctx.root_entries, TABLE_ENTRIES)
    covers = level_size(ctx.start_level) * TABLE_ENTRIES
    return [
        TablePage(ctx.root + index * PAGE_SIZE, ctx.start_level, index * covers, entries)
        for index in range(ctx.root_tables)
    ]


def _entries(memory: PhysicalMemory, table: TablePage) -> Iterator[tuple[int, int]]:
    """(ipa, entry) of each non-zero entry of a table, as it was when the iteration began."""
    words = memory.span(table.pa, table.entries * 8).copy()
    used = words.nonzero()[0]
    shift = level_shift(table.level)
    for index, entry in zip(used.tolist(), words[used].tolist(), strict=True):
        yield table.ipa + (index << shift), entry


def _child(memory: PhysicalMemory, table: TablePage, ipa: int, entry: int) -> TablePage | None:
    """The table that an entry points to; None if it is not a table entry or leaves RAM."""
    if not is_table(entry, table.level) or not memory.is_ram(entry & ADDRESS_MASK, PAGE_SIZE):
        return None
    return TablePage(entry & ADDRESS_MASK, table.level + 1, ipa, TABLE_ENTRIES)


def _tables_from(memory: PhysicalMemory, table: TablePage) -> Iterator[TablePage]:
    yield table
    if table.level == LAST_LEVEL:
        return
    for ipa, entry in _entries(memory, table):
        child = _child(memory, table, ipa, entry)
        if child is not None:
            yield from _tables_from(memory, child)


def _leaves_from(memory: PhysicalMemory, table: TablePage) -> Iterator[tuple[int, int, int]]:
    for ipa, entry in _entries(memory, table):
        child = _child(memory, table, ipa, entry)
        if child is None:
            yield ipa, table.level, entry
        else:
            yield from _leaves_from(memory, child)
