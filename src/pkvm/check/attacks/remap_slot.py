# SPDX-License-Identifier: GPL-2.0-or-later
"""The host puts pages of its own where the guest's secret is, as if a slot had moved."""

from __future__ import annotations

from pkvm.arm64.stage2 import PAGE_SHIFT
from pkvm.check.attacks.scene import Page, Scene

TRIES = "put the host's pages in place of the guest's"
GUARD = "a guest's frame is given once"


def attempt(scene: Scene) -> str | None:
    """DONATE_GUEST_SGLIST at each address of the secret."""

    def replace(page: Page) -> None:
        scene.donate((scene.new_pages() >> PAGE_SHIFT, page.ipa >> PAGE_SHIFT))

    return scene.spoil(replace)
