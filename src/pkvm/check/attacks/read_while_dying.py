# SPDX-License-Identifier: GPL-2.0-or-later
"""The host looks at each page between two calls of the teardown."""

from __future__ import annotations

from pkvm.arm64.stage2 import PAGE_SHIFT
from pkvm.check.attacks.scene import Scene
from pkvm.hyp.abi import HostCall

TRIES = "read pages one by one as they come back"
GUARD = "private pages are zeroed before the host has them"
WHERE = "pkvm.hyp.reclaim:Reclaim._reclaim"
ENDS_GUEST = True


def attempt(scene: Scene) -> str | None:
    """RECLAIM_DYING_GUEST_PAGE and a load, again and again."""
    handle = scene.vm.handle
    scene.feed_tables()
    scene.start_teardown()
    for page in scene.pages:
        scene.el2(HostCall.RECLAIM_DYING_GUEST_PAGE, handle, page.ipa >> PAGE_SHIFT)
        if words := scene.secret_at(page.pa):
            return words
    return None
