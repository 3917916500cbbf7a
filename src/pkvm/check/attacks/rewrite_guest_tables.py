# SPDX-License-Identifier: GPL-2.0-or-later
"""The host writes an entry of its own into the stage-2 table of the guest."""

from __future__ import annotations

from pkvm.arm64.stage2 import ADDRESS_MASK
from pkvm.check.attacks.scene import Scene

TRIES = "write to the guest's stage-2 table"
GUARD = "what EL2 takes leaves the host's stage-2"


def attempt(scene: Scene) -> str | None:
    """A store to the root."""
    root = scene.vm.stage2.vttbr & ADDRESS_MASK
    scene.host_bus.write(root, bytes(8))
    return f"it wrote to the table at PA {root:#x}"
