# SPDX-License-Identifier: GPL-2.0-or-later
"""The host plugs in a device that EL2 has not been told of, and it reads."""

from __future__ import annotations

from pkvm.arm64.stage2 import PAGE_SIZE
from pkvm.check.attacks.scene import Scene

TRIES = "read the guest's page by a device with a StreamID that EL2 does not know"
GUARD = "streams that EL2 does not know abort"

STREAM = 9


def attempt(scene: Scene) -> str | None:
    """DMA of a new stream."""
    return scene.reveals(scene.smmu.master(STREAM, "rogue").read(scene.secret.pa, PAGE_SIZE))
