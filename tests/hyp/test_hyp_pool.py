# SPDX-License-Identifier: GPL-2.0-or-later
"""Free pages of EL2's: zero when they come out, linked while they are in."""

from __future__ import annotations

import numpy as np
import pytest

from pkvm.hyp.errors import Errno, HypBug, Refused
from pkvm.hyp.pool import PagePool, PageStack
from pkvm.hyp.vmemmap import Vmemmap
from pkvm.machine.memory import PhysicalMemory

RAM = 0x8000_0000
PAGE = 4096


@pytest.fixture
def memory() -> PhysicalMemory:
    return PhysicalMemory(RAM, 64 * PAGE)


@pytest.fixture
def vmemmap(memory: PhysicalMemory) -> Vmemmap:
    return Vmemmap(memory, RAM)


def test_stack_zeroes_links_and_counts(memory: PhysicalMemory, vmemmap: Vmemmap) -> None:
    stack = PageStack(memory, vmemmap)
    first, second = RAM + 8 * PAGE, RAM + 9 * PAGE
    for pa in (first, second):
        memory.write(pa, b"\xaa" * PAGE)
        vmemmap.refcount[(pa - RAM) // PAGE] = 7
        stack.free(pa)
        assert vmemmap.refcount[(pa - RAM) // PAGE] == 0
    assert stack.available == 2
    assert stack.pages() == [second, first]
    assert memory.read_u64(second) == first
    assert memory.read(second + 8, PAGE - 8) == bytes(PAGE - 8)
    assert stack.alloc() == second
    assert memory.read(second, PAGE) == bytes(PAGE)
    assert vmemmap.refcount[9] == 1
    assert stack.alloc() == first
    with pytest.raises(HypBug):
        stack.alloc()


def test_many_pages_come_and_go_as_single_ones_do(memory: PhysicalMemory, vmemmap: Vmemmap) -> None:
    stack = PageStack(memory, vmemmap)
    pas = np.array([RAM + at * PAGE for at in (8, 12, 9)], np.uint64)
    for pa in pas.tolist():
        memory.write(pa, b"\xaa" * PAGE)
        vmemmap.refcount[(pa - RAM) // PAGE] = 1
    stack.free_many(pas)
    stack.free_many(pas[:0])
    assert stack.available == 3
    assert stack.pages() == pas.tolist()[::-1]
    assert not vmemmap.refcounts.any()
    with pytest.raises(HypBug):
        stack.alloc_many(4)
    assert stack.alloc_many(2).tolist() == pas.tolist()[:0:-1]
    assert vmemmap.refcounts[[8, 12, 9]].tolist() == [0, 1, 1]
    assert not memory.table(RAM + 9 * PAGE).any()
    assert stack.pages() == [RAM + 8 * PAGE]


def test_pool_gives_many_freed_pages_first(memory: PhysicalMemory, vmemmap: Vmemmap) -> None:
    pool = PagePool(memory, vmemmap, RAM + 16 * PAGE, 8 * PAGE)
    first = pool.alloc_many(2)
    pool.free_many(first)
    assert pool.alloc_many(3).tolist() == [*first.tolist()[::-1], RAM + 18 * PAGE]
    with pytest.raises(Refused):
        pool.alloc_many(6)
    assert pool.available == 5


def test_pool_hands_out_each_page_once(memory: PhysicalMemory, vmemmap: Vmemmap) -> None:
    pool = PagePool(memory, vmemmap, RAM + 16 * PAGE, 8 * PAGE)
    assert pool.available == 8
    pages = [pool.alloc() for _ in range(8)]
    assert sorted(pages) == [RAM + (16 + at) * PAGE for at in range(8)]
    assert pool.available == 0
    with pytest.raises(Refused) as refusal:
        pool.alloc()
    assert refusal.value.errno == Errno.ENOMEM
    pool.free(pages[3])
    assert pool.alloc() == pages[3]


def test_pool_aligns_roots_and_wastes_nothing(memory: PhysicalMemory, vmemmap: Vmemmap) -> None:
    pool = PagePool(memory, vmemmap, RAM + 17 * PAGE, 8 * PAGE)
    root = pool.alloc_aligned(4)
    assert root == RAM + 20 * PAGE
    assert [vmemmap.refcount[page] for page in range(16, 26)] == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0]
    assert pool.available == 4
    with pytest.raises(Refused):
        pool.alloc_aligned(4)
    assert len({pool.alloc() for _ in range(4)}) == 4
