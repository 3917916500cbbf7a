# SPDX-License-Identifier: GPL-2.0-or-later
"""The host lets a device's stream bypass the SMMU by an entry of its own."""

from __future__ import annotations

from pkvm.arm64.smmu import STE0, Config
from pkvm.check.attacks.scene import Scene
from pkvm.machine.machine import DMA_STREAM

TRIES = "write to the SMMU's stream table"
GUARD = "EL2's own memory is out of the host's reach"


def attempt(scene: Scene) -> str | None:
    """A store to the stream's entry."""
    at = scene.stream_entry(DMA_STREAM)
    scene.host_bus.write(at, STE0.encode(V=1, Config=Config.BYPASS).to_bytes(8, "little"))
    return scene.secret_by_dma() or f"it wrote to the entry at PA {at:#x}"
