# SPDX-License-Identifier: GPL-2.0-or-later
"""The host kernel stores to every page of the secret."""

from __future__ import annotations

from pkvm.check.attacks.scene import NOISE, Scene

TRIES = "store to the guest's pages with the host's CPU"
GUARD = "a donated page leaves the host's stage-2"


def attempt(scene: Scene) -> str | None:
    """Write into each page."""
    return scene.spoil(lambda page: scene.host_bus.write(page.pa, NOISE))
