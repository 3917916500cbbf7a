# SPDX-License-Identifier: GPL-2.0-or-later
"""The MMIO guard: a guest says where it expects devices (facts §6.5).

Without it the host may emulate a device wherever the guest has no memory: it
takes a page of memory away, or never gives it, and answers the guest's accesses
itself. A VM that has enrolled, which is for ever, marks the frames of its
devices in its own stage-2. An access to any other frame that is not there never
becomes an MMIO exit; all that the host can do is map memory or fail it. A frame
once marked is never memory again: what `MMIO_GUARD_UNMAP` promises is nothing.

Marks are gone with the VM's tables.
"""

from __future__ import annotations

import numpy as np

from pkvm.arm64.stage2 import ANNOTATION_MMIO, LAST_LEVEL, PAGE_MASK, PAGE_SHIFT
from pkvm.hyp.assignment import is_device
from pkvm.hyp.bulk import missing_tables, runs_in
from pkvm.hyp.errors import Errno, Refused
from pkvm.hyp.mem_protect import MemProtect
from pkvm.hyp.vm import Vm

MAX_PAGES_A_CALL = 256
_LIMIT = 1 << 64


def allows(vm: Vm, ipa: int, nbytes: int) -> bool:
    """Whether an access of `nbytes` at `ipa` may be the host's to emulate."""
    if not vm.mmio_guard:
        return True
    stage2 = vm.stage2
    return all(
        byte >> stage2.ipa_bits == 0 and stage2.leaf(byte)[0] == ANNOTATION_MMIO
        for byte in (ipa, ipa + nbytes - 1)
    )


def mark(mem: MemProtect, vm: Vm, ipa: int, nr: int) -> int:
    """Mark `nr` frames from `ipa`, at most 256, as devices; those that are stay so, and so do
    registers of a device that the guest was given. Both are the guest's numbers. Returns how many.

    Raises Refused, and has then changed nothing: EPERM (not enrolled; a frame has memory, or had
    some that is poisoned), EINVAL (not aligned, none, wrapping), ERANGE (beyond the IPA space),
    ENOMEM with `pages_needed` (no table pages).
    """
    if not vm.mmio_guard:
        raise Refused(Errno.EPERM, "mmio_guard", "the VM has not enrolled", vm=vm.handle)
    if ipa & PAGE_MASK:
        why = "the address is not that of a page"
        raise Refused(Errno.EINVAL, "alignment", why, ipa=ipa, vm=vm.handle)
    if nr <= 0 or nr > _LIMIT >> PAGE_SHIFT or ipa + (nr << PAGE_SHIFT) > _LIMIT:
        why = f"no {nr} pages can start there"
        raise Refused(Errno.EINVAL, "gfn_range", why, ipa=ipa, vm=vm.handle)
    stage2 = vm.stage2
    if ipa + (nr << PAGE_SHIFT) > 1 << stage2.ipa_bits:
        why = "the range is beyond the VM's space"
        raise Refused(Errno.ERANGE, "ipa_range", why, ipa=ipa, vm=vm.handle)
    nr = min(nr, MAX_PAGES_A_CALL)
    with mem.lock:
        empty = []
        for frame in range(ipa >> PAGE_SHIFT, (ipa >> PAGE_SHIFT) + nr):
            entry, _ = stage2.leaf(frame << PAGE_SHIFT)
            if not entry:
                empty.append(frame)
            elif entry != ANNOTATION_MMIO and not is_device(entry):
                why = "the frame is or was memory"
                raise Refused(
                    Errno.EPERM, "guest_state", why, ipa=frame << PAGE_SHIFT, vm=vm.handle
                )
        if not empty:
            return nr
        runs = runs_in(np.array(empty, np.int64))
        missing = missing_tables(stage2, [(LAST_LEVEL, runs)]) - vm.memcache.available
        if missing > 0:
            why = f"{missing} more table pages are needed"
            raise Refused(Errno.ENOMEM, "memcache", why, vm=vm.handle, pages_needed=missing)
        for frame in empty:
            stage2.put(frame << PAGE_SHIFT, ANNOTATION_MMIO)
    return nr
