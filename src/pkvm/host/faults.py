# SPDX-License-Identifier: GPL-2.0-or-later
"""Stage-2 faults of non-protected guests on memory slots: share host pages, a block if it fits.

A protected guest's memory is given to it and not shared: all at once (`protected`) or at its first
touch (`donation`).
"""

from __future__ import annotations

import errno

from pkvm.host.memslots import Slot
from pkvm.host.ports import PAGE_SHIFT, PAGE_SIZE
from pkvm.host.vm import TABLES_A_MAPPING, Vm
from pkvm.hyp.abi import PROT_RWX, PROT_W, HostCall

_BLOCK = 1 << 21
_BLOCK_PAGES = _BLOCK >> PAGE_SHIFT


def share(vm: Vm, slot: Slot, ipa: int, *, write: bool = False) -> None:
    """Map the page at `ipa` of `slot`, or the 2 MiB block around it, into the loaded vCPU's VM.

    Raises EFAULT where the slot has no user memory, or none that the VMM itself may read, or to
    `write` write to; ENOMEM, or what EL2 answers.
    """
    block = ipa & ~(_BLOCK - 1)
    user = slot.user_of(ipa & ~(PAGE_SIZE - 1))
    mapping = vm.host.users.find(user, PAGE_SIZE)
    if not (mapping.writable if write else mapping.readable) or mapping.backing.plain_errno:
        raise OSError(errno.EFAULT, f"the VMM's own page at {user:#x} is not for that")
    # What a guest stores to a read-only slot is MMIO, once the page is there.
    write = write and not slot.readonly
    gfn = ipa >> PAGE_SHIFT
    log = vm.dirty_logs.get(slot.number)
    known = vm.lent_at(gfn)
    if known is not None and log is not None and vm.shared[known].npages > 1:
        # A log is of pages: the block goes, and comes back page by page.
        vm.unshare(known, _BLOCK_PAGES)
        known = None
    if known is not None:
        # Another vCPU's fault has mapped it meanwhile, or it may not be written to yet.
        if write:
            vm.host.el2.call(HostCall.RELAX_PERMS_GUEST, gfn, PROT_W)
    elif not (log is None and _fits(slot, block) and _share_block(vm, slot, block)):
        may_write = not slot.readonly and (write or log is None)
        result = _share(vm, slot, gfn << PAGE_SHIFT, 1, write=may_write)
        if result < 0:
            raise OSError(-result, f"EL2 does not share IPA {gfn << PAGE_SHIFT:#x} with the guest")
    if log is not None and write:
        log.mark(gfn - slot.gfn)


def _fits(slot: Slot, block: int) -> bool:
    return slot.ipa <= block and block + _BLOCK <= slot.end


def _share_block(vm: Vm, slot: Slot, block: int) -> bool:
    """Try to map a 2 MiB block; False if its memory is not one aligned block, or not all free."""
    user = slot.user_of(block)
    try:
        pa = vm.host.users.pa(user, _BLOCK)
    except OSError:
        return False
    first = block >> PAGE_SHIFT
    if pa % _BLOCK or any(gfn in vm.shared for gfn in range(first, first + _BLOCK_PAGES)):
        return False
    return _share(vm, slot, block, _BLOCK_PAGES, write=not slot.readonly) >= 0


def _share(vm: Vm, slot: Slot, ipa: int, npages: int, *, write: bool) -> int:
    """HOST_SHARE_GUEST, to `write` to if that may be, with table pages as needed; 0 or a negative
    errno."""
    users = vm.host.users
    user = slot.user_of(ipa)
    mapping = users.find(user, npages << PAGE_SHIFT)
    place = users.place(user, npages)
    prot = PROT_RWX if write and mapping.writable else PROT_RWX & ~PROT_W
    call, args = HostCall.HOST_SHARE_GUEST, (place.pfn, ipa >> PAGE_SHIFT, npages, prot)
    result = vm.host.el2.try_call(call, *args)
    if result == -errno.ENOMEM:
        vm.topup(TABLES_A_MAPPING)
        result = vm.host.el2.try_call(call, *args)
    if result >= 0:
        vm.share(ipa >> PAGE_SHIFT, place)
    return result
