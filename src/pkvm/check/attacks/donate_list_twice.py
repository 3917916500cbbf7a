# SPDX-License-Identifier: GPL-2.0-or-later
"""The host donates one page of its own twice with one call."""

from __future__ import annotations

from pkvm.arm64.stage2 import PAGE_SHIFT
from pkvm.check.attacks.scene import Scene

TRIES = "donate a page twice in one list"
GUARD = "no two entries of a list meet"


def attempt(scene: Scene) -> str | None:
    """DONATE_GUEST_SGLIST with the same page in two entries."""
    page, free = scene.new_pages() >> PAGE_SHIFT, scene.free_gfn
    scene.donate((page, free), (page, free + 1))
    return "one page has two addresses in the guest"
