# SPDX-License-Identifier: GPL-2.0-or-later
"""The host fills the vCPU's page with registers of its own before each entry."""

from __future__ import annotations

from pkvm.check.attacks.scene import Scene
from pkvm.hyp.abi import HostVcpu, VcpuFlag

TRIES = "change the guest's registers in the vCPU structure"
GUARD = "the host's page is not read"
WHERE = "pkvm.hyp.exits:Exits.accept"


def attempt(scene: Scene) -> str | None:
    """X0-X30, with the flag that says they changed."""

    def lie(_: int, flags: int, x0: int) -> tuple[int, int]:
        scene.host_bus.write(page + HostVcpu.X, noise)
        return flags | VcpuFlag.DIRTY, x0

    noise = bytes(range(1, 249))
    page = scene.vcpu_page
    with scene.lying(lie):
        scene.guest.shell("true")
    return None
