# SPDX-License-Identifier: GPL-2.0-or-later
"""What the host's devices reach: an identity map of the RAM that the host may access (facts §10).

It is made at once, since a device's fault cannot be repaired, and follows every
change of ownership. A block that loses one page is split, contents preserved;
the table stays until the whole region is the host's again, for a guest's page
that is shared now and then comes and goes. Device windows are no targets of DMA.

A page that is lost is out of the SMMU's reach when `lose_page` or `lose_runs`
returns; one that comes back was invalid before, and needs no invalidation.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pkvm.arm64.smmu import stage2_ste
from pkvm.arm64.stage2 import (
    ATTR_NORMAL_RWX,
    BLOCK_2M,
    BLOCK_LEVELS,
    LAST_LEVEL,
    PAGE_SIZE,
    TABLE_ENTRIES,
    TABLE_OR_PAGE,
    XN_NONE,
    level_shift,
    level_size,
)
from pkvm.hyp.bulk import Runs, blocks_at, clear, distinct, prune_tables, runs_in, write
from pkvm.hyp.pgtable import Stage2
from pkvm.hyp.smmu import SmmuDriver

IDENTITY_VMID = 0
"""In the SMMU, whose VMIDs are not the CPU's."""
ATTR_DMA = ATTR_NORMAL_RWX | XN_NONE
DMA_PAGE = ATTR_DMA | TABLE_OR_PAGE
_TABLE_SHIFT = 9


class IdentityDomain:
    """The tree `stage2`, and the SMMU that walks it. Pages lie in RAM: the callers have checked.
    `reserve` sees to it that there are pages for the tables that one page needs; for runs the
    caller has."""

    def __init__(self, stage2: Stage2, smmu: SmmuDriver, *, reserve: Callable[[], None]) -> None:
        self._reserve = reserve
        self.stage2 = stage2
        self._smmu = smmu

    @property
    def ste(self) -> tuple[int, int, int, int]:
        """The STE of a stream that belongs here."""
        return stage2_ste(self.stage2.vttbr, self.stage2.vtcr)

    def map(self, pa: int, end: int) -> None:
        """Map RAM [pa, end), page-aligned, in blocks where it goes: for memory that no device has
        reached before."""
        while pa < end:
            if pa % BLOCK_2M == 0 and pa + BLOCK_2M <= end:
                self.stage2.put(pa, pa | ATTR_DMA, BLOCK_LEVELS[-1])
                pa += BLOCK_2M
            else:
                self.stage2.put(pa, pa | DMA_PAGE)
                pa += PAGE_SIZE

    def lose_page(self, pa: int) -> None:
        """The page at `pa` is not the host's any more."""
        stage2 = self.stage2
        self._reserve()
        index, _, level = stage2.find(pa)
        if level < LAST_LEVEL:
            stage2.split(pa)
            index, _, level = stage2.find(pa)
        stage2.clear(index)
        self._smmu.invalidate_page(IDENTITY_VMID, pa)

    def regain_page(self, pa: int) -> None:
        """The page at `pa`, which was lost, is the host's again."""
        self._reserve()
        self.stage2.put(pa, pa | DMA_PAGE)

    def lose_runs(self, pieces: Runs) -> None:
        """These frames are not the host's any more: a block goes whole if all of it is lost, else
        it is split. No piece straddles a block."""
        stage2 = self.stage2
        is_block = blocks_at(stage2, pieces.starts >> _TABLE_SHIFT)
        whole = is_block & (pieces.sizes == TABLE_ENTRIES)
        for region in distinct(pieces.starts[is_block & ~whole] >> _TABLE_SHIFT).tolist():
            stage2.split(region * BLOCK_2M)
        clear(stage2, runs_in(pieces.starts[whole] >> _TABLE_SHIFT), BLOCK_LEVELS[-1])
        clear(stage2, pieces.where(~whole))
        self._smmu.invalidate_all(IDENTITY_VMID)

    def regain_runs(self, pieces: Runs) -> None:
        """These frames are the host's again. No piece straddles a block."""
        whole = pieces.sizes == TABLE_ENTRIES
        blocks = pieces.starts[whole] >> _TABLE_SHIFT
        prune_tables(self.stage2, blocks)
        self._write(runs_in(blocks), BLOCK_LEVELS[-1], ATTR_DMA)
        self._write(pieces.where(~whole), LAST_LEVEL, DMA_PAGE)

    def _write(self, runs: Runs, level: int, attributes: int) -> None:
        """Map runs at `level` where they are."""
        firsts = (runs.starts << level_shift(level)).astype(np.uint64) | np.uint64(attributes)
        write(self.stage2, runs, firsts, level_size(level), level)
