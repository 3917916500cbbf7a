# SPDX-License-Identifier: GPL-2.0-or-later
"""The host takes back the page of a VM that it shares with EL2."""

from __future__ import annotations

from pkvm.arm64.stage2 import PAGE_SHIFT
from pkvm.check.attacks.scene import Scene
from pkvm.hyp.abi import HostCall

TRIES = "take a page back that EL2 still uses"
GUARD = "EL2 keeps the pages that it uses"


def attempt(scene: Scene) -> str | None:
    """HOST_UNSHARE_HYP of the VM's page."""
    page = scene.hosts_vm.page >> PAGE_SHIFT
    scene.el2(HostCall.HOST_UNSHARE_HYP, page)
    return "EL2 goes on writing to a page that may be anyone's"
