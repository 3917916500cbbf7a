# SPDX-License-Identifier: GPL-2.0-or-later
"""Many pages at once do what one at a time does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_hyp_pgtable import GIB, MIB2, PAGE_RWX, RAM, Tree

from pkvm.arm64.stage2 import ATTR_NORMAL_RWX
from pkvm.hyp.bulk import (
    Frames,
    clear,
    index_of,
    leaves,
    missing_tables,
    page_entries,
    regions_of,
    runs_of,
    splits,
    splits_at_ends,
    splits_to_pages,
    write_pages,
)

some_frames = st.sets(
    st.integers(0, 20) | st.integers(500, 530) | st.integers(0x40000, 0x40010), min_size=1
).map(lambda frames: np.array(sorted(frames), np.int64))


@given(some_frames)
def test_regions(frames: Frames) -> None:
    regions = regions_of(frames)
    assert [region.number for region in regions] == sorted({int(at) >> 9 for at in frames})
    for region in regions:
        inside = frames[region.start : region.end]
        assert set((inside >> 9).tolist()) == {region.number}
    assert sum(region.end - region.start for region in regions) == frames.size


def test_no_frames_have_no_regions() -> None:
    assert regions_of(np.empty(0, np.int64)) == []


def test_index_is_a_slice_only_if_dense() -> None:
    assert index_of(np.array([4, 5, 6])) == slice(4, 7)
    assert isinstance(index_of(np.array([4, 6])), np.ndarray)


def test_runs() -> None:
    assert runs_of(np.array([7, 8, 9, 3, 4, 6])) == [(0, 7, 3), (3, 3, 2), (5, 6, 1)]
    assert runs_of(np.array([7])) == [(0, 7, 1)]


@given(some_frames, some_frames)
def test_write_and_clear_as_put_does(first: Frames, second: Frames) -> None:
    """Two writes, then a clear of the first, against `put`, refcounts and free pages included."""
    bulk, single = Tree(), Tree()
    for frames, entry in ((first, 0x2000_0000_0000_0002), (second, RAM | PAGE_RWX)):
        taken = set(leaves(bulk.stage2, 0, 1 << 28).frames.tolist())
        frames = np.array([at for at in frames.tolist() if at not in taken], np.int64)
        write_pages(bulk.stage2, frames, np.full(frames.size, entry, np.uint64))
        for frame in frames.tolist():
            single.stage2.put(frame << 12, entry)
    write_pages(bulk.stage2, first, None)
    for frame in first.tolist():
        single.stage2.put(frame << 12, 0)
    everything = leaves(bulk.stage2, 0, 1 << 28)
    expected = leaves(single.stage2, 0, 1 << 28)
    assert everything.frames.tolist() == expected.frames.tolist()
    assert everything.entries.tolist() == expected.entries.tolist()
    assert bulk.pool.available == single.pool.available
    assert bulk.vmemmap.refcounts.sum() == single.vmemmap.refcounts.sum()


def test_overwriting_a_valid_entry_is_told() -> None:
    tree = Tree()
    frames = np.array([3, 4])
    assert not write_pages(tree.stage2, frames, np.array([2, RAM | PAGE_RWX], np.uint64))
    assert write_pages(tree.stage2, frames, np.array([2, 2], np.uint64))
    assert not write_pages(tree.stage2, frames, None)


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
    clear(stage2, found)
    assert leaves(stage2, 0, 1 << 28).frames.size == 0
    assert len(tree.tables()) == 2


def test_missing_tables_counts_what_put_takes() -> None:
    tree = Tree()
    stage2 = tree.stage2
    for region, blocks in (
        ([0, 1], []),
        ([0, 1, 512], []),
        ([], [(1 << 19, 2), (2 << 19, 1)]),
        ([4], [(512, 2), (1 << 20, 2)]),
    ):
        missing = missing_tables(stage2, region, blocks)
        before = tree.pool.available
        for number in region:
            stage2.put(number << 21, RAM | PAGE_RWX)
        for frame, level in blocks:
            stage2.put(frame << 12, RAM | ATTR_NORMAL_RWX, level)
        assert before - tree.pool.available == missing
        clear(stage2, leaves(stage2, 0, 1 << 28))


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
