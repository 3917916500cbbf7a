# SPDX-License-Identifier: GPL-2.0-or-later
"""The host maps a page for a device, donates it to the guest, and keeps the device reading."""

from __future__ import annotations

import struct

from pkvm.arm64.stage2 import PAGE_SHIFT, PAGE_SIZE
from pkvm.check.attacks.scene import Scene
from pkvm.hyp.abi import DmaProt, HostCall
from pkvm.machine.machine import DMA_STREAM

TRIES = "donate a page that a device uses"
GUARD = "a page that is mapped for DMA stays the host's"


def attempt(scene: Scene) -> str | None:
    """IOMMU_MAP, then DONATE_GUEST_SGLIST."""
    page, listed = scene.new_pages(), scene.new_pages()
    scene.feed_tables()
    scene.own_domain(DMA_STREAM)
    scene.el2(HostCall.IOMMU_MAP, 1, 0, page, PAGE_SIZE, DmaProt.READ | DmaProt.WRITE)
    try:
        entry = struct.pack("<3Q", page >> PAGE_SHIFT, scene.free_gfn, 1)
        scene.host_bus.write(listed, entry)
        scene.el2(HostCall.DONATE_GUEST_SGLIST, scene.vm.handle, listed, 1)
    finally:
        scene.end_domain(DMA_STREAM)
    return "the device reaches a page of the guest's"
