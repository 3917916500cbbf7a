# SPDX-License-Identifier: GPL-2.0-or-later
"""The host reads the guest firmware that its boot firmware left."""

from __future__ import annotations

from pkvm.check.attacks.scene import Scene

TRIES = "read the guest firmware in its memory"
GUARD = "EL2's own memory is out of the host's reach"


def attempt(scene: Scene) -> str | None:
    """A load."""
    region = scene.kernel.firmware
    if region is None:
        return None
    return f"it read: {scene.host_bus.read(region.base, 8).hex()}..."
