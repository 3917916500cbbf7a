# SPDX-License-Identifier: GPL-2.0-or-later
"""The host lends a page of its own, and the guest's in a later fragment of the same call."""

from __future__ import annotations

from pkvm.arm64.ffa_memory import CONSTITUENT_BYTES, write_transaction
from pkvm.arm64.stage2 import PAGE_SIZE
from pkvm.check.attacks.scene import Scene
from pkvm.check.attacks.secure import PARTITION, read_by_partition

TRIES = "lend the guest's page to a secure partition in a later fragment"
GUARD = "every fragment is looked at"


def attempt(scene: Scene) -> str | None:
    """FFA_MEM_SHARE in two fragments."""
    driver = scene.kernel.ffa()
    pages = [(scene.new_pages(2) + PAGE_SIZE, 1), (scene.secret.pa, 1)]
    first = len(write_transaction(driver.version, [], receivers=[PARTITION]))
    handle = driver.give(pages, PARTITION, fragment=first + CONSTITUENT_BYTES)
    return scene.reveals(read_by_partition(driver, handle, PAGE_SIZE))
