# SPDX-License-Identifier: GPL-2.0-or-later
"""The VMM gives the guest's memory to read(2), for the kernel to write."""

from __future__ import annotations

from pkvm.check.attacks.scene import NOISE, Scene
from pkvm.vmm.board import RAM_BASE

TRIES = "let a system call write the guest's memory"
GUARD = "a donated page leaves the host's stage-2"


def attempt(scene: Scene) -> str | None:
    """Into each page, from a pipe."""
    ram = scene.guest.vmm.ram
    return scene.spoil(lambda page: ram.syscall_write(page.ipa - RAM_BASE, NOISE))
