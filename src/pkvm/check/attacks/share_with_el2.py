# SPDX-License-Identifier: GPL-2.0-or-later
"""The host shares the guest's page with EL2 and takes it back, as if it were its own."""

from __future__ import annotations

from pkvm.arm64.stage2 import PAGE_SHIFT
from pkvm.check.attacks.scene import Scene
from pkvm.hyp.abi import HostCall

TRIES = "make the guest's page the host's by sharing it with EL2 and taking it back"
GUARD = "EL2 shares only what the host owns"


def attempt(scene: Scene) -> str | None:
    """HOST_SHARE_HYP, HOST_UNSHARE_HYP, and then lend it to a VM of the attacker's."""
    pfn = scene.secret.pa >> PAGE_SHIFT
    scene.el2(HostCall.HOST_SHARE_HYP, pfn)
    scene.el2(HostCall.HOST_UNSHARE_HYP, pfn)
    return scene.secret_lent()
