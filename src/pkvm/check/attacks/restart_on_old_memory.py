# SPDX-License-Identifier: GPL-2.0-or-later
"""The host kills the guest and starts a VM of its own on the same memory."""

from __future__ import annotations

from pkvm.arm64.stage2 import PAGE_SHIFT
from pkvm.check.attacks.accomplice import FREE_GFN
from pkvm.check.attacks.scene import Scene

TRIES = "start another VM on the memory of a guest that was killed"
GUARD = "private pages are zeroed before the host has them"
WHERE = "pkvm.hyp.reclaim:Reclaim._reclaim"
ENDS_GUEST = True


def attempt(scene: Scene) -> str | None:
    """Close every descriptor, then lend the pages."""
    pfns = [page.pa >> PAGE_SHIFT for page in scene.pages]
    accomplice = scene.accomplice  # made now: its own memory must not be what the guest leaves
    scene.guest.stop()
    scene.guest.vmm.close()
    for gfn, pfn in enumerate(pfns, FREE_GFN):
        scene.lend(pfn, gfn)
        if words := scene.reveals(accomplice.look(gfn)):
            return words
    return None
