# SPDX-License-Identifier: GPL-2.0-or-later
"""The walker: worked cases, and against a model that only knows which range maps where."""

from __future__ import annotations

from dataclasses import dataclass

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
    PAGE_WO,
    RAM,
    SIZES,
    VTCR_40,
    XN,
    Tree,
    rubbish_word,
)
from pkvm.machine.memory import BusError, PhysicalMemory
from pkvm.machine.stage2 import (
    Access,
    Stage2Context,
    Stage2Fault,
    Translation,
    iter_leaves,
    iter_tables,
    leaf,
    like_pages,
    walk,
    walk_tables,
)

RAM_BYTES = 4 << 20
IPA_END = 1 << 40


@pytest.fixture
def memory() -> PhysicalMemory:
    return PhysicalMemory(RAM, RAM_BYTES)


@pytest.fixture
def tree(memory: PhysicalMemory) -> Tree:
    return Tree(memory, RAM)


def refused(
    memory: PhysicalMemory, ctx: Stage2Context, ipa: int, access: Access = Access.READ
) -> tuple[int, int]:
    """(fsc, level) of the fault that an access must meet."""
    with pytest.raises(Stage2Fault) as caught:
        walk(memory, ctx, ipa, access)
    assert caught.value.ipa == ipa
    assert caught.value.access is access
    return caught.value.fsc, caught.value.level


@pytest.mark.parametrize(("level", "size"), SIZES.items())
def test_leaves_of_each_level(memory: PhysicalMemory, tree: Tree, level: int, size: int) -> None:
    low = PAGE_RWX if level == 3 else BLOCK_RWX
    ipa = 600 * GIB1 + (size if level > 1 else 0)  # in the second of the two root tables
    tree.put(ipa, level, 4 * GIB1 | low)
    for offset in (0, 8, size - 1):
        found = walk(memory, tree.context, ipa + offset, Access.WRITE)
        assert found == Translation(4 * GIB1 + offset, level, 4 * GIB1 | low, tree.slot(ipa, level))
    assert refused(memory, tree.context, ipa + size) == (0x04 + level, level)


def test_a_blocks_low_address_bits_are_ignored(memory: PhysicalMemory, tree: Tree) -> None:
    tree.put(0, 2, MIB2 | 0x1F_F000 | BLOCK_RWX)
    assert walk(memory, tree.context, 0x5123, Access.READ).pa == MIB2 + 0x5123


def test_translation_faults_name_the_level_where_the_walk_ends(
    memory: PhysicalMemory, tree: Tree
) -> None:
    tree.page(0x4000_0000, RAM)
    assert refused(memory, tree.context, 0) == (0x05, 1)
    assert refused(memory, tree.context, 0x4020_0000) == (0x06, 2)
    assert refused(memory, tree.context, 0x4000_1000) == (0x07, 3)


def test_an_annotation_is_a_translation_fault(memory: PhysicalMemory, tree: Tree) -> None:
    tree.put(0, 3, 0x2000_0080_0001_0004)
    assert refused(memory, tree.context, 0) == (0x07, 3)
    assert leaf(memory, tree.context, 0xFFF) == (0x2000_0080_0001_0004, 3)


def test_reserved_encodings_are_translation_faults(memory: PhysicalMemory, tree: Tree) -> None:
    tree.put(0, 3, RAM | 0x7FD)  # valid, but bit 1 clear at level 3
    assert refused(memory, tree.context, 0) == (0x07, 3)
    root = RAM + 0x10_0000
    level0 = Stage2Context(root, 0x8005_3590)  # 48 bits, start level 0
    memory.write_u64(root, RAM | BLOCK_RWX)  # there are no 512 GiB blocks
    assert refused(memory, level0, 0) == (0x04, 0)


@pytest.mark.parametrize("ipa", [IPA_END, (1 << 64) - 1, 1 << 64, -1])
def test_input_beyond_the_ipa_space_is_a_level_0_translation_fault(
    memory: PhysicalMemory, tree: Tree, ipa: int
) -> None:
    tree.block(0, RAM, 1)
    assert refused(memory, tree.context, ipa) == (0x04, 0)
    with pytest.raises(ValueError, match="not one of 40 bits"):
        leaf(memory, tree.context, ipa)


def test_a_table_outside_ram_is_an_external_abort_on_the_walk(
    memory: PhysicalMemory, tree: Tree
) -> None:
    tree.put(0, 1, 0x1000_0000 | 3)
    tree.put(GIB1, 2, RAM + RAM_BYTES | 3)
    assert refused(memory, tree.context, 0) == (0x16, 2)
    assert refused(memory, tree.context, GIB1) == (0x17, 3)
    assert leaf(memory, tree.context, 0) == (0x1000_0003, 1)
    nowhere = Stage2Context(0x1000_0000, VTCR_40)
    assert refused(memory, nowhere, 0) == (0x15, 1)
    with pytest.raises(BusError):
        leaf(memory, nowhere, 0)
    with pytest.raises(BusError):
        list(iter_leaves(memory, nowhere))


def test_the_second_root_table_may_be_missing_alone(memory: PhysicalMemory) -> None:
    tail = Stage2Context(RAM + RAM_BYTES - KIB4, VTCR_40)
    assert tail.root == RAM + RAM_BYTES - 2 * KIB4  # aligned down to the size of both
    small = PhysicalMemory(RAM, 3 * KIB4)
    half = Stage2Context(RAM + 2 * KIB4, VTCR_40)
    assert refused(small, half, 0) == (0x05, 1)
    assert refused(small, half, 512 * GIB1) == (0x15, 1)


def test_addresses_beyond_the_output_size(memory: PhysicalMemory, tree: Tree) -> None:
    tree.block(0, 1 << 40, 1)
    tree.put(GIB1, 1, 1 << 40 | 3)
    tree.page(2 * GIB1, 1 << 40)
    assert refused(memory, tree.context, 0) == (0x01, 1)
    assert refused(memory, tree.context, GIB1) == (0x01, 1)
    assert refused(memory, tree.context, 2 * GIB1) == (0x03, 3)
    assert refused(memory, Stage2Context(1 << 41, VTCR_40), 0) == (0x00, 0)


def test_a_table_in_ram_but_beyond_the_output_size(memory: PhysicalMemory) -> None:
    high = PhysicalMemory((1 << 32) - 4 * KIB4, 8 * KIB4)
    root = (1 << 32) - 4 * KIB4
    ctx = Stage2Context(root, VTCR_40 & ~(7 << 16))  # PS: 32 bits
    high.write_u64(root, 1 << 32 | 3)
    assert refused(high, ctx, 0) == (0x01, 1)


def test_the_access_flag_comes_before_permissions(memory: PhysicalMemory, tree: Tree) -> None:
    tree.page(0, RAM, PAGE_RWX & ~0x400 & ~0xC0)
    assert refused(memory, tree.context, 0, Access.WRITE) == (0x0B, 3)
    tree.block(MIB2, RAM, 2, BLOCK_RWX & ~0x400)
    assert refused(memory, tree.context, MIB2) == (0x0A, 2)


@pytest.mark.parametrize(
    ("low", "allowed"),
    [
        (PAGE_RWX, {Access.READ, Access.WRITE, Access.FETCH}),
        (PAGE_RO, {Access.READ, Access.FETCH}),
        (PAGE_WO, {Access.WRITE, Access.FETCH}),
        (PAGE_RWX & ~0xC0, {Access.FETCH}),
        (PAGE_RWX | XN, {Access.READ, Access.WRITE}),
        (PAGE_RWX | 1 << 53, {Access.READ, Access.WRITE}),
        (PAGE_RWX | 3 << 53, {Access.READ, Access.WRITE, Access.FETCH}),
    ],
)
def test_permissions(memory: PhysicalMemory, tree: Tree, low: int, allowed: set[Access]) -> None:
    tree.page(0, RAM, low)
    for access in Access:
        if access in allowed:
            assert walk(memory, tree.context, 0x10, access).pa == RAM + 0x10
        else:
            assert refused(memory, tree.context, 0x10, access) == (0x0F, 3)


def test_a_fault_says_what_happened(memory: PhysicalMemory, tree: Tree) -> None:
    tree.page(0x1000, RAM, PAGE_RO)
    with pytest.raises(Stage2Fault) as caught:
        walk(memory, tree.context, 0x1008, Access.WRITE)
    assert caught.value.words == "permission fault at level 3"
    assert str(caught.value) == (
        "write of IPA 0x1008 refused by stage 2: permission fault at level 3"
    )


class TestContext:
    def test_what_the_registers_say(self) -> None:
        ctx = Stage2Context(0x7_0000_8000_2001, VTCR_40)
        assert (ctx.vmid, ctx.root, ctx.ipa_bits) == (7, 0x8000_2000, 40)
        assert (ctx.start_level, ctx.root_tables, ctx.refusal) == (1, 2, None)

    @pytest.mark.parametrize(
        ("ipa_bits", "sl0", "tables", "levels"),
        [
            (32, 0, 4, 2),
            (34, 0, 16, 2),
            (36, 1, 1, 3),
            (39, 1, 1, 3),
            (43, 1, 16, 3),
            (48, 2, 1, 4),
        ],
    )
    def test_shapes(
        self, memory: PhysicalMemory, ipa_bits: int, sl0: int, tables: int, levels: int
    ) -> None:
        root = RAM + 0x10_0000
        ctx = Stage2Context(root, 1 << 31 | 5 << 16 | sl0 << 6 | 64 - ipa_bits)
        assert ctx.root_tables == tables
        top = (1 << ipa_bits) - KIB4
        shift = 12 + 9 * (levels - 1)
        entry = root + (top >> shift) * 8
        table = RAM
        for _ in range(levels - 1):
            memory.write_u64(entry, table | 3)
            entry, table = table + 511 * 8, table + KIB4
        memory.write_u64(entry, RAM + 0x8000 | PAGE_RWX)
        assert walk(memory, ctx, top + 1, Access.READ).pa == RAM + 0x8001
        assert list(iter_leaves(memory, ctx)) == [(top, 3, RAM + 0x8000 | PAGE_RWX)]
        assert refused(memory, ctx, 1 << ipa_bits) == (0x04, 0)

    @pytest.mark.parametrize(
        "vtcr",
        [
            VTCR_40 & ~0xC0,  # start level 2 with 40 bits: 1024 concatenated tables
            VTCR_40 | 0xC0,  # SL0 = 3
            VTCR_40 & ~0x3F | 34 | 0x80,  # start level 0 with 30 bits
            VTCR_40 & ~0x3F,  # 64-bit IPA
            VTCR_40 & ~0x3F | 0x3F,  # 1-bit IPA
            VTCR_40 | 1 << 14,  # 64 KiB granule
        ],
    )
    def test_registers_that_contradict_themselves(self, memory: PhysicalMemory, vtcr: int) -> None:
        ctx = Stage2Context(RAM, vtcr)
        memory.write_u64(RAM, RAM | BLOCK_RWX)
        assert refused(memory, ctx, 0) == (0x04, 0)
        with pytest.raises(ValueError, match="describe no tree"):
            list(iter_tables(memory, ctx))


def test_tables_and_leaves_of_a_tree(memory: PhysicalMemory, tree: Tree) -> None:
    tree.page(0x4000_0000, RAM)
    tree.put(0x4000_3000, 3, 2)  # an annotation
    tree.block(0x4020_0000, RAM)
    tree.put(513 * GIB1, 1, 0x1000_0003)  # a table outside RAM
    tree.put(514 * GIB1, 2, RAM | BLOCK_RWX)
    assert [tuple(table) for table in walk_tables(memory, tree.context)] == [
        (RAM, 1, 0, 512),
        (RAM + 0x2000, 2, GIB1, 512),
        (RAM + 0x3000, 3, GIB1, 512),
        (RAM + 0x1000, 1, 512 * GIB1, 512),
        (RAM + 0x4000, 2, 514 * GIB1, 512),
    ]
    assert list(iter_tables(memory, tree.context)) == [
        RAM, RAM + 0x2000, RAM + 0x3000, RAM + 0x1000, RAM + 0x4000,
    ]  # fmt: skip
    assert list(iter_leaves(memory, tree.context)) == [
        (0x4000_0000, 3, RAM | PAGE_RWX),
        (0x4000_3000, 3, 2),
        (0x4020_0000, 2, RAM | BLOCK_RWX),
        (513 * GIB1, 1, 0x1000_0003),
        (514 * GIB1, 2, RAM | BLOCK_RWX),
    ]


def test_pages_alike_end_where_the_sequence_does(memory: PhysicalMemory, tree: Tree) -> None:
    for index in range(8):
        tree.page(index * KIB4, RAM + index * KIB4)
    tree.page(5 * KIB4, RAM + 5 * KIB4, PAGE_RO)
    first = walk(memory, tree.context, 0x800, Access.READ)
    assert like_pages(memory, tree.context, first, 100) == 5
    assert like_pages(memory, tree.context, first, 3) == 3
    assert like_pages(memory, tree.context, first, 1) == 1
    sixth = walk(memory, tree.context, 5 * KIB4, Access.READ)
    assert like_pages(memory, tree.context, sixth, 100) == 1


def test_pages_alike_end_with_the_table_and_the_output_size(
    memory: PhysicalMemory, tree: Tree
) -> None:
    for index in range(4):
        tree.page(MIB2 - 2 * KIB4 + index * KIB4, RAM + index * KIB4)
        tree.page(2 * MIB2 + index * KIB4, (1 << 40) - 2 * KIB4 + index * KIB4)
    top = walk(memory, tree.context, 2 * MIB2 + 0xFFF, Access.READ)
    assert like_pages(memory, tree.context, top, 100) == 2
    memory.write_u64(RAM + 0x4000, RAM + 2 * KIB4 | PAGE_RWX)  # follows in memory, not in the tree
    last = walk(memory, tree.context, MIB2 - 2 * KIB4, Access.READ)
    assert last.entry == RAM + 0x3FF0
    assert like_pages(memory, tree.context, last, 100) == 2


@dataclass(frozen=True)
class Mapping:
    """A model's knowledge of one leaf."""

    level: int
    slot: int
    pa_page: int
    low: int

    @property
    def size(self) -> int:
        return SIZES[self.level]

    @property
    def ipa(self) -> int:
        return self.slot * self.size

    @property
    def pa(self) -> int:
        return self.pa_page * KIB4 & -self.size & (1 << 41) - 1


def outcome(
    memory: PhysicalMemory, ctx: Stage2Context, ipa: int, access: Access
) -> Translation | Stage2Fault:
    try:
        return walk(memory, ctx, ipa, access)
    except Stage2Fault as fault:
        return fault


mappings = st.lists(
    st.builds(
        Mapping,
        level=st.sampled_from((1, 2, 3)),
        slot=st.integers(0, 1023),
        pa_page=st.integers(0, (1 << 29) - 1),
        low=st.sampled_from((0x7FC, 0x77C, 0x7BC, 0x73C, 0x3FC, 0x7FC | XN, 0x7FC | 1 << 53)),
    ),
    max_size=12,
)
offsets = st.lists(st.tuples(st.integers(0, 11), st.integers(-1, GIB1)), max_size=20)


def model(known: list[Mapping], ipa: int, access: Access) -> int:
    """PA, or minus the fault status code, from the list of mappings alone."""
    for one in known:
        if one.ipa <= ipa < one.ipa + one.size:
            if one.pa >> 40:
                return -one.level
            if not one.low & 1 << 10:
                return -(0x08 + one.level)
            forbidden = {
                Access.READ: not one.low & 1 << 6,
                Access.WRITE: not one.low & 1 << 7,
                Access.FETCH: bool(one.low >> 53 & 3),
            }
            return -(0x0C + one.level) if forbidden[access] else one.pa + ipa - one.ipa
    ends = [1]
    for one in known:
        if one.level >= 2 and one.ipa // GIB1 == ipa // GIB1:
            ends.append(2)
        if one.level == 3 and one.ipa // MIB2 == ipa // MIB2:
            ends.append(3)
    return -(0x04 + max(ends))


@given(mappings, offsets, st.sampled_from(Access))
def test_the_walker_agrees_with_a_model(
    wanted: list[Mapping], probes: list[tuple[int, int]], access: Access
) -> None:
    memory = PhysicalMemory(RAM, RAM_BYTES)
    tree = Tree(memory, RAM)
    known: list[Mapping] = []
    for one in wanted:
        if all(one.ipa + one.size <= k.ipa or k.ipa + k.size <= one.ipa for k in known):
            known.append(one)
            tree.put(one.ipa, one.level, one.pa | one.low | (3 if one.level == 3 else 1))
    for index, offset in [*probes, *((n, 0) for n in range(len(known)))]:
        base = known[index % len(known)].ipa if known else 0
        ipa = (base + offset) % IPA_END
        got = outcome(memory, tree.context, ipa, access)
        if isinstance(got, Translation):
            assert got.pa == model(known, ipa, access)
        else:
            assert -got.fsc == model(known, ipa, access)
            assert got.level == got.fsc & 3
    assert {(ipa, level) for ipa, level, _ in iter_leaves(memory, tree.context)} == {
        (one.ipa, one.level) for one in known
    }


@given(
    words=st.lists(st.tuples(st.integers(0, 8 * 512 - 1), rubbish_word), max_size=40),
    vttbr=st.one_of(st.just(RAM), st.integers(0, (1 << 64) - 1)),
    vtcr=st.one_of(st.just(VTCR_40), st.integers(0, (1 << 64) - 1)),
    ipas=st.lists(st.one_of(st.integers(0, 1 << 64), st.integers(0, 1 << 24)), max_size=20),
    access=st.sampled_from(Access),
)
def test_rubbish_ends_in_a_translation_or_a_fault(
    words: list[tuple[int, int]], vttbr: int, vtcr: int, ipas: list[int], access: Access
) -> None:
    memory = PhysicalMemory(RAM, 16 * KIB4)
    for index, word in words:
        memory.words[index] = word
    ctx = Stage2Context(vttbr, vtcr)
    for ipa in ipas:
        found = outcome(memory, ctx, ipa, access)
        if isinstance(found, Stage2Fault):
            assert 0 <= found.level <= 3
            assert found.words
        else:
            assert found.descriptor == memory.read_u64(found.entry)
            assert leaf(memory, ctx, ipa) == (found.descriptor, found.level)
