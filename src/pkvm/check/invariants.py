# SPDX-License-Identifier: GPL-2.0-or-later
"""What must hold between any two transitions: P1 to P14 of facts §11.3.

`check` reads EL2's records of memory and every stage-2 tree, `check_hyp` its VMs
and vCPUs too; they say in words what is wrong, and an empty list is the good
news. The rules stand in modules named as those of `hyp` that they are about.

Some are about a change and not a state: P7 (`reclaim.PrivacyWatch`), P10
(`snapshot.Snapshot`), P11 (`exits.ExitWatch`). `watch` looks after each
transition at the pages that it was about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from pkvm.check import assignment, dma, host_memory, lifecycle, ownership, pgtable, vmemmap
from pkvm.check.reclaim import PrivacyWatch
from pkvm.check.snapshot import Snapshot
from pkvm.check.view import Scratch, View
from pkvm.hyp.hypervisor import Hypervisor
from pkvm.hyp.mem_protect import GuestMemory, MemProtect
from pkvm.hyp.vm import Vm

__all__ = ["MAX_PROBLEMS", "PrivacyWatch", "Scratch", "Snapshot", "check", "check_hyp"]

MAX_PROBLEMS = 20
"""Of each rule, so that one broken range does not drown the others."""

RULES: tuple[Callable[[View], Iterator[str]], ...] = (
    ownership.single_owner,
    ownership.borrowed_from_lender,
    ownership.own_regions,
    host_memory.host_tree,
    host_memory.dma_tree,
    host_memory.bus_tlbs,
    pgtable.tables,
    pgtable.walks,
    vmemmap.share_counts,
    vmemmap.refcounts,
    dma.pins,
    dma.domain_tables,
    dma.stale_domains,
    assignment.guest_maps,
    assignment.assigned_devices,
)
"""Each yields problems, of which every one begins with the property that it breaks."""
HYP_RULES: tuple[Callable[[View, Sequence[Vm]], Iterator[str]], ...] = (
    lifecycle.pinned,
    lifecycle.loaded_once,
    lifecycle.accounted,
)


def check(
    mem: MemProtect,
    vms: Iterable[GuestMemory],
    secure: Iterable[int] = (),
    scratch: Scratch | None = None,
) -> list[str]:
    """What is wrong with memory, in words, each with the property that it breaks.

    `vms` must be all VMs whose stage-2 exists, `secure` the PFNs that the host shares with the
    secure world. Takes EL2's lock.
    """
    with mem.lock:
        return _broken(View(mem, vms, secure, scratch))


def check_hyp(
    hyp: Hypervisor, secure: Iterable[int] = (), scratch: Scratch | None = None
) -> list[str]:
    """As `check`, with what EL2 keeps of VMs and vCPUs. Not for the middle of a host call."""
    with hyp.cpu.lock, hyp.mem.lock:
        vms = hyp.table.vms()
        view = View(hyp.mem, vms, secure, scratch)
        view.buffers = hyp.host_buffers()
        problems = _broken(view)
        for rule in HYP_RULES:
            problems += islice(rule(view, vms), MAX_PROBLEMS)
        return problems


def _broken(view: View) -> list[str]:
    problems = view.problems[:MAX_PROBLEMS]
    for rule in RULES:
        problems += islice(rule(view), MAX_PROBLEMS)
    return problems
