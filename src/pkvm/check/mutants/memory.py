# SPDX-License-Identifier: GPL-2.0-or-later
"""EL2s without one guard of memory: of ownership, of who reaches what, of what is given back."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from pkvm.arm64.stage2 import PAGE_SHIFT
from pkvm.check.mutants.install import Install, replaced, unchecked
from pkvm.events import Transition
from pkvm.hyp.bulk import Entries, Runs, cut, joined
from pkvm.hyp.host_memory import HostMemory
from pkvm.hyp.lifecycle import Lifecycle
from pkvm.hyp.mem_protect import MemProtect
from pkvm.hyp.vm import Vm
from pkvm.hyp.vmemmap import HOST_OWNED


def _host_keeps(stack: ExitStack) -> None:
    """The host's entries stay; only devices lose what is donated."""

    def take_runs(self: HostMemory, pfns: Runs, annotations: Entries, step: int) -> None:
        del annotations, step
        if self.identity is not None:
            self.identity.lose_runs(cut(joined(pfns))[0])

    def take_page(self: HostMemory, pa: int, annotation: int) -> None:
        if self.identity is not None:
            self.identity.lose_page(pa)

    stack.enter_context(patch.object(HostMemory, "take_runs", take_runs))
    stack.enter_context(patch.object(HostMemory, "take_page", take_page))


def _tables_stay(stack: ExitStack) -> None:
    """What the host gives to EL2 it can still reach."""
    donate = MemProtect.host_donate_hyp

    def weak(self: MemProtect, pfn: int, nr: int) -> None:
        with (
            patch.object(self.host, "take_page", lambda pa, annotation: None),
            patch.object(self.host, "take_runs", lambda pfns, annotations, step: None),
        ):
            donate(self, pfn, nr)

    stack.enter_context(patch.object(MemProtect, "host_donate_hyp", weak))


def _dying_or_not(self: Lifecycle, handle: int) -> Vm:
    return self._table.get(handle)


def _torn_down_at_once(self: Lifecycle, handle: int) -> None:
    self._table.get(handle).dying = 1


def _taken_back(self: MemProtect, pfn: int) -> None:
    """HOST_UNSHARE_HYP of a page, pinned or not."""
    self.vmemmap.states[pfn - self._first_pfn] = HOST_OWNED
    self._record(Transition("host_unshare_hyp", pfn << PAGE_SHIFT, 1))


def _lent(self: MemProtect, *args: Any) -> None:
    """HOST_SHARE_GUEST of a page whoever owns it."""
    pfn = args[1]
    states = self.vmemmap.states
    page = pfn - self._first_pfn
    before = int(states[page])
    states[page] = HOST_OWNED
    try:
        _share(self, *args)
    finally:
        states[page] = before


_share = MemProtect.host_share_guest

MUTANTS: dict[str, Install] = {
    "a donated page leaves the host's stage-2": _host_keeps,
    "the host's TLB forgets what it lost": replaced(
        HostMemory, "_invalidate_host", lambda self, ipa: None
    ),
    "a page is lent only by its owner": replaced(MemProtect, "host_share_guest", _lent),
    "EL2 shares only what the host owns": unchecked(MemProtect, "host_share_hyp", "_check_states"),
    "a page is donated only by its owner": unchecked(MemProtect, "_donate", "_first_wrong"),
    "no two entries of a list meet": unchecked(MemProtect, "_donate", "_check_apart"),
    "EL2 takes only what the host owns": unchecked(MemProtect, "host_donate_hyp", "_check_states"),
    "only a dying VM's pages are reclaimed": replaced(Lifecycle, "_dying", _dying_or_not),
    "a VM with a loaded vCPU is not torn down": replaced(
        Lifecycle, "start_teardown", _torn_down_at_once
    ),
    "private pages are zeroed before the host has them": unchecked(
        MemProtect, "reclaim_dying_guest_range", "zero"
    ),
    "a guest's frame is given once": unchecked(MemProtect, "_donate", "_check_unmapped"),
    "a VM goes only without pages": replaced(MemProtect, "has_pages", lambda self, vm: False),
    "what EL2 takes leaves the host's stage-2": _tables_stay,
    "EL2's own memory is out of the host's reach": replaced(
        HostMemory, "withhold", lambda self, pfns, annotation: None
    ),
    "numbers of pages are checked before use": replaced(
        MemProtect, "_ram_pages", lambda self, pfn, nr: pfn - self._first_pfn
    ),
    "EL2 keeps the pages that it uses": replaced(MemProtect, "host_unshare_hyp", _taken_back),
}
"""By the guard that is missing."""
