# SPDX-License-Identifier: GPL-2.0-or-later
"""A device has translations of all memory cached from before the guest had it."""

from __future__ import annotations

from pkvm.check.attacks.scene import Scene, host_pages
from pkvm.system import System

TRIES = "use translations that the SMMU cached before the donation"
GUARD = "the SMMU forgets what was lost"


def before(system: System) -> None:
    """Let the device touch every page that the host has."""
    smmu = system.machine.smmu
    assert smmu is not None
    device = smmu.masters()[0]
    for pa in host_pages(system):
        device.read(pa, 8)


def attempt(scene: Scene) -> str | None:
    """DMA, as before."""
    return scene.secret_by_dma()
