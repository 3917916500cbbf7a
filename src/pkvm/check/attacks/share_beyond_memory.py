# SPDX-License-Identifier: GPL-2.0-or-later
"""The host names a page that is not memory, whose record would be outside EL2's records."""

from __future__ import annotations

from pkvm.check.attacks.scene import Scene
from pkvm.hyp.abi import HostCall

TRIES = "share a page beyond the end of memory"
GUARD = "numbers of pages are checked before use"


def attempt(scene: Scene) -> str | None:
    """HOST_SHARE_HYP with a huge number."""
    scene.el2(HostCall.HOST_SHARE_HYP, (1 << 40) - 1)
    return "EL2 took the number"
