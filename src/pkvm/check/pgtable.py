# SPDX-License-Identifier: GPL-2.0-or-later
"""P5: pages of tables, and free ones kept for them (facts §11.3)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pkvm.arm64.stage2 import PAGE_SHIFT, TABLE_ENTRIES
from pkvm.check.trees import Numbers, rows_at
from pkvm.check.view import DMA, View
from pkvm.hyp.pool import PageStack

_TREE_SHIFT = 40
"""In a key of tree and region: a region has fewer bits."""


def tables(view: View) -> Iterator[str]:
    """P5: a table is EL2's page, is used once, is not empty unless it is one of the DMA masters'
    tables of pages, and its refcount is 1 plus its entries; a page in a memcache is EL2's, in one
    only, and has refcount 0 and is zero."""
    forest = view.forest
    pages = [part.pages for part, _ in forest.above] + [forest.last.pages]
    trees = [part.trees for part, _ in forest.above] + [forest.last.trees]
    used = [np.zeros(0, np.int64), *(count for _, count in forest.above)]
    used += [
        np.count_nonzero(rows_at(forest.grid, part.pages), axis=1) for part in forest.last.pieces()
    ]
    yield from _used_tables(
        view,
        np.concatenate(pages),
        np.concatenate(trees),
        np.concatenate(used),
        forest.last.pages.size,
    )
    names = [f"a table of {view.name(tree)}" for tree in range(len(forest.trees))]
    stacks: dict[str, PageStack] = {"in EL2's pool": view.mem.pool}
    stacks |= {f"in the memcache of VM {vm.handle:#x}": vm.memcache for vm in view.vms}
    pas = [stack.pages() for stack in stacks.values()]
    free = np.array([pa for some in pas for pa in some], np.int64)
    free = free - view.mem.memory.ram_base >> PAGE_SHIFT
    of = np.repeat(np.arange(len(pas)) + len(names), [len(some) for some in pas])
    names += stacks
    yield from _free_pages(view, free, of, names)
    everything, whose = np.concatenate((*pages, free)), np.concatenate((*trees, of))
    yield from _used_twice(view, everything, whose, names)


def walks(view: View) -> Iterator[str]:
    """P9: EL2's own walk caches lead where the tables do."""
    last = view.forest.last
    caches = [tree.stage2.walks for tree in view.forest.trees]
    regions = np.array([region for cache in caches for region in cache], np.int64)
    firsts = np.array([first for cache in caches for first in cache.values()], np.int64)
    trees = np.repeat(np.arange(len(caches)), [len(cache) for cache in caches])
    # The tables are tree by tree, by rising frame.
    keys = last.trees << _TREE_SHIFT | last.frames >> 9
    wanted = trees << _TREE_SHIFT | regions
    at = np.searchsorted(keys, wanted)
    good = at < keys.size
    good[good] = (keys[at[good]] == wanted[good]) & (last.pages[at[good]] == firsts[good] >> 9)
    good &= firsts & TABLE_ENTRIES - 1 == 0
    for wrong in view.pages(~good):
        ipa, name = int(regions[wrong]) << 21, view.name(trees[wrong])
        yield f"P9: EL2's walk to IPA {ipa:#x} of {name} is stale"


def _used_tables(
    view: View, pages: Numbers, trees: Numbers, used: Numbers, last: int
) -> Iterator[str]:
    """Tables in use, the `last` of them those of the last level, and their numbers of entries."""
    refcounts = view.mem.vmemmap.refcounts[pages]
    roots = np.array([tree.stage2.root for tree in view.forest.trees], np.int64)
    ends = np.array([tree.stage2.root_tables for tree in view.forest.trees], np.int64)
    first = roots[trees] - view.mem.memory.ram_base >> PAGE_SHIFT
    is_root = (pages >= first) & (pages < first + ends[trees])
    for at in view.pages(~view.is_hyp[pages]):
        yield f"P5: table {view.pa(pages[at]):#x} of {view.name(trees[at])} is not EL2's page"
    for at in view.pages(refcounts != used + 1):
        yield (
            f"P5: table {view.pa(pages[at]):#x} of {view.name(trees[at])} has {used[at]} entries, "
            f"refcount {refcounts[at]}"
        )
    may_be_empty = is_root
    if view.first_guest:
        may_be_empty |= (trees == DMA) & (np.arange(pages.size) >= pages.size - last)
    for at in view.pages((used == 0) & ~may_be_empty):
        yield f"P5: table {view.pa(pages[at]):#x} of {view.name(trees[at])} is empty"


def _free_pages(view: View, pages: Numbers, whose: Numbers, names: list[str]) -> Iterator[str]:
    for at in view.pages(~view.is_hyp[pages]):
        yield f"P5: PA {view.pa(pages[at]):#x} is {names[whose[at]]}, but not EL2's page"
    for at in view.pages(view.mem.vmemmap.refcounts[pages] != 0):
        yield f"P5: PA {view.pa(pages[at]):#x} is {names[whose[at]]} and has a refcount"
    for at in view.pages(np.count_nonzero(view.forest.grid[pages, 1:], axis=1) != 0):
        yield f"P5: PA {view.pa(pages[at]):#x} is {names[whose[at]]} and not zero"


def _used_twice(view: View, pages: Numbers, whose: Numbers, names: list[str]) -> Iterator[str]:
    order = np.argsort(pages, kind="stable")
    pages, whose = pages[order], whose[order]
    for at in view.pages(pages[1:] == pages[:-1]):
        first, second = names[whose[at]], names[whose[at + 1]]
        yield f"P5: PA {view.pa(pages[at]):#x} is {first} and {second}"
