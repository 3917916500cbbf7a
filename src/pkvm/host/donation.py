# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory for a protected guest at its first touch: count it, pin it, donate it (facts §2.1).

Where a dialect gives a VM all its memory at once, nothing comes here.

A vCPU's fault is served before any other vCPU runs. So a fault on a frame that
the VM was given already means that the page is gone: taken by force, which ends
KVM_RUN where the dialect has it so. What a guest gave back is forgotten at once
(`Vm.relinquished`), and it gets a page there as if for the first time.
"""

from __future__ import annotations

import errno

from pkvm.host.el2 import DONE, value_of
from pkvm.host.memslots import Slot
from pkvm.host.pages import BLOCK_PAGES
from pkvm.host.ports import PAGE_SHIFT
from pkvm.host.vm import TABLES_A_MAPPING, Vm
from pkvm.hyp.abi import HostCall
from pkvm.uapi.dialects import LostPage


def touch(vm: Vm, slot: Slot, ipa: int) -> None:
    """Give the loaded vCPU's protected VM the page at `ipa` of `slot`, or where the dialect does so
    and all of it is there and new, the 2 MiB block around it.

    Raises EFAULT for a page that was taken by force and where the slot has no user memory, ENOMEM
    beyond RLIMIT_MEMLOCK or without pages for tables, or what EL2 answers.
    """
    gfn, given = ipa >> PAGE_SHIFT, vm.donated
    if gfn in given or given.get(gfn & -BLOCK_PAGES, 1) > 1:
        takes = vm.host.dialect.lost_page is LostPage.TAKEN_EFAULT
        if takes and vm.host.el2.try_call(HostCall.VCPU_IN_POISON_FAULT):
            raise OSError(
                errno.EFAULT,
                f"the host took the guest's page at IPA {ipa:#x} by force, and the guest wants it",
            )
        _donate(vm, vm.host.users.place(slot.user_of(gfn << PAGE_SHIFT), 1).pfn, gfn, 1)
    elif vm.touch_pages < BLOCK_PAGES or not _give_block(vm, slot, gfn & -BLOCK_PAGES):
        _give(vm, slot, gfn, 1)


def _give_block(vm: Vm, slot: Slot, block: int) -> bool:
    """Try to give a 2 MiB block; False if its memory is not one aligned block, or not all new."""
    if block < slot.gfn or block + BLOCK_PAGES > slot.gfn + slot.npages:
        return False
    if any(gfn in vm.donated for gfn in range(block, block + BLOCK_PAGES)):
        return False
    try:
        place = vm.host.users.place(slot.user_of(block << PAGE_SHIFT), BLOCK_PAGES)
        if (place.pfn - block) % BLOCK_PAGES:
            return False
        _give(vm, slot, block, BLOCK_PAGES)
    except OSError:
        return False
    return True


def _give(vm: Vm, slot: Slot, gfn: int, npages: int) -> None:
    """Count, pin, donate. Raises OSError, and nothing has changed then."""
    host = vm.host
    user = slot.user_of(gfn << PAGE_SHIFT)
    host.memlock.charge(npages)
    try:
        mapping = host.users.pinned(user, npages << PAGE_SHIFT, protected=True)
        run, first = mapping.run, mapping.offset + user - mapping.address >> PAGE_SHIFT
        _donate(vm, run.pfn + first, gfn, npages)
    except OSError:
        host.memlock.release(npages)
        raise
    vm.pin(run, first, npages)
    vm.donated[gfn] = npages


def _donate(vm: Vm, pfn: int, gfn: int, npages: int) -> None:
    """HOST_DONATE_GUEST, with table pages as needed. Raises OSError."""
    donate = vm.host.el2.donate
    registers = donate(pfn, gfn, npages)
    if registers == DONE:
        return
    if value_of(registers) == -errno.ENOMEM:
        vm.topup(TABLES_A_MAPPING)
        registers = donate(pfn, gfn, npages)
    result = value_of(registers)
    if result < 0:
        raise OSError(-result, f"EL2 does not give the guest IPA {gfn << PAGE_SHIFT:#x}")
