# SPDX-License-Identifier: GPL-2.0-or-later
"""The host gives the guest's page to the secure world by calls that EL2 does not follow."""

from __future__ import annotations

from pkvm.arm64.ffa import Function
from pkvm.check.attacks.scene import Scene
from pkvm.check.attacks.secure import give_past_el2

TRIES = "donate the guest's page to a secure partition by FF-A"
GUARD = "memory is given by calls that EL2 follows"
WHERE = "pkvm.hyp.ffa:FfaProxy.call"


def attempt(scene: Scene) -> str | None:
    """The 32-bit forms of RXTX_MAP and MEM_DONATE, and a message."""
    found = give_past_el2(scene, 0, Function.FFA_RXTX_MAP_32, Function.FFA_MEM_DONATE_32)
    return scene.reveals(found)
