# SPDX-License-Identifier: GPL-2.0-or-later
"""The host lends the guest's page to a VM of its own, whose guest reads it."""

from __future__ import annotations

from pkvm.check.attacks.scene import Scene

TRIES = "map the guest's page into a VM of the attacker's"
GUARD = "a page is lent only by its owner"


def attempt(scene: Scene) -> str | None:
    """HOST_SHARE_GUEST of the page, and a look from inside."""
    return scene.secret_lent()
