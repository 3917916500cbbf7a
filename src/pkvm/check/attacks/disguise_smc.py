# SPDX-License-Identifier: GPL-2.0-or-later
"""The host shares the guest's page by calls whose upper bits a filter may not look at."""

from __future__ import annotations

from pkvm.arm64.ffa import Function
from pkvm.check.attacks.scene import Scene
from pkvm.check.attacks.secure import give_past_el2

TRIES = "pass the filter with bits above a function id"
GUARD = "a function id is canonical"
WHERE = "pkvm.hyp.host_smc:is_canonical"


def attempt(scene: Scene) -> str | None:
    """RXTX_MAP and MEM_SHARE with bit 32, and a message."""
    upper = 1 << 32
    found = give_past_el2(scene, upper, Function.FFA_RXTX_MAP_64, Function.FFA_MEM_SHARE_64)
    return scene.reveals(found)
