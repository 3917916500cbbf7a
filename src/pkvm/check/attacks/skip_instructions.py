# SPDX-License-Identifier: GPL-2.0-or-later
"""The host steps the guest over an instruction at each interrupt."""

from __future__ import annotations

from pkvm.check.attacks.scene import Scene
from pkvm.hyp.abi import VcpuFlag

TRIES = "make the guest skip instructions"
GUARD = "an interrupt steps over nothing"
WHERE = "pkvm.hyp.exits:Exits.accept"


def attempt(scene: Scene) -> str | None:
    """INCREMENT_PC in the answer to exits that no instruction caused."""

    def lie(esr: int, flags: int, x0: int) -> tuple[int, int]:
        return flags if esr else VcpuFlag.INCREMENT_PC, x0

    with scene.lying(lie):
        scene.guest.shell("i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done")
    return None
