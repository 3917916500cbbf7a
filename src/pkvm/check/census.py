# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages by owner and state: where all of RAM is (facts §11.3, P14)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from pkvm.arm64.stage2 import (
    PAGE_SHIFT,
    PAGE_SIZE,
    SW_STATE_MASK,
    SW_STATE_SHIFT,
    VALID,
    PageState,
)
from pkvm.hyp.bulk import leaves
from pkvm.hyp.mem_protect import GuestMemory, MemProtect
from pkvm.hyp.vmemmap import (
    GUEST_OWNED,
    GUEST_SHARED_WITH_HOST,
    HOST_OWNED,
    HOST_PINNED,
    HOST_SHARED,
    HOST_SHARED_WITH_HYP,
    HYP_OWNED,
    SECURE_OWNED,
)

_WORDS = {
    PageState.OWNED: "owned",
    PageState.SHARED_OWNED: "shared_with_host",
    PageState.SHARED_BORROWED: "borrowed_from_host",
}


@dataclass(frozen=True, slots=True)
class Census:
    """Numbers of pages. `host`, `hyp` and `guest` share out all RAM; `vms` tells the guests'
    leaves apart by handle, where a page lent to two VMs counts twice."""

    total: int
    host: dict[str, int]
    """"owned", "shared_with_hyp", "shared_with_guest"."""
    hyp: dict[str, int]
    """"owned"."""
    guest: dict[str, int]
    """"owned", "shared_with_host": pages that protected guests own."""
    secure: int = 0
    """Pages that are lent to the secure world alone; they count as none of the above."""
    vms: dict[int, dict[str, int]] = field(default_factory=dict)
    """By handle: "owned", "shared_with_host", "borrowed_from_host"."""


def census(mem: MemProtect, vms: Iterable[GuestMemory]) -> Census:
    """Count every page of RAM. Takes EL2's lock."""
    with mem.lock:
        by_state = np.bincount(mem.vmemmap.states, minlength=256).tolist()
        by_vm = {}
        for vm in vms:
            found = leaves(vm.stage2, 0, 1 << vm.stage2.ipa_bits - PAGE_SHIFT)
            states = (found.entries & np.uint64(SW_STATE_MASK)) >> np.uint64(SW_STATE_SHIFT)
            npages = np.where(found.entries & np.uint64(VALID), found.npages, 0)
            counts = np.bincount(states.astype(np.int64), weights=npages, minlength=3)
            by_vm[vm.handle] = {word: int(counts[state]) for state, word in _WORDS.items()}
        return Census(
            total=mem.vmemmap.npages,
            host={
                "owned": by_state[HOST_OWNED] + by_state[HOST_PINNED],
                "shared_with_hyp": by_state[HOST_SHARED_WITH_HYP],
                "shared_with_guest": by_state[HOST_SHARED],
            },
            hyp={"owned": by_state[HYP_OWNED]},
            guest={
                "owned": by_state[GUEST_OWNED],
                "shared_with_host": by_state[GUEST_SHARED_WITH_HOST],
            },
            secure=by_state[SECURE_OWNED],
            vms=by_vm,
        )


def shared_by_guests(mem: MemProtect, vms: Iterable[GuestMemory]) -> frozenset[int]:
    """IPAs of the pages that a guest shares with the host, by its stage-2 tree. Takes EL2's
    lock."""
    return _pages(mem, vms, PageState.SHARED_OWNED)


def private_to_guests(mem: MemProtect, vms: Iterable[GuestMemory]) -> frozenset[int]:
    """IPAs of the pages that a guest has for itself, likewise."""
    return _pages(mem, vms, PageState.OWNED)


def _pages(mem: MemProtect, vms: Iterable[GuestMemory], state: PageState) -> frozenset[int]:
    pages: set[int] = set()
    with mem.lock:
        for vm in vms:
            found = leaves(vm.stage2, 0, 1 << vm.stage2.ipa_bits - PAGE_SHIFT)
            states = (found.entries & np.uint64(SW_STATE_MASK)) >> np.uint64(SW_STATE_SHIFT)
            wanted = (found.entries & np.uint64(VALID) != 0) & (states == np.uint64(state))
            for frame, count in zip(
                found.frames[wanted].tolist(), found.npages[wanted].tolist(), strict=True
            ):
                pages.update(range(frame << PAGE_SHIFT, frame + count << PAGE_SHIFT, PAGE_SIZE))
    return frozenset(pages)
