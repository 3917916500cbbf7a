# SPDX-License-Identifier: GPL-2.0-or-later
"""The host reclaims pages of a guest that lives."""

from __future__ import annotations

from pkvm.arm64.stage2 import PAGE_SHIFT
from pkvm.check.attacks.scene import Page, Scene
from pkvm.hyp.abi import HostCall

TRIES = "reclaim the guest's pages while it runs"
GUARD = "only a dying VM's pages are reclaimed"


def attempt(scene: Scene) -> str | None:
    """RECLAIM_DYING_GUEST_PAGE of each page."""

    def take(page: Page) -> None:
        scene.feed_tables()
        gfn = page.ipa >> PAGE_SHIFT
        scene.el2(HostCall.RECLAIM_DYING_GUEST_PAGE, scene.vm.handle, gfn)

    return scene.spoil(take)
