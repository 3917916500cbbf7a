# SPDX-License-Identifier: GPL-2.0-or-later
"""Many pages at once do what one at a time does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyp.test_hyp_pgtable import GIB, MIB2, PAGE_RWX, RAM, Tree
from pkvm.arm64.stage2 import ATTR_NORMAL_RWX, TABLE_OR_PAGE
from pkvm.hyp.bulk import (
    Frames,
    Runs,
    blocks_at,
    break_blocks,
    clear,
    clear_leaves,
    cut,
    joined,
    leaves,
    missing_tables,
    one_run,
    page_entries,
    runs_in,
    runs_of,
    splits,
    splits_at_ends,
    splits_to_pages,
    write,
)
from pkvm.hyp.errors import HypBug

some_frames = st.sets(
    st.integers(0, 20) | st.integers(500, 530) | st.integers(0x40000, 0x40010), min_size=1
).map(lambda frames: np.array(sorted(frames), np.int64))


def numbers(runs: Runs) -> list[int]:
    """Every number of the runs."""
    return [start + at for start, size in zip(*runs, strict=True) for at in range(size)]


def assert_same(one: Tree, two: Tree) -> None:
    """Both trees have the same leaves and took as many pages, and refcounts are exact."""
    found, expected = (leaves(tree.stage2, 0, 1 << 28) for tree in (one, two))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tolist() == theirs.tolist()
    assert one.pool.available == two.pool.available
    for tree in (one, two):
        for pa in tree.tables():
            assert tree.refcount(pa) == 1 + np.count_nonzero(tree.memory.table(pa))
    assert one.vmemmap.refcounts.sum() == two.vmemmap.refcounts.sum()


@given(some_frames)
def test_runs_are_the_numbers(frames: Frames) -> None:
    runs = runs_in(frames)
    assert numbers(runs) == frames.tolist()
    assert (runs.ends[:-1] < runs.starts[1:]).all(), "no two of them continue each other"
    single = Runs(frames, np.ones(frames.size, np.int64))
    assert [column.tolist() for column in joined(single)] == [column.tolist() for column in runs]
    pieces, of = cut(runs)
    assert numbers(pieces) == frames.tolist()
    assert (pieces.starts >> 9 == pieces.ends - 1 >> 9).all()
    assert (pieces.starts >= runs.starts[of]).all()
    assert (pieces.ends <= runs.ends[of]).all()


def test_runs() -> None:
    assert runs_of(np.array([7, 8, 9, 3, 4, 6])) == [(0, 7, 3), (3, 3, 2), (5, 6, 1)]
    assert runs_of(np.array([7])) == [(0, 7, 1)]


@given(some_frames, some_frames, st.sampled_from([2, 3]))
def test_write_and_clear_as_put_does(first: Frames, second: Frames, level: int) -> None:
    """Two writes, then a clear of the first, against `put`, refcounts and free pages included."""
    bulk, single = Tree(), Tree()
    shift = 12 + 9 * (3 - level)
    page = TABLE_OR_PAGE if level == 3 else 0
    for frames, entry, step in (
        (first, 0x2000_0000_0000_0002, 1 << 20),
        (second, RAM | ATTR_NORMAL_RWX | page, 1 << shift),
    ):
        taken = set((leaves(bulk.stage2, 0, 1 << 28).frames >> shift - 12).tolist())
        runs = runs_in(np.array([at for at in frames.tolist() if at not in taken]))
        if not runs.starts.size:
            continue
        firsts = np.uint64(entry) + runs.starts.astype(np.uint64) * np.uint64(step)
        missing = missing_tables(bulk.stage2, [(level, runs)])
        before = bulk.pool.available
        assert not write(bulk.stage2, runs, firsts, step, level)
        assert before - bulk.pool.available == missing
        for frame in numbers(runs):
            single.stage2.put(frame << shift, entry + frame * step, level)
    assert_same(bulk, single)
    clear(bulk.stage2, runs_in(first), level)
    for frame in first.tolist():
        single.stage2.put(frame << shift, 0, level)
    assert_same(bulk, single)


@pytest.mark.parametrize(("start", "size"), [(0, 512), (0, 1536), (5, 1530), (512, 600), (3, 4)])
def test_whole_tables(start: int, size: int) -> None:
    bulk, single = Tree(), Tree()
    for tree in (bulk, single):
        tree.stage2.put(7 << 12, 2)
        tree.stage2.put(2000 << 12, 2)
    firsts = np.array([RAM | PAGE_RWX], np.uint64)
    assert not write(bulk.stage2, one_run(start, size), firsts, 0x1000)
    for at in range(size):
        single.stage2.put(start + at << 12, RAM + at * 0x1000 | PAGE_RWX)
    assert_same(bulk, single)
    assert write(bulk.stage2, one_run(start, size), firsts - firsts + np.uint64(2), 0)
    clear(bulk.stage2, one_run(start, size))
    for at in range(size):
        single.stage2.put(start + at << 12, 0)
    assert_same(bulk, single)


def test_overwriting_a_valid_entry_is_told() -> None:
    tree = Tree()
    frames = runs_in(np.array([3, 5]))
    assert not write(tree.stage2, frames, np.array([2, RAM | PAGE_RWX], np.uint64), 0)
    assert write(tree.stage2, frames, np.array([2, 2], np.uint64), 0)
    assert not write(tree.stage2, frames, np.array([4, 4], np.uint64), 0)


def test_what_stands_in_the_way_is_a_bug() -> None:
    tree = Tree()
    tree.stage2.put(0, RAM | ATTR_NORMAL_RWX, 2)
    tree.stage2.put(MIB2, RAM | PAGE_RWX)
    page, block = (np.array([RAM | attr], np.uint64) for attr in (PAGE_RWX, ATTR_NORMAL_RWX))
    with pytest.raises(HypBug, match="leaf stands"):
        write(tree.stage2, one_run(5, 1), page, 0)
    with pytest.raises(HypBug, match="table stands"):
        write(tree.stage2, one_run(1, 1), block, 0, 2)
    with pytest.raises(HypBug, match="table stands"):
        clear(tree.stage2, one_run(0, 2), 2)


def test_blocks_are_broken_once() -> None:
    tree = Tree()
    tree.stage2.put(0, GIB | ATTR_NORMAL_RWX, 1)
    for region in (512, 513):
        tree.stage2.put(region * MIB2, RAM | ATTR_NORMAL_RWX, 2)
    tree.stage2.put(514 * MIB2, RAM | PAGE_RWX)
    assert (
        blocks_at(tree.stage2, np.array([0, 511, 512, 514, 600])).tolist()
        == [True] * 3 + [False] * 2
    )
    around = Runs(np.array([5, (513 << 9) - 1]), np.array([1600, 3 << 9]))
    assert break_blocks(tree.stage2, around)
    assert leaves(tree.stage2, 0, 1 << 28).frames.tolist() == [514 << 9]
    assert not break_blocks(tree.stage2, around)


def test_leaves_of_all_sizes() -> None:
    tree = Tree()
    stage2 = tree.stage2
    stage2.put(0, GIB | ATTR_NORMAL_RWX, 1)
    stage2.put(GIB + MIB2, RAM | ATTR_NORMAL_RWX, 2)
    stage2.put((1 << 40) - 4096, RAM | PAGE_RWX)
    found = leaves(stage2, 0, 1 << 28)
    assert found.frames.tolist() == [0, (GIB + MIB2) >> 12, (1 << 28) - 1]
    assert found.levels.tolist() == [1, 2, 3]
    assert found.npages.tolist() == [1 << 18, 512, 1]
    inside = leaves(stage2, 5, 1)
    assert inside.frames.tolist() == [0], "a block that overlaps the range counts"
    frames, pfns = page_entries(leaves(stage2, GIB >> 12, 1 << 18))
    assert frames.tolist() == list(range((GIB + MIB2) >> 12, (GIB + 2 * MIB2) >> 12))
    assert pfns.tolist() == list(range(RAM >> 12, (RAM + MIB2) >> 12))
    clear_leaves(stage2, found)
    assert leaves(stage2, 0, 1 << 28).frames.size == 0
    assert len(tree.tables()) == 2


def test_missing_tables_counts_what_put_takes() -> None:
    tree = Tree()
    stage2 = tree.stage2
    for regions, blocks in (
        ([0, 1], []),
        ([0, 1, 512], []),
        ([], [(1 << 19, 2), (2 << 19, 1)]),
        ([4], [(512, 2), (1 << 20, 2)]),
    ):
        wanted = [(3, one_run(region << 9, 3)) for region in regions]
        wanted += [(level, one_run(frame >> 9 * (3 - level), 1)) for frame, level in blocks]
        missing = missing_tables(stage2, wanted)
        before = tree.pool.available
        for number in regions:
            stage2.put(number << 21, RAM | PAGE_RWX)
        for frame, level in blocks:
            stage2.put(frame << 12, RAM | ATTR_NORMAL_RWX, level)
        assert before - tree.pool.available == missing
        clear_leaves(stage2, leaves(stage2, 0, 1 << 28))


@pytest.mark.parametrize(
    ("frame", "nr", "cuts"),
    [(0, 1 << 18, 0), (0, 1, 2), (5, 512, 3), (512, 512, 1), (100, 3, 2), (0, 512, 1)],
)
def test_splits_at_ends_of_a_gigabyte_block(frame: int, nr: int, cuts: int) -> None:
    tree = Tree()
    tree.stage2.put(0, GIB | ATTR_NORMAL_RWX, 1)
    todo = splits_at_ends(tree.stage2, frame, nr)
    assert len(todo) == cuts
    for ipa in todo:
        tree.stage2.split(ipa)
    covered = leaves(tree.stage2, frame, nr)
    assert int(covered.frames[0]) == frame
    assert int(covered.npages.sum()) == nr


def test_splits_to_pages() -> None:
    tree = Tree()
    tree.stage2.put(0, GIB | ATTR_NORMAL_RWX, 1)
    todo = splits_to_pages(tree.stage2, 500, 30)
    assert len(todo) == 3
    for ipa in todo:
        tree.stage2.split(ipa)
    assert set(leaves(tree.stage2, 500, 30).levels.tolist()) == {3}
    assert splits(tree.stage2, [(500 << 12, 3)]) == []
