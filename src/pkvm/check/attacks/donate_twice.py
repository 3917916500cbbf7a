# SPDX-License-Identifier: GPL-2.0-or-later
"""The host donates the guest's page a second time, to the same guest at another address."""

from __future__ import annotations

from pkvm.arm64.stage2 import PAGE_SHIFT
from pkvm.check.attacks.scene import Scene

TRIES = "donate a page that the guest has already"
GUARD = "a page is donated only by its owner"


def attempt(scene: Scene) -> str | None:
    """DONATE_GUEST_SGLIST with the page's number."""
    scene.donate((scene.secret.pa >> PAGE_SHIFT, scene.free_gfn))
    return "the page has two addresses in the guest"
