# SPDX-License-Identifier: GPL-2.0-or-later
"""The host gives the guest's pages for EL2's tables, which are zeroed before use."""

from __future__ import annotations

from pkvm.check.attacks.scene import Scene
from pkvm.hyp.abi import HostCall

TRIES = "give the guest's pages to EL2 as memory for tables"
GUARD = "EL2 takes only what the host owns"


def attempt(scene: Scene) -> str | None:
    """TOPUP_MEMCACHE with each page."""
    return scene.spoil(lambda page: scene.el2(HostCall.TOPUP_MEMCACHE, scene.vm.handle, page.pa, 1))
