# SPDX-License-Identifier: GPL-2.0-or-later
"""The VMM gives the guest's memory to read(2), for the kernel to write."""

from __future__ import annotations

from pkvm.check.attacks.scene import Scene
from pkvm.vmm.board import RAM_BASE

TRIES = "let a system call write the guest's memory"
GUARD = "a donated page leaves the host's stage-2"


def attempt(scene: Scene) -> str | None:
    """Into each page, from a pipe."""
    ram = scene.guest.vmm.ram
    ipas = {page.pa: page.ipa for page in scene.pages}
    return scene.spoil(lambda pa, data: ram.syscall_write(ipas[pa] - RAM_BASE, data))
