# SPDX-License-Identifier: GPL-2.0-or-later
"""The host donates one page of its own twice with one call."""

from __future__ import annotations

import struct

from pkvm.arm64.stage2 import PAGE_SHIFT
from pkvm.check.attacks.scene import Scene
from pkvm.hyp.abi import HostCall

TRIES = "donate a page twice in one list"
GUARD = "no two entries of a list meet"


def attempt(scene: Scene) -> str | None:
    """DONATE_GUEST_SGLIST with the same page in two entries."""
    listed, page = scene.new_pages(), scene.new_pages() >> PAGE_SHIFT
    scene.feed_tables()
    free = scene.free_gfn
    entries = struct.pack("<6Q", page, free, 1, page, free + 1, 1)
    scene.host_bus.write(listed, entries)
    scene.el2(HostCall.DONATE_GUEST_SGLIST, scene.vm.handle, listed, 2)
    return "one page has two addresses in the guest"
