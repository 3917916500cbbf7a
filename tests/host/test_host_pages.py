# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's page allocator."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fakes.host_fakes import BLOCK, PAGE, RAM_BASE, FakeBus, errno_of
from pkvm.host.pages import Hold, PageAllocator, PageRun

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


def test_of_a_run_lives_on_what_is_held() -> None:
    pages = allocator()
    run = PageRun(pages, 100)
    mapping, pins = run.hold((0, 100)), run.hold()
    pins.append((10, 20))
    other = run.hold((29, 2), (10, 1))
    run.release(mapping)
    assert pages.free_pages == PAGES - 21
    run.release(pins)
    assert pages.free_pages == PAGES - 3
    run.release(other)
    assert pages.free_pages == PAGES


class Holding(RuleBasedStateMachine):
    """A page of a run is free exactly if nobody holds it any more."""

    RUN = 16
    parts = st.tuples(st.integers(0, 15), st.integers(1, 16)).map(
        lambda part: (part[0], min(part[1], 16 - part[0]))
    )

    def __init__(self) -> None:
        super().__init__()
        self.pages = allocator()
        self.holds: list[Hold] = []
        self.map()

    @precondition(lambda self: not self.mapping and not self.holds)
    @rule()
    def map(self) -> None:
        self.run_ = PageRun(self.pages, self.RUN)
        self.mapping = [self.run_.hold((0, self.RUN))]

    @precondition(lambda self: self.mapping)
    @rule(parts=st.lists(parts, max_size=3))
    def hold(self, parts: list[tuple[int, int]]) -> None:
        self.holds.append(self.run_.hold(*parts))

    @precondition(lambda self: self.mapping and self.holds)
    @rule(part=parts)
    def hold_more(self, part: tuple[int, int]) -> None:
        self.holds[0].append(part)

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        gone = data.draw(st.sets(st.integers(0, len(self.holds) - 1)))
        self.run_.release(*(self.holds[index] for index in gone))
        self.holds = [hold for index, hold in enumerate(self.holds) if index not in gone]

    @precondition(lambda self: self.holds)
    @rule(data=st.data(), page=st.integers(0, 15))
    def give_up(self, data: st.DataObject, page: int) -> None:
        hold = self.holds[data.draw(st.integers(0, len(self.holds) - 1))]
        if sum(first <= page < first + npages for first, npages in hold) == 1:
            self.run_.give_up(hold, page)
            assert not any(first <= page < first + npages for first, npages in hold)

    @precondition(lambda self: self.mapping and len(self.holds) > 2)
    @rule()
    def unmap(self) -> None:
        self.run_.release(self.mapping.pop())

    @invariant()
    def the_rest_is_free(self) -> None:
        kept = {
            page
            for hold in (*self.mapping, *self.holds)
            for first, npages in hold
            for page in range(first, first + npages)
        }
        free: set[int] = set()
        for start, end in self.pages._free:
            free.update(range(start - self.run_.pfn, end - self.run_.pfn))
        assert free.isdisjoint(kept)
        assert len(free) == PAGES - len(kept)


TestHolding = Holding.TestCase
TestHolding.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


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
