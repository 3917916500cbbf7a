# SPDX-License-Identifier: GPL-2.0-or-later
"""The VMM gives the guest's memory to write(2), for the kernel to read."""

from __future__ import annotations

from pkvm.arm64.stage2 import PAGE_SIZE
from pkvm.check.attacks.scene import Scene
from pkvm.vmm.board import RAM_BASE

TRIES = "let a system call read the guest's memory"
GUARD = "a donated page leaves the host's stage-2"


def attempt(scene: Scene) -> str | None:
    """The page, through a pipe."""
    ram = scene.guest.vmm.ram
    return scene.reveals(ram.syscall_read(scene.secret.ipa - RAM_BASE, PAGE_SIZE))
