# SPDX-License-Identifier: GPL-2.0-or-later
"""The host kills the guest and looks at what it left."""

from __future__ import annotations

from pkvm.check.attacks.scene import Scene

TRIES = "kill the guest and read its memory"
GUARD = "private pages are zeroed before the host has them"
WHERE = "pkvm.hyp.reclaim:Reclaim._reclaim"
ENDS_GUEST = True


def attempt(scene: Scene) -> str | None:
    """Close every descriptor, then load."""
    pas = [page.pa for page in scene.pages]
    scene.guest.stop()
    scene.guest.vmm.close()
    found = (scene.secret_at(pa) for pa in pas)
    return next((words for words in found if words), None)
