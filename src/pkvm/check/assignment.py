# SPDX-License-Identifier: GPL-2.0-or-later
"""P8 for devices that guests were given: nobody else has them, they reach their guest's own pages
and nothing else, and each of these counts its mappings (facts §10)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from pkvm.arm64.smmu import ABORT_STE, STE2, stage2_ste
from pkvm.arm64.stage2 import (
    ADDRESS_MASK,
    ANNOTATION,
    ANNOTATION_HYP,
    LAST_LEVEL,
    PAGE_SHIFT,
    PAGE_SIZE,
    Owner,
    guest_annotation,
    is_leaf,
)
from pkvm.check.view import View
from pkvm.hyp.vmemmap import GUEST_OWNED
from pkvm.machine.stage2 import Stage2Context, iter_leaves


def guest_maps(view: View) -> Iterator[str]:
    """P8: a guest's domain maps private pages of that guest's; the refcount of such a page is the
    number of its mappings."""
    mem = view.mem
    mapped: Counter[int] = Counter()
    for domain in mem.domains.values():
        if not domain.vm:
            continue
        context = Stage2Context(domain.stage2.vttbr, domain.stage2.vtcr)
        for iova, level, entry in iter_leaves(mem.memory, context):
            pa = entry & ADDRESS_MASK
            page = pa - mem.memory.ram_base >> PAGE_SHIFT
            if level != LAST_LEVEL or not is_leaf(entry, level):
                yield f"P8: domain {domain.number} has the strange entry {entry:#x} at {iova:#x}"
            elif not mem.memory.is_ram(pa, PAGE_SIZE) or view.states[page] != GUEST_OWNED:
                yield f"P8: domain {domain.number} maps {pa:#x}, no guest's private page"
            else:
                mapped[page] += 1
                owner, _ = mem.host.stage2.leaf(pa)
                if ANNOTATION["owner"].get(owner) != Owner.GUEST or (
                    ANNOTATION["vm"].get(owner) != domain.vm
                ):
                    yield f"P8: VM {domain.vm:#x}'s domain maps {pa:#x}, another's page"
    counts = mem.vmemmap.refcount
    private = view.counted[view.states[view.counted] == GUEST_OWNED]
    for page in sorted(mapped.keys() | set(private.tolist())):
        if counts[page] != mapped[page]:
            yield (
                f"P8: the guest's PA {view.pa(page):#x} is mapped for DMA {mapped[page]} times, "
                f"its refcount is {counts[page]}"
            )


def assigned_devices(view: View) -> Iterator[str]:
    """P8: a device of a VM's, which is there, follows nothing or a domain of that VM's; any other
    follows no guest's. Registers are mapped by the VM that has the device alone."""
    mem = view.mem
    if mem.smmu is None or not mem.protected:
        return
    devices, handles = mem.devices, {vm.handle for vm in view.vms}
    for index, device in enumerate(devices.devices):
        owner, ste = devices.owner(index), mem.smmu.ste(device.stream)
        domain = mem.domains.get(STE2["S2VMID"].get(ste[2]))
        if not owner:
            if domain is not None and domain.vm:
                yield f"P8: the host's {device.name} is in a domain of VM {domain.vm:#x}"
        elif owner not in handles:
            yield f"P8: {device.name} is VM {owner:#x}'s, which is not there"
        elif ste != ABORT_STE and (
            domain is None
            or domain.vm != owner
            or ste != stage2_ste(domain.stage2.vttbr, domain.stage2.vtcr, records=False)
        ):
            yield f"P8: VM {owner:#x}'s {device.name} follows what is not that VM's"
    for domain in mem.domains.values():
        if domain.vm and domain.vm not in handles:
            yield f"P8: domain {domain.number} is VM {domain.vm:#x}'s, which is not there"
    for page, times in Counter(pa for _, _, pa in view.registers).items():
        if times > 1:
            yield f"P8: {page:#x}, a device's, is mapped by guests {times} times"
    for handle, gfn, pa in view.registers:
        at = devices.at(pa, PAGE_SIZE)
        if at is None or devices.owner(at) != handle:
            yield f"P8: VM {handle:#x} maps {pa:#x} at {gfn:#x}, a device that it has not"


def assigned_pages(view: View) -> dict[int, int]:
    """What the host's stage-2 must say of the registers of devices that guests have, by PA."""
    devices = view.mem.devices
    pages = {
        page: ANNOTATION_HYP
        for index, device in enumerate(devices.devices)
        if devices.owner(index)
        for page in range(device.base, device.base + device.size, PAGE_SIZE)
    }
    for handle, gfn, pa in view.registers:
        if pa in pages:
            pages[pa] = guest_annotation(handle, gfn)
    return pages
