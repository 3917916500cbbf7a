# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's CPU has translations of all memory cached from before the guest had it."""

from __future__ import annotations

from pkvm.check.attacks.scene import Scene, host_pages
from pkvm.system import System

TRIES = "use translations that the host's CPU cached before the donation"
GUARD = "the host's TLB forgets what it lost"


def before(system: System) -> None:
    """Touch every page that the host has."""
    for pa in host_pages(system):
        system.machine.host_bus.read(pa, 8)


def attempt(scene: Scene) -> str | None:
    """A load, as before."""
    return scene.secret_at(scene.secret.pa)
