# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.stage2_trees import (
    BLOCK_RWX,
    GIB1,
    KIB4,
    MIB2,
    PAGE_RO,
    PAGE_RWX,
    RAM,
    XN,
    Tree,
    rubbish_word,
)
from pkvm.machine.dump import Run, describe_leaf, dump_stage2, stage2_runs
from pkvm.machine.memory import PhysicalMemory
from pkvm.machine.stage2 import Stage2Context, iter_leaves

SHARED_OWNED = 1 << 55
GUEST_LEAF = 0x2000_0080_0001_0004
"""Owned by VM 0x1000 at gfn 0x80000 (facts §4.1)."""


@pytest.fixture
def memory() -> PhysicalMemory:
    return PhysicalMemory(RAM, 4 << 20)


def test_a_guests_tree_in_words(memory: PhysicalMemory) -> None:
    tree = Tree(memory, RAM, vmid=3)
    tree.block(0x4000_0000, 0x8020_0000)
    tree.block(0x4020_0000, 0x8040_0000)
    tree.page(0x4040_0000, 0x8060_0000)
    tree.page(0x4040_1000, 0x8060_1000, PAGE_RWX | SHARED_OWNED)
    tree.put(0x4040_2000, 3, 0x3000_0000_0000_0000)
    tree.put(0x4040_3000, 3, 0x1000_0000_0000_0000)
    assert dump_stage2(memory, tree.context, "VM 0x1002").splitlines() == [
        "VM 0x1002: VTTBR_EL2 0x0003000080000000 (VMID 3, root PA 0x80000000), VTCR_EL2 0x80023558",
        "40-bit IPA, 4 KiB granule, 2 concatenated tables at start level 1",
        "  IPA 0x0040000000-0x00403fffff -> PA 0x80200000  level 2, 2 x 2 MiB block  RWX  "
        "Normal-WB  inner  OWNED",
        "  IPA 0x0040400000-0x0040400fff -> PA 0x80600000  level 3, 4 KiB page  RWX  "
        "Normal-WB  inner  OWNED",
        "  IPA 0x0040401000-0x0040401fff -> PA 0x80601000  level 3, 4 KiB page  RWX  "
        "Normal-WB  inner  SHARED_OWNED",
        "  IPA 0x0040402000-0x0040402fff poisoned  level 3, 4 KiB page",
        "  IPA 0x0040403000-0x0040403fff locked  level 3, 4 KiB page",
        "4104 KiB mapped, 6 entries in 5 runs, 4 table pages",
    ]


def test_the_hosts_tree_in_words(memory: PhysicalMemory) -> None:
    tree = Tree(memory, RAM, vmid=0)
    for index in range(4):
        tree.put(0x8000_0000 + index * KIB4, 3, 0x2000_0000_0000_0002)
        tree.put(0x8000_4000 + index * KIB4, 3, GUEST_LEAF + (index << 20))
    tree.put(0x8000_8000, 3, GUEST_LEAF)
    tree.put(0x1000_0000, 3, 0x1000_0000 | 0x7FF ^ 0x38 | XN)
    text = dump_stage2(memory, tree.context, "host")
    assert [line.strip() for line in text.splitlines()[2:]] == [
        "IPA 0x0010000000-0x0010000fff -> PA 0x10000000  level 3, 4 KiB page  RW-  "
        "Device-nGnRE  inner",
        "IPA 0x0080000000-0x0080003fff annotated: owned by EL2  level 3, 4 x 4 KiB page",
        "IPA 0x0080004000-0x0080007fff annotated: owned by guest VM 0x1000 from gfn 0x80000  "
        "level 3, 4 x 4 KiB page",
        "IPA 0x0080008000-0x0080008fff annotated: owned by guest VM 0x1000 from gfn 0x80000  "
        "level 3, 4 KiB page",
        "4 KiB mapped, 10 entries in 4 runs, 6 table pages",
    ]


def test_an_empty_tree(memory: PhysicalMemory) -> None:
    lines = dump_stage2(memory, Tree(memory, RAM).context, "nothing").splitlines()
    assert lines[2:] == ["0 bytes mapped, 0 entries in 0 runs, 2 table pages"]
    one = Stage2Context(RAM, 1 << 31 | 2 << 16 | 1 << 6 | 64 - 36)
    assert "36-bit IPA, 4 KiB granule, one table at start level 1" in dump_stage2(memory, one, "x")


@pytest.mark.parametrize(
    ("descriptor", "level", "words"),
    [
        (0, 3, "invalid: nothing mapped"),
        (RAM | PAGE_RO, 3, "-> PA 0x80000000  level 3, 4 KiB page  R-X  Normal-WB  inner  OWNED"),
        (
            GIB1 | BLOCK_RWX & ~0x400 | 1 << 56,
            1,
            "-> PA 0x40000000  level 1, 1 GiB block  RWX  Normal-WB  inner  AF=0  SHARED_BORROWED",
        ),
        (
            RAM | 0x7FF & ~0x33C | 0x14 | 1 << 53,
            3,
            "-> PA 0x80000000  level 3, 4 KiB page  RWx@EL0  Normal-NC  non-shareable  OWNED",
        ),
        (RAM | 0x43 | 3 << 53 | 7 << 2, 3,
         "-> PA 0x80000000  level 3, 4 KiB page  R-x@EL1  MemAttr=0x7  non-shareable  AF=0  OWNED"),
        (GUEST_LEAF, 2, "annotated: owned by guest VM 0x1000 from gfn 0x80000  level 2, "
                        "2 MiB block"),
        (2 << 60 | 3 << 1, 3, "annotated: owned by owner 3  level 3, 4 KiB page"),
        (0x1000_0003, 1, "broken: table outside RAM, descriptor 0x0000000010000003  level 1, "
                         "1 GiB block"),
        (RAM | 1, 3, "broken: reserved encoding 0x0000000080000001  level 3, 4 KiB page"),
        (RAM | 1, 0, "broken: reserved encoding 0x0000000080000001  level 0, 512 GiB entry"),
        (4 << 60, 3, "broken: reserved encoding 0x4000000000000000  level 3, 4 KiB page"),
    ],
)  # fmt: skip
def test_single_entries(descriptor: int, level: int, words: str) -> None:
    assert describe_leaf(descriptor, level) == words


def test_a_host_leaf_has_no_state() -> None:
    assert describe_leaf(RAM | PAGE_RWX, 3, guest=False).endswith("Normal-WB  inner")


def test_runs_are_data(memory: PhysicalMemory) -> None:
    tree = Tree(memory, RAM, vmid=1)
    tree.block(MIB2, RAM, low=BLOCK_RWX & ~0x80)
    tree.put(0x1000, 3, GUEST_LEAF)
    runs = stage2_runs(memory, tree.context)
    assert runs == [
        Run(0x1000, KIB4, 3, 1, "annotation", GUEST_LEAF, owner="guest", vm=0x1000, gfn=0x80000),
        Run(
            MIB2, MIB2, 2, 1, "block", RAM | BLOCK_RWX & ~0x80,
            pa=RAM, permissions="R-X", memory_type="Normal-WB", shareability="inner",
            access_flag=True, state="OWNED",
        ),
    ]  # fmt: skip
    assert json.loads(json.dumps([dataclasses.asdict(run) for run in runs]))[0]["vm"] == 0x1000


@pytest.mark.parametrize(
    "second",
    [
        RAM + KIB4 | PAGE_RO,
        RAM + 2 * KIB4 | PAGE_RWX,
        RAM + KIB4 | PAGE_RWX | SHARED_OWNED,
        RAM + KIB4 | PAGE_RWX & ~0x400,
    ],
)
def test_entries_that_differ_do_not_merge(memory: PhysicalMemory, second: int) -> None:
    tree = Tree(memory, RAM)
    tree.page(0, RAM)
    tree.put(KIB4, 3, second)
    assert [run.entries for run in stage2_runs(memory, tree.context)] == [1, 1]


def test_runs_cross_tables_but_not_holes_or_levels(memory: PhysicalMemory) -> None:
    tree = Tree(memory, RAM)
    for ipa in (MIB2 - 2 * KIB4, MIB2 - KIB4, MIB2, MIB2 + KIB4, MIB2 + 3 * KIB4):
        tree.page(ipa, RAM + ipa)
    tree.block(0x4000_0000 - MIB2, RAM)
    tree.block(GIB1, RAM + MIB2 + GIB1 & -GIB1, 1)
    assert [(run.ipa, run.size) for run in stage2_runs(memory, tree.context)] == [
        (MIB2 - 2 * KIB4, 4 * KIB4),
        (MIB2 + 3 * KIB4, KIB4),
        (GIB1 - MIB2, MIB2),
        (GIB1, GIB1),
    ]


def test_annotations_merge_only_with_neighbours_of_their_level(memory: PhysicalMemory) -> None:
    tree = Tree(memory, RAM)
    for ipa in (0, 2 * KIB4, MIB2 - KIB4):
        tree.put(ipa, 3, 0x2000_0000_0000_0002)
    tree.put(MIB2, 2, 0x2000_0000_0000_0002)
    tree.put(2 * MIB2, 2, GUEST_LEAF)
    tree.put(3 * MIB2, 2, GUEST_LEAF + (512 << 20))
    assert [(run.ipa, run.size) for run in stage2_runs(memory, tree.context)] == [
        (0, KIB4),
        (2 * KIB4, KIB4),
        (MIB2 - KIB4, KIB4),
        (MIB2, MIB2),
        (2 * MIB2, 2 * MIB2),
    ]


@given(words=st.lists(st.tuples(st.integers(0, 1023), rubbish_word), max_size=6))
def test_any_tree_can_be_dumped_and_nothing_is_lost(words: list[tuple[int, int]]) -> None:
    memory = PhysicalMemory(RAM, 32 * KIB4)
    tree = Tree(memory, RAM + 16 * KIB4)
    for index, word in words:
        memory.write_u64(tree.root + 8 * index, word)
    runs = stage2_runs(memory, tree.context)
    leaves = list(iter_leaves(memory, tree.context))
    assert sum(run.entries for run in runs) == len(leaves)
    assert dump_stage2(memory, tree.context, "any").count("\n  IPA ") == len(runs)
    assert all(describe_leaf(entry, level) for _, level, entry in leaves)
