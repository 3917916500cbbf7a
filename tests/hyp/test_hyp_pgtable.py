# SPDX-License-Identifier: GPL-2.0-or-later
"""Stage-2 tables one entry at a time: descriptors, table pages, refcounts, splits."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from pkvm.arm64.stage2 import ATTR_NORMAL_RWX, TABLE_OR_PAGE, Geometry, guest_annotation
from pkvm.hyp.errors import Errno, HypBug, Refused
from pkvm.hyp.pgtable import LOCKED, Stage2
from pkvm.hyp.pool import PagePool
from pkvm.hyp.vmemmap import Vmemmap
from pkvm.machine.memory import PhysicalMemory
from pkvm.machine.stage2 import Access, Stage2Context, iter_tables, leaf, walk

RAM = 0x8000_0000
MIB2, GIB = 1 << 21, 1 << 30
PAGE_RWX = ATTR_NORMAL_RWX | TABLE_OR_PAGE


@dataclass
class Tree:
    ipa_bits: int = 40
    flushed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.memory = PhysicalMemory(RAM, 256 * 4096)
        self.vmemmap = Vmemmap(self.memory, RAM)
        self.pool = PagePool(self.memory, self.vmemmap, RAM + 32 * 4096, 64 * 4096)
        geometry = Geometry(self.ipa_bits)
        self.stage2 = Stage2(
            self.memory,
            self.vmemmap,
            self.pool,
            root=self.pool.alloc_aligned(geometry.root_tables),
            vmid=5,
            vtcr=geometry.vtcr(2),
            invalidate=self.flushed.append,
        )
        self.ctx = Stage2Context(self.stage2.vttbr, self.stage2.vtcr)

    def tables(self) -> list[int]:
        return list(iter_tables(self.memory, self.ctx))

    def path(self, ipa: int) -> list[int]:
        """PAs of the tables from the root down to the one that decides about `ipa`, 40 bits."""
        found = [self.stage2.root + (ipa >> 39 << 12)]
        for shift in (30, 21):
            entry = self.memory.read_u64(found[-1] + (ipa >> shift & 511) * 8)
            if entry & 3 != 3:
                break
            found.append(entry & 0xFFFF_FFFF_F000)
        return found

    def refcount(self, pa: int) -> int:
        return self.vmemmap.refcount[(pa - RAM) >> 12]


@pytest.fixture
def tree() -> Tree:
    return Tree()


def test_registers(tree: Tree) -> None:
    assert tree.stage2.vtcr == 0x80023558
    assert tree.stage2.vttbr == tree.stage2.root | 5 << 48
    assert tree.ctx.ipa_bits == tree.stage2.ipa_bits == 40


@pytest.mark.parametrize("ipa_bits", [32, 36, 39, 40, 43, 44, 48])
def test_the_machines_walker_finds_what_was_put(ipa_bits: int) -> None:
    tree = Tree(ipa_bits)
    ipa = (1 << ipa_bits) - 4096
    assert tree.stage2.put(ipa, RAM + 0x1000 | PAGE_RWX) == 0
    assert walk(tree.memory, tree.ctx, ipa + 5, Access.WRITE).pa == RAM + 0x1005
    assert tree.stage2.leaf(ipa) == leaf(tree.memory, tree.ctx, ipa) == (RAM + 0x17FF, 3)
    assert len(tree.tables()) == Geometry(ipa_bits).root_tables + Geometry(ipa_bits).levels - 1


def test_a_page_at_the_example_of_the_manual(tree: Tree) -> None:
    tree.stage2.put(0x8000_1000, 0x8000_1000 | PAGE_RWX)
    index, entry, level = tree.stage2.find(0x8000_1FFF)
    assert (entry, level) == (0x0000_0000_8000_17FF, 3)
    tree.stage2.set_state(index, entry, 1 << 55)
    assert tree.stage2.leaf(0x8000_1000)[0] == 0x0080_0000_8000_17FF
    tree.stage2.set_state(*tree.stage2.find(0x8000_1000)[:2], 0)
    assert tree.stage2.leaf(0x8000_1000)[0] == 0x0000_0000_8000_17FF


def test_tables_come_and_go_with_their_entries(tree: Tree) -> None:
    stage2, before = tree.stage2, tree.pool.available
    stage2.put(0x4000_0000, RAM | PAGE_RWX)
    stage2.put(0x4000_1000, guest_annotation(0x1000, 1))
    root, l2, l3 = tree.path(0x4000_0000)
    assert before - tree.pool.available == 2
    assert [tree.refcount(pa) for pa in (root, l2, l3)] == [2, 2, 3]
    assert stage2.put(0x4000_0000, 0) == RAM | PAGE_RWX
    assert [tree.refcount(pa) for pa in (root, l2, l3)] == [2, 2, 2]
    assert stage2.put(0x4000_0000, 0) == 0, "clearing nothing does nothing"
    stage2.put(0x4000_1000, 0)
    assert tree.pool.available == before
    assert tree.refcount(root) == 1
    assert stage2.leaf(0x4000_0000) == (0, 1)


def test_clearing_where_no_table_is_makes_none(tree: Tree) -> None:
    before = tree.pool.available
    assert tree.stage2.put(0x4000_0000, 0) == 0
    assert tree.pool.available == before


def test_blocks_at_both_levels(tree: Tree) -> None:
    tree.stage2.put(0, 0 | ATTR_NORMAL_RWX, 1)
    tree.stage2.put(GIB, RAM | ATTR_NORMAL_RWX, 2)
    assert tree.stage2.leaf(0x3FFF_FFFF) == (ATTR_NORMAL_RWX, 1)
    assert tree.stage2.leaf(GIB + 0x1234) == (RAM | 0x7FD, 2)
    assert tree.stage2.leaf(GIB + MIB2) == (0, 2)


def test_what_stands_in_the_way_is_a_bug(tree: Tree) -> None:
    stage2 = tree.stage2
    stage2.put(0, ATTR_NORMAL_RWX | RAM, 2)
    with pytest.raises(HypBug, match="leaf stands"):
        stage2.put(0x1000, RAM | PAGE_RWX)
    stage2.put(GIB, RAM | PAGE_RWX)
    with pytest.raises(HypBug, match="table stands"):
        stage2.put(GIB, RAM | ATTR_NORMAL_RWX, 2)


def test_make_without_break_is_a_bug(tree: Tree) -> None:
    stage2 = tree.stage2
    stage2.put(0, RAM | PAGE_RWX)
    stage2.put(0, RAM | PAGE_RWX | 1 << 55)
    with pytest.raises(HypBug, match="break"):
        stage2.put(0, RAM + 0x1000 | PAGE_RWX)


@pytest.mark.parametrize("ipa", [1 << 40, (1 << 64) - 1, -1])
def test_beyond_the_input_space(tree: Tree, ipa: int) -> None:
    with pytest.raises(Refused) as refusal:
        tree.stage2.leaf(ipa)
    assert refusal.value.errno == Errno.ERANGE


def test_split_preserves_all_512(tree: Tree) -> None:
    stage2 = tree.stage2
    shared = 1 << 55
    stage2.put(GIB, GIB * 2 | ATTR_NORMAL_RWX | shared, 1)
    watched = []
    stage2.invalidate = lambda ipa: watched.append((ipa, stage2.leaf(GIB)))
    stage2.split(GIB + 5 * MIB2)
    assert stage2.leaf(GIB + 5 * MIB2) == (GIB * 2 + 5 * MIB2 | ATTR_NORMAL_RWX | shared, 2)
    stage2.split(GIB + 5 * MIB2)
    for page in range(512):
        expected = GIB * 2 + 5 * MIB2 + page * 4096 | PAGE_RWX | shared
        assert stage2.leaf(GIB + 5 * MIB2 + page * 4096) == (expected, 3)
    assert stage2.leaf(GIB + 4 * MIB2)[1] == 2
    assert [tree.refcount(pa) for pa in tree.path(GIB + 5 * MIB2)] == [2, 513, 513]
    assert watched[0] == (-1, (LOCKED, 1)), "the block is broken before the table is made"
    with pytest.raises(HypBug):
        stage2.split(GIB + 5 * MIB2)
    with pytest.raises(HypBug):
        stage2.split(0)


def test_destroy_frees_every_table(tree: Tree) -> None:
    before = tree.pool.available + tree.stage2.root_tables
    tree.stage2.put(0, RAM | PAGE_RWX)
    tree.stage2.put(GIB, guest_annotation(0x1000, 3))
    tree.stage2.put(2 * GIB, RAM | ATTR_NORMAL_RWX, 2)
    pages = tree.tables()
    tree.stage2.destroy()
    assert tree.pool.available == before
    for pa in pages:
        assert tree.refcount(pa) == 0
        assert tree.memory.read(pa + 8, 4088) == bytes(4088)
