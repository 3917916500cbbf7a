# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest programs that come with pkvm, as flat AArch64 images.

Their sources and what each one does are in guests/ of the source tree; a test
proves that the files here are what the sources build to. An image is entered at
its first byte and runs at any page-aligned address.
"""

from __future__ import annotations

from pathlib import Path

NAMES = ("agent", "firmware", "hello", "irq", "sharing", "smp")
"""What `image` knows."""


def image(name: str) -> bytes:
    """The flat image of the guest program `name`. Raises KeyError if there is no such program."""
    if name not in NAMES:
        raise KeyError(f"no guest program {name!r}: there are {', '.join(NAMES)}")
    return Path(__file__).with_name(f"{name}.bin").read_bytes()
