# SPDX-License-Identifier: GPL-2.0-or-later
"""The host says that WFI raised an exception."""

from __future__ import annotations

from pkvm.arm64.esr import EC
from pkvm.check.attacks.scene import Scene
from pkvm.hyp.abi import VcpuFlag

TRIES = "inject an exception that the guest's instruction cannot raise"
GUARD = "WFI takes no exception"
WHERE = "pkvm.hyp.exits:Exits.accept"


def attempt(scene: Scene) -> str | None:
    """PENDING_EXCEPTION in the answer to each WFI."""

    def lie(esr: int, flags: int, x0: int) -> tuple[int, int]:
        return (VcpuFlag.PENDING_EXCEPTION, x0) if esr and esr >> 26 == EC.WFX else (flags, x0)

    with scene.lying(lie):
        scene.guest.shell("sleep 0.05")
    return None
