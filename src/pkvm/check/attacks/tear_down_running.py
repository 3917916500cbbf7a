# SPDX-License-Identifier: GPL-2.0-or-later
"""The host tears the VM down while a vCPU of it is loaded."""

from __future__ import annotations

from pkvm.check.attacks.scene import Scene
from pkvm.hyp.abi import HostCall

TRIES = "start the teardown while a vCPU is loaded"
GUARD = "a VM with a loaded vCPU is not torn down"


def attempt(scene: Scene) -> str | None:
    """START_TEARDOWN_VM."""
    scene.el2_with(scene.hosts_vm, HostCall.START_TEARDOWN_VM, scene.vm.handle)
    return "the VM dies under its vCPU"
