# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's page allocator."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fakes.host_fakes import BLOCK, PAGE, RAM_BASE, FakeBus, errno_of
from pkvm.host.pages import PageAllocator, PageRun, Part

ENOMEM = 12
PAGES = 2048


def allocator(bus: FakeBus | None = None, *, misalign: bool = False) -> PageAllocator:
    return PageAllocator(bus or FakeBus(), [(RAM_BASE, PAGES * PAGE)], misalign=misalign)


def test_large_runs_are_aligned_to_a_block_and_misaligned_on_request() -> None:
    assert allocator().alloc(512) % BLOCK == 0
    assert allocator(misalign=True).alloc(512) % BLOCK == PAGE


def test_small_runs_stay_out_of_the_way_of_blocks() -> None:
    pages = allocator()
    pages.alloc(1)
    assert [pages.alloc(512) for _ in range(3)] == [RAM_BASE + n * BLOCK for n in range(3)]
    assert errno_of(lambda: pages.alloc(512)) == ENOMEM


def test_a_small_run_is_aligned_as_asked() -> None:
    pages = allocator()
    pages.alloc(1)
    assert pages.alloc(2, align=2) % (2 * PAGE) == 0


def test_a_used_page_is_zero_when_it_is_handed_out_again() -> None:
    bus = FakeBus()
    pages = allocator(bus)
    pa = pages.alloc(PAGES - 1)
    bus.write(pa + 5 * PAGE, b"secret")
    pages.free(pa, PAGES - 1)
    again = pages.alloc(PAGES - 1)
    assert bus.read(again, (PAGES - 1) * PAGE) == bytes((PAGES - 1) * PAGE)


def test_freeing_twice_is_a_bug_and_is_said() -> None:
    pages = allocator()
    pa = pages.alloc(4)
    pages.free(pa, 4)
    with pytest.raises(AssertionError):
        pages.free(pa + PAGE)


def test_ranges_must_be_whole_pages_and_separate() -> None:
    for ranges in ([(RAM_BASE + 1, PAGE)], [(RAM_BASE, 0)], [(RAM_BASE, 2 * PAGE)] * 2):
        with pytest.raises(ValueError, match=r"not page-aligned|overlaps"):
            PageAllocator(FakeBus(), ranges)


def test_of_a_run_lives_on_what_is_pinned() -> None:
    pages = allocator()
    run = PageRun(pages, 100)
    run.hold(Part(10, 20))
    run.hold(Part(29, 2))
    run.release([Part(0, 100)])
    assert pages.free_pages == PAGES - 21
    run.release([Part(10, 20)])
    assert pages.free_pages == PAGES - 2
    run.release([Part(29, 2)])
    assert pages.free_pages == PAGES


class Pinning(RuleBasedStateMachine):
    """A page of a run is free exactly if it is neither mapped nor pinned."""

    RUN = 16
    parts = st.builds(
        lambda first, npages: Part(first, min(npages, 16 - first)),
        st.integers(0, 15),
        st.integers(1, 16),
    )

    def __init__(self) -> None:
        super().__init__()
        self.pages = allocator()
        self.run_ = PageRun(self.pages, self.RUN)
        self.mapped = True
        self.pinned: list[Part] = []

    @precondition(lambda self: self.mapped or self.pinned)
    @rule(part=parts, again=st.booleans())
    def pin(self, part: Part, again: bool) -> None:
        if self.mapped or again:
            part = part if self.mapped else self.pinned[0]
            self.run_.hold(part)
            self.pinned.append(part)

    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        gone = data.draw(st.lists(st.sampled_from(range(len(self.pinned))), unique=True)
                         if self.pinned else st.just([]))  # fmt: skip
        self.run_.release([self.pinned[index] for index in gone])
        self.pinned = [part for index, part in enumerate(self.pinned) if index not in gone]

    @precondition(lambda self: self.mapped and len(self.pinned) > 2)
    @rule()
    def unmap(self) -> None:
        self.run_.release([Part(0, self.RUN)])
        self.mapped = False

    @invariant()
    def the_rest_is_free(self) -> None:
        kept = set(range(self.RUN)) if self.mapped else set()
        for part in self.pinned:
            kept.update(range(part.first, part.end))
        free: set[int] = set()
        for start, end in self.pages._free:
            free.update(range(start - (self.run_.pa >> 12), end - (self.run_.pa >> 12)))
        assert free.isdisjoint(kept)
        assert len(free) == PAGES - len(kept)


TestPinning = Pinning.TestCase
TestPinning.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


class Allocation(RuleBasedStateMachine):
    """Runs never overlap, nothing is lost, whatever the order."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = allocator()
        self.live: dict[int, int] = {}

    @rule(npages=st.integers(1, 700), align=st.sampled_from([1, 2, 8]))
    def alloc(self, npages: int, align: int) -> None:
        try:
            pa = self.pages.alloc(npages, align)
        except OSError:
            return
        assert pa % (align * PAGE) == 0
        for other, count in self.live.items():
            assert pa + npages * PAGE <= other or other + count * PAGE <= pa
        self.live[pa] = npages

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free_a_part(self, data: st.DataObject) -> None:
        pa = data.draw(st.sampled_from(sorted(self.live)))
        count = self.live.pop(pa)
        part = data.draw(st.integers(1, count))
        self.pages.free(pa, part)
        if part < count:
            self.live[pa + part * PAGE] = count - part

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.pages.free_pages + sum(self.live.values()) == PAGES


TestAllocation = Allocation.TestCase
TestAllocation.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
