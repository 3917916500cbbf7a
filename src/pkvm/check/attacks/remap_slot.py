# SPDX-License-Identifier: GPL-2.0-or-later
"""The host puts pages of its own where the guest's secret is, as if a slot had moved."""

from __future__ import annotations

import struct

from pkvm.arm64.stage2 import PAGE_SHIFT
from pkvm.check.attacks.scene import Scene
from pkvm.hyp.abi import HostCall

TRIES = "put the host's pages in place of the guest's"
GUARD = "a guest's frame is given once"


def attempt(scene: Scene) -> str | None:
    """DONATE_GUEST_SGLIST at each address of the secret."""
    listed = scene.new_pages()
    scene.feed_tables()

    def replace(ipa: int) -> None:
        entry = struct.pack("<3Q", scene.new_pages() >> PAGE_SHIFT, ipa >> PAGE_SHIFT, 1)
        scene.host_bus.write(listed, entry)
        scene.el2(HostCall.DONATE_GUEST_SGLIST, scene.vm.handle, listed, 1)

    ipas = {page.pa: page.ipa for page in scene.pages}
    return scene.spoil(lambda pa, _: replace(ipas[pa]))
