# SPDX-License-Identifier: GPL-2.0-or-later
"""P8 for the host's paged domains: what one maps is the host's own and pinned (facts §10, §11.3);
and what is true of every domain, guests' too (`assignment`).

A domain is few pages among many, so its tree is read by the machine's walker,
leaf by leaf.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from pkvm.arm64.smmu import STE2
from pkvm.arm64.stage2 import ADDRESS_MASK, LAST_LEVEL, PAGE_SHIFT, PAGE_SIZE, is_leaf
from pkvm.check.view import View
from pkvm.hyp.host_dma import Domain
from pkvm.hyp.vmemmap import HOST_PINNED
from pkvm.machine.stage2 import Stage2Context, Stage2Fault, iter_leaves, iter_tables, walk


def pins(view: View) -> Iterator[str]:
    """P8: a paged domain maps pages of the host's own, each pinned as often as it is mapped, or
    registers of a device that is tainted; nothing else is pinned."""
    mem = view.mem
    mapped: Counter[int] = Counter()
    for domain in mem.domains.values():
        if domain.vm:
            continue
        for iova, level, entry in iter_leaves(mem.memory, _context(domain)):
            pa = entry & ADDRESS_MASK
            if level != LAST_LEVEL or not is_leaf(entry, level):
                yield f"P8: domain {domain.number} has the strange entry {entry:#x} at {iova:#x}"
            elif mem.memory.is_ram(pa, PAGE_SIZE):
                mapped[pa - mem.memory.ram_base >> PAGE_SHIFT] += 1
            else:
                device = mem.devices.at(pa, PAGE_SIZE)
                if device is None or not mem.devices.is_tainted(device):
                    yield f"P8: domain {domain.number} maps {pa:#x}, no RAM, and nothing notes it"
    for page, times in mapped.items():
        if view.states[page] != HOST_PINNED:
            yield f"P8: PA {view.pa(page):#x} is mapped for DMA in state {view.states[page]:#x}"
        elif mem.vmemmap.refcount[page] != times:
            yield (
                f"P8: PA {view.pa(page):#x} is mapped for DMA {times} times, its refcount is "
                f"{mem.vmemmap.refcount[page]}"
            )
    for page in np.flatnonzero(view.states == HOST_PINNED).tolist():
        if page not in mapped:
            yield f"P8: PA {view.pa(page):#x} is pinned for no domain"


def domain_tables(view: View) -> Iterator[str]:
    """P5: a domain's tables are EL2's pages, with refcount 1 plus entries, and nobody else's."""
    mem = view.mem
    seen: set[int] = set()
    for domain in mem.domains.values():
        for pa in iter_tables(mem.memory, _context(domain)):
            page = pa - mem.memory.ram_base >> PAGE_SHIFT
            used = int(np.count_nonzero(mem.memory.table(pa)))
            if not view.is_hyp[page] or mem.vmemmap.refcount[page] != used + 1 or pa in seen:
                yield (
                    f"P5: table {pa:#x} of domain {domain.number} has {used} entries, refcount "
                    f"{mem.vmemmap.refcount[page]}, or is not its own"
                )
            seen.add(pa)


def stale_domains(view: View) -> Iterator[str]:
    """P9: the SMMU caches nothing of a domain that its tables do not give any more; and a known
    stream follows the identity domain or one that is there."""
    mem = view.mem
    if mem.smmu is None or not mem.protected:
        return
    for device in mem.devices.devices:
        number = STE2["S2VMID"].get(mem.smmu.ste(device.stream)[2])
        if number and number not in mem.domains:
            yield f"P8: stream {device.stream:#x} follows domain {number}, which is not there"
    for vmid, columns in mem.smmu.hardware.tlb_columns().items():
        if not vmid:
            continue
        domain = mem.domains.get(vmid)
        for access, size, numbers, deltas in columns:
            for number, delta in zip(numbers, deltas, strict=True):
                iova = number * size
                try:
                    good = domain is not None and (
                        walk(mem.memory, _context(domain), iova, access).pa == iova + delta
                    )
                except Stage2Fault:
                    good = False
                if not good:
                    yield f"P9: the SMMU still has {iova:#x} of domain {vmid}"


def pages_of_domains(view: View) -> Iterator[int]:
    """PAs of EL2's pages that are domains': tables, and those kept for tables."""
    for domain in view.mem.domains.values():
        yield from iter_tables(view.mem.memory, _context(domain))
        yield from domain.memcache.pages()


def _context(domain: Domain) -> Stage2Context:
    return Stage2Context(domain.stage2.vttbr, domain.stage2.vtcr)
