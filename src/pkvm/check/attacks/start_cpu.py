# SPDX-License-Identifier: GPL-2.0-or-later
"""The host starts another CPU at an address of its own, where no stage-2 is in force."""

from __future__ import annotations

from pkvm.arm64.psci import Affinity
from pkvm.arm64.stage2 import PAGE_SIZE
from pkvm.check.attacks.scene import Scene

TRIES = "start a CPU that never enters EL2"
GUARD = "a CPU that starts enters EL2 first"


def attempt(scene: Scene) -> str | None:
    """CPU_ON, and a load by that CPU."""
    cpus = scene.kernel.cpus
    if cpus.state(1) == Affinity.OFF:
        cpus.up(1, scene.machine.memory.ram_base)
    return scene.reveals(cpus.buses[1].read(scene.secret.pa, PAGE_SIZE))
