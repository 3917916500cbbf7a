# SPDX-License-Identifier: GPL-2.0-or-later
"""The host makes the guest's page its own in EL2's records, and lends it."""

from __future__ import annotations

from pkvm.check.attacks.scene import Scene

TRIES = "write to EL2's records of ownership"
GUARD = "EL2's own memory is out of the host's reach"


def attempt(scene: Scene) -> str | None:
    """A store to the page's record; zero is a page that the host owns."""
    at = scene.record_of(scene.secret.pa)
    scene.host_bus.write(at, bytes(8))
    return scene.secret_lent()
