# SPDX-License-Identifier: GPL-2.0-or-later
"""The host maps a page for a device, donates it to the guest, and keeps the device reading."""

from __future__ import annotations

from pkvm.arm64.stage2 import PAGE_SHIFT, PAGE_SIZE
from pkvm.check.attacks.scene import Scene
from pkvm.hyp.abi import DmaProt, HostCall
from pkvm.machine.machine import DMA_STREAM

TRIES = "donate a page that a device uses"
GUARD = "a page that is mapped for DMA stays the host's"


def attempt(scene: Scene) -> str | None:
    """IOMMU_MAP, then DONATE_GUEST_SGLIST."""
    page = scene.new_pages()
    scene.own_domain(DMA_STREAM)
    scene.el2(HostCall.IOMMU_MAP, 1, 0, page, PAGE_SIZE, DmaProt.READ | DmaProt.WRITE)
    try:
        scene.donate((page >> PAGE_SHIFT, scene.free_gfn))
    finally:
        scene.end_domain(DMA_STREAM)
    return "the device reaches a page of the guest's"
