# SPDX-License-Identifier: GPL-2.0-or-later
"""The host looks for the guest's registers in the page that it shares with EL2 for the vCPU."""

from __future__ import annotations

import struct

from pkvm.check.attacks.scene import Scene
from pkvm.hyp.abi import HostVcpu

TRIES = "read the guest's registers after an exit"
GUARD = "the host's page is not written"
WHERE = "pkvm.hyp.exits:Exits.publish"

KERNEL = 0xFFFF_0000_0000_0000
"""Where the addresses of an arm64 kernel begin."""


def attempt(scene: Scene) -> str | None:
    """X0-X30 of the page: addresses of the guest's kernel would tell where it is."""
    scene.guest.shell("true")
    words = struct.unpack("<31Q", scene.host_bus.read(scene.vcpu_page + HostVcpu.X, 31 * 8))
    found = [word for word in words if word >= KERNEL]
    return f"it read: {found[0]:#x}, an address of the kernel's" if found else None
