# SPDX-License-Identifier: GPL-2.0-or-later
"""A device copies bytes of the host's over every page of the secret."""

from __future__ import annotations

from pkvm.check.attacks.scene import NOISE, Scene

TRIES = "let the copy engine write to the guest's pages"
GUARD = "devices lose what the host loses"


def attempt(scene: Scene) -> str | None:
    """DMA to each page."""
    source = scene.new_pages()
    return scene.spoil(lambda page: scene.dma(source, page.pa, len(NOISE)))
