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

from pkvm.host.memslots import Plan, Slot
from pkvm.host.ports import PAGE_SHIFT
from pkvm.hyp.abi import HostCall
from pkvm.uapi.kvm import DIRTY_LOG_INITIALLY_SET

if TYPE_CHECKING:
    from pkvm.host.vm import Vm

_WORD_BITS = 64


class DirtyLog:
    """The log of a slot of `npages` pages, all of them dirty at first or none."""

    def __init__(self, npages: int, *, dirty: bool = False) -> None:
        self.nbytes = -(-npages // _WORD_BITS) * _WORD_BITS // 8
        self._bits = (1 << npages) - 1 if dirty else 0

    def mark(self, page: int) -> None:
        """The guest, or the kernel for it, stores to this page of the slot."""
        self._bits |= 1 << page

    @property
    def bitmap(self) -> bytes:
        """A bit for each page, in 64-bit words as KVM_GET_DIRTY_LOG gives them."""
        return self._bits.to_bytes(self.nbytes, "little")

    def take(self, wanted: int) -> list[int]:
        """The dirty pages among those whose bits are in `wanted`; they are dirty no more."""
        taken = self._bits & wanted
        self._bits ^= taken
        return [at for at, bit in enumerate(reversed(f"{taken:b}")) if bit == "1"]


def follow(vm: Vm, plan: Plan) -> None:
    """A change of memory slots was made: a slot that gets a log starts with a clean one, or with
    one that need not look for who is dirty."""
    old, new = plan.old, plan.new
    if old is not None and (new is None or not new.logs_dirty_pages or old.ipa != new.ipa):
        vm.dirty_logs.pop(old.number, None)
    if new is None or not new.logs_dirty_pages or new.number in vm.dirty_logs:
        return
    all_dirty = bool(vm.manual_dirty_log & DIRTY_LOG_INITIALLY_SET)
    vm.dirty_logs[new.number] = DirtyLog(new.npages, dirty=all_dirty)
    for gfn, lent in vm.shared.items() if not all_dirty else ():
        if new.gfn <= gfn < new.gfn + new.npages:
            vm.host.el2.call(HostCall.WRPROTECT_GUEST, vm.handle, gfn, lent.npages)


def get(vm: Vm, number: int, address: int) -> None:
    """KVM_GET_DIRTY_LOG: write the bitmap of a slot to user memory; it starts anew, unless it is
    cleared by hand. Raises ENOENT for a slot without a log, EFAULT."""
    slot, log = _log(vm, number)
    vm.host.users.copy_to_user(address, log.bitmap)
    if not vm.manual_dirty_log:
        _protect(vm, slot.gfn, log.take(-1))


def clear(vm: Vm, number: int, first: int, npages: int, address: int) -> None:
    """KVM_CLEAR_DIRTY_LOG: of the pages [first, first+npages) of a slot those are dirty no more
    whose bits are set in user memory. Raises ENOENT for a slot without a log, EINVAL for a range
    that is not 64 pages after 64 pages of the slot, or up to its end; EFAULT."""
    slot, log = _log(vm, number)
    rest = slot.npages - first
    if first % _WORD_BITS or npages > rest or (npages < rest and npages % _WORD_BITS):
        raise OSError(errno.EINVAL, f"[{first}, +{npages}) of {slot.npages} pages of slot {number}")
    bitmap = vm.host.users.copy_from_user(address, -(-npages // _WORD_BITS) * _WORD_BITS // 8)
    _protect(vm, slot.gfn, log.take(int.from_bytes(bitmap, "little") << first))


def _log(vm: Vm, number: int) -> tuple[Slot, DirtyLog]:
    """Raises ENOENT."""
    slot, log = vm.slots.get(number), vm.dirty_logs.get(number)
    if slot is None or log is None:
        raise OSError(errno.ENOENT, f"slot {number} has no dirty log")
    return slot, log


def _protect(vm: Vm, base: int, pages: list[int]) -> None:
    """The guest's next store to any of these pages is a fault. A block has to fault as one."""
    for gfn in {vm.lent_at(base + page) for page in pages}:
        if gfn is not None:
            npages = vm.shared[gfn].npages
            vm.host.el2.call(HostCall.WRPROTECT_GUEST, vm.handle, gfn, npages)


def mark(vm: Vm, ipa: int) -> None:
    """The kernel has stored to the guest's memory at `ipa`."""
    slot = vm.slots.at(ipa)
    log = vm.dirty_logs.get(slot.number) if slot is not None else None
    if slot is not None and log is not None:
        log.mark((ipa >> PAGE_SHIFT) - slot.gfn)
