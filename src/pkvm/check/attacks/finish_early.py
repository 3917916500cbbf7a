# SPDX-License-Identifier: GPL-2.0-or-later
"""The host ends the teardown before it has reclaimed the pages, and leaves them."""

from __future__ import annotations

from pkvm.check.attacks.scene import Scene
from pkvm.hyp.abi import HostCall

TRIES = "end the teardown while the VM has pages"
GUARD = "a VM goes only without pages"
ENDS_GUEST = True


def attempt(scene: Scene) -> str | None:
    """START_TEARDOWN_VM, FINALIZE_TEARDOWN_VM."""
    handle = scene.vm.handle
    scene.start_teardown()
    scene.el2(HostCall.FINALIZE_TEARDOWN_VM, handle)
    return "pages of a VM that is gone are left to the next one of its handle"
