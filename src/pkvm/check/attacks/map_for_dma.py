# SPDX-License-Identifier: GPL-2.0-or-later
"""The host maps the guest's page into a DMA domain of its own, and a device reads."""

from __future__ import annotations

from pkvm.arm64.stage2 import PAGE_SIZE
from pkvm.check.attacks.scene import Scene
from pkvm.hyp.abi import DmaProt, HostCall
from pkvm.machine.machine import DMA_STREAM

TRIES = "map the guest's page for a device"
GUARD = "only pages of the host's own are mapped for DMA"


def attempt(scene: Scene) -> str | None:
    """IOMMU_MAP, and DMA."""
    target = scene.new_pages()
    scene.own_domain(DMA_STREAM)
    both = DmaProt.READ | DmaProt.WRITE
    try:
        scene.el2(HostCall.IOMMU_MAP, 1, 0, scene.secret.pa, PAGE_SIZE, DmaProt.READ)
        scene.el2(HostCall.IOMMU_MAP, 1, PAGE_SIZE, target, PAGE_SIZE, both)
        scene.dma(0, PAGE_SIZE, PAGE_SIZE)
    finally:
        scene.end_domain(DMA_STREAM)
    return scene.secret_at(target)
