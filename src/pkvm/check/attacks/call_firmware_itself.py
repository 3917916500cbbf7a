# SPDX-License-Identifier: GPL-2.0-or-later
"""The host calls the firmware without EL2 in between."""

from __future__ import annotations

from pkvm.arm64.psci import Function
from pkvm.check.attacks.scene import Scene

TRIES = "call the firmware past EL2"
GUARD = "the host's SMCs trap"
WHERE = "pkvm.hyp.host_smc:is_canonical"


def attempt(scene: Scene) -> str | None:
    """An SMC that EL2 would refuse."""
    answer = scene.smc(1 << 32 | Function.PSCI_VERSION)
    return f"firmware answered {answer[0]:#x}, and EL2 never saw the call"
