# SPDX-License-Identifier: GPL-2.0-or-later
"""The host gives the guest's pages as memory for a vCPU, which EL2 zeroes."""

from __future__ import annotations

from pkvm.check.attacks.scene import Page, Scene
from pkvm.hyp.abi import HostCall

TRIES = "give the guest's pages to EL2 as memory for a vCPU"
GUARD = "EL2 takes only what the host owns"


def attempt(scene: Scene) -> str | None:
    """INIT_VCPU with each page."""

    def give(page: Page) -> None:
        scene.el2(HostCall.INIT_VCPU, scene.vm.handle, scene.new_pages(), page.pa)

    return scene.spoil(give)
