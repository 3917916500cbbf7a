# SPDX-License-Identifier: GPL-2.0-or-later
"""A device copies the guest's page to where the host may look."""

from __future__ import annotations

from pkvm.check.attacks.scene import Scene

TRIES = "let the copy engine read the guest's page"
GUARD = "devices lose what the host loses"


def attempt(scene: Scene) -> str | None:
    """DMA from the page."""
    return scene.secret_by_dma()
