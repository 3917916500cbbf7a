# SPDX-License-Identifier: GPL-2.0-or-later
"""The host donates the guest's page a second time, to the same guest at another address."""

from __future__ import annotations

import struct

from pkvm.arm64.stage2 import PAGE_SHIFT
from pkvm.check.attacks.scene import Scene
from pkvm.hyp.abi import HostCall

TRIES = "donate a page that the guest has already"
GUARD = "a page is donated only by its owner"


def attempt(scene: Scene) -> str | None:
    """DONATE_GUEST_SGLIST with the page's number."""
    listed = scene.new_pages()
    free = scene.free_gfn
    scene.feed_tables()
    scene.host_bus.write(listed, struct.pack("<3Q", scene.secret.pa >> PAGE_SHIFT, free, 1))
    scene.el2(HostCall.DONATE_GUEST_SGLIST, scene.vm.handle, listed, 1)
    return "the page has two addresses in the guest"
