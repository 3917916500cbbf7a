# SPDX-License-Identifier: GPL-2.0-or-later
"""The host kernel loads from the guest's page, by its physical address."""

from __future__ import annotations

from pkvm.check.attacks.scene import Scene

TRIES = "load from the guest's page with the host's CPU"
GUARD = "a donated page leaves the host's stage-2"


def attempt(scene: Scene) -> str | None:
    """Read the whole page."""
    return scene.secret_at(scene.secret.pa)
