# SPDX-License-Identifier: GPL-2.0-or-later
"""A device has translations of all memory cached from before the guest had it."""

from __future__ import annotations

from pkvm.arm64.stage2 import PAGE_SIZE
from pkvm.check.attacks.scene import Scene
from pkvm.system import System

TRIES = "use translations that the SMMU cached before the donation"
GUARD = "the SMMU forgets what was lost"


def before(system: System) -> None:
    """Let the device touch every page that the host has."""
    smmu = system.machine.smmu
    assert smmu is not None
    device = smmu.masters()[0]
    end = system.hyp.mem.carveout[0]
    for pa in range(system.machine.memory.ram_base, end - (4 << 20), PAGE_SIZE):
        device.read(pa, 8)


def attempt(scene: Scene) -> str | None:
    """DMA, as before."""
    target = scene.new_pages()
    scene.dma(scene.secret.pa, target, PAGE_SIZE)
    return scene.secret_at(target)
