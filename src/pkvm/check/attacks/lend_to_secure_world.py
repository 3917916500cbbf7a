# SPDX-License-Identifier: GPL-2.0-or-later
"""The host lends the guest's page to the secure world, which can read everything, and asks it."""

from __future__ import annotations

from pkvm.check.attacks.scene import Scene
from pkvm.check.attacks.secure import PARTITION, read_by_partition

TRIES = "lend the guest's page to a secure partition by FF-A, and ask for its content"
GUARD = "the secure world is given what the host owns"


def attempt(scene: Scene) -> str | None:
    """FFA_MEM_SHARE, and a message."""
    driver = scene.kernel.ffa()
    handle = driver.give([(scene.secret.pa, 1)], PARTITION)
    return scene.reveals(read_by_partition(driver, handle, 0))
