# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_CAP_ARM_PROTECTED_VM: ENABLE and INFO (RFC 7.26, facts §1.2-1.4)."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable

from pkvm.host.memslots import Slot
from pkvm.host.ports import PAGE_SHIFT
from pkvm.host.vm import Vm
from pkvm.hyp.abi import MAX_VCPUS, SGLIST_ENTRY_BYTES, HostCall
from pkvm.uapi.kvm import MEM_SLOTS_NUM, PROTECTED_VM_INFO, ProtectedVm

_ENTRY = struct.Struct("<QQQ")
_L3_PAGES = 1 << 9
"""Pages that one level-3 table maps; also those of a level-2 block."""
_L2_SHIFT = 18
"""log2 of the pages that one level-2 table maps."""
_ZEROES = bytes(1 << 16)

Extent = tuple[int, int, int]
"""pfn, gfn, number of pages."""


def enable_cap(vm: Vm, flags: int, args: tuple[int, int, int, int]) -> None:
    """KVM_ENABLE_CAP(ARM_PROTECTED_VM) on a VM of a host in protected mode.

    Raises EINVAL for other flags and for arguments that must be zero and are not (this before the
    flags are looked at), else as `enable` and `info`.
    """
    if args[2] or args[3] or (args[1] and flags != ProtectedVm.INFO):
        raise OSError(errno.EINVAL, "reserved arguments of KVM_CAP_ARM_PROTECTED_VM must be zero")
    if flags == ProtectedVm.ENABLE:
        enable(vm, args[0])
    elif flags == ProtectedVm.INFO:
        info(vm, args[0], args[1])
    else:
        raise OSError(errno.EINVAL, f"flags {flags:#x}: ENABLE is 0 and INFO is 1")


def info(vm: Vm, address: int, size: int) -> None:
    """Write struct kvm_protected_vm_info to user memory.

    `size` 0 is the RFC's call: 64 bytes. Otherwise it is the size of the caller's buffer: so much
    of the structure as fits is written, the rest of the buffer is zeroed, and the first reserved
    word says how many bytes the kernel knows (the RFC's review, question 6). Raises EFAULT.
    """
    known = PROTECTED_VM_INFO.size
    words = [vm.host.firmware_size, known if size else 0, 0, 0, 0, 0, 0, 0]
    structure = PROTECTED_VM_INFO.pack(*words)
    length = size or known
    users = vm.host.users
    users.find(address, length)
    users.copy_to_user(address, structure[:length])
    done = known
    while done < length:
        piece = _ZEROES[: length - done]
        users.copy_to_user(address + done, piece)
        done += len(piece)


def enable(vm: Vm, slot_number: int) -> None:
    """Make a VM protected: EL2 takes every slot from the host and fills the firmware slot.

    Errors in the RFC's order: EPERM if it is protected already; EBUSY after a KVM_RUN; EINVAL for
    a slot number out of range or a host without guest firmware; ENOENT for a slot that does not
    exist; EINVAL for a slot with flags; ENOMEM for a slot smaller than the firmware. Then EFAULT
    for a slot without user memory, ENOMEM, or what EL2 answers. After an error nothing has changed.
    """
    if vm.protected:
        raise OSError(errno.EPERM, "the VM is protected already")
    if vm.ran:
        raise OSError(
            errno.EBUSY, "a vCPU has run: a VM is made protected before its first KVM_RUN"
        )
    firmware_size = vm.host.firmware_size
    if slot_number >= MEM_SLOTS_NUM or not firmware_size:
        raise OSError(
            errno.EINVAL,
            f"firmware slot {slot_number} is out of range"
            if firmware_size
            else "the host's boot firmware left no guest firmware",
        )
    slot = vm.slots.get(slot_number)
    if slot is None:
        raise OSError(errno.ENOENT, f"firmware slot {slot_number} does not exist")
    if slot.flags:
        raise OSError(errno.EINVAL, f"firmware slot {slot_number} has flags {slot.flags:#x}")
    if slot.size < firmware_size:
        raise OSError(
            errno.ENOMEM,
            f"firmware slot {slot_number} has {slot.size:#x} bytes and the firmware "
            f"{firmware_size:#x}",
        )
    _take(vm, slot)


def _take(vm: Vm, firmware: Slot) -> None:
    """Raises EFAULT for a slot without user memory."""
    users = vm.host.users
    for slot in vm.slots:
        users.pinned(slot.user, slot.size, protected=True)
    places = [users.place(slot.user, slot.npages) for slot in vm.slots]
    extents = [
        (place.pfn, slot.gfn, slot.npages) for slot, place in zip(vm.slots, places, strict=True)
    ]
    vm.init_at_el2(protected=True, created_vcpus=MAX_VCPUS)
    try:
        el2 = vm.host.el2
        el2.call(HostCall.SET_FIRMWARE, vm.handle, firmware.ipa, firmware.size)
        vm.topup(tables_needed(extents))
        donate_extents(vm, extents)
    except OSError:
        vm.leave_el2()
        raise
    for place in places:
        vm.pin(*place)
    vm.become_protected()
    for vcpu in vm.vcpus.values():
        vcpu.forget_dirty()


def tables_needed(extents: Iterable[Extent]) -> int:
    """Table pages that a stage-2 which starts at level 1 needs to map `extents` with pages and
    2 MiB blocks: a level-2 table for each GiB touched, a level-3 table for each 2 MiB that is not
    one block."""
    level2: set[int] = set()
    level3: set[int] = set()
    for pfn, gfn, npages in extents:
        end = gfn + npages
        level2.update(range(gfn >> _L2_SHIFT, (end - 1 >> _L2_SHIFT) + 1))
        first, last = gfn // _L3_PAGES, (end - 1) // _L3_PAGES
        if (pfn - gfn) % _L3_PAGES:
            level3.update(range(first, last + 1))
            continue
        if gfn % _L3_PAGES:
            level3.add(first)
        if end % _L3_PAGES:
            level3.add(last)
    return len(level2) + len(level3)


def donate_extents(vm: Vm, extents: list[Extent]) -> None:
    """DONATE_GUEST_SGLIST, for a VM of which no vCPU need be loaded. Raises OSError; nothing is
    donated then."""
    host = vm.host
    listing = b"".join(_ENTRY.pack(*extent) for extent in extents)
    npages = -(-len(listing) >> PAGE_SHIFT) or 1
    buffer = host.pages.alloc(npages)
    try:
        host.bus.write(buffer, listing)
        call = HostCall.DONATE_GUEST_SGLIST
        host.el2.call(call, vm.handle, buffer, len(listing) // SGLIST_ENTRY_BYTES)
    finally:
        host.pages.free(buffer, npages)
