# SPDX-License-Identifier: GPL-2.0-or-later
"""Dirty logs of memory slots (KVM_MEM_LOG_DIRTY_PAGES; KVM API 4.8): which pages a guest has
written to since they were last asked for.

While a slot has a log its pages are lent one by one, and without write permission
until the guest's first store, whose fault `faults.share` notes here. Asking for the
log takes write permission from the dirty pages again. What the VMM stores by itself
is not in the log.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from pkvm.host.memslots import Plan
from pkvm.host.ports import PAGE_SHIFT
from pkvm.hyp.abi import HostCall

if TYPE_CHECKING:
    from pkvm.host.vm import Vm

_WORD_BITS = 64


class DirtyLog:
    """The log of a slot of `npages` pages."""

    def __init__(self, npages: int) -> None:
        self._bits = bytearray(-(-npages // _WORD_BITS) * _WORD_BITS // 8)

    def mark(self, page: int) -> None:
        """The guest, or the kernel for it, stores to this page of the slot."""
        self._bits[page >> 3] |= 1 << (page & 7)

    @property
    def bitmap(self) -> bytes:
        """A bit for each page, in 64-bit words as KVM_GET_DIRTY_LOG gives them."""
        return bytes(self._bits)

    def take(self) -> list[int]:
        """The dirty pages, of which none is dirty any more."""
        dirty = [
            8 * at + bit
            for at, byte in enumerate(self._bits)
            if byte
            for bit in range(8)
            if byte >> bit & 1
        ]
        self._bits = bytearray(len(self._bits))
        return dirty


def follow(vm: Vm, plan: Plan) -> None:
    """A change of memory slots was made: a slot that gets a log starts with a clean one."""
    old, new = plan.old, plan.new
    if old is not None and (new is None or not new.logs_dirty_pages or old.ipa != new.ipa):
        vm.dirty_logs.pop(old.number, None)
    if new is None or not new.logs_dirty_pages or new.number in vm.dirty_logs:
        return
    vm.dirty_logs[new.number] = DirtyLog(new.npages)
    for gfn, lent in vm.shared.items():
        if new.gfn <= gfn < new.gfn + new.npages:
            vm.host.el2.call(HostCall.WRPROTECT_GUEST, vm.handle, gfn, lent.npages)


def get(vm: Vm, number: int, address: int) -> None:
    """KVM_GET_DIRTY_LOG: write the bitmap of a slot to user memory; it starts anew. Raises ENOENT
    for a slot without a log, EFAULT."""
    slot, log = vm.slots.get(number), vm.dirty_logs.get(number)
    if slot is None or log is None:
        raise OSError(errno.ENOENT, f"slot {number} has no dirty log")
    vm.host.users.copy_to_user(address, log.bitmap)
    for page in log.take():
        if slot.gfn + page in vm.shared:
            vm.host.el2.call(HostCall.WRPROTECT_GUEST, vm.handle, slot.gfn + page, 1)


def mark(vm: Vm, ipa: int) -> None:
    """The kernel has stored to the guest's memory at `ipa`."""
    slot = vm.slots.at(ipa)
    log = vm.dirty_logs.get(slot.number) if slot is not None else None
    if slot is not None and log is not None:
        log.mark((ipa >> PAGE_SHIFT) - slot.gfn)
