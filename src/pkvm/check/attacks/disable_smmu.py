# SPDX-License-Identifier: GPL-2.0-or-later
"""The host turns the SMMU off, and a device reads."""

from __future__ import annotations

from pkvm.arm64.smmu import GBPA_UPDATE, Reg
from pkvm.check.attacks.scene import Scene
from pkvm.machine.machine import SMMU_BASE

TRIES = "turn the SMMU off and let a device read the guest's page"
GUARD = "the SMMU's registers are EL2's"


def attempt(scene: Scene) -> str | None:
    """CR0 and GBPA, then DMA."""
    scene.host_bus.write(SMMU_BASE + Reg.CR0, bytes(4))
    scene.host_bus.write(SMMU_BASE + Reg.GBPA, GBPA_UPDATE.to_bytes(4, "little"))
    return scene.secret_by_dma()
