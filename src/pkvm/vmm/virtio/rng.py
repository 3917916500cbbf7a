# SPDX-License-Identifier: GPL-2.0-or-later
"""virtio-rng (section 5.4): entropy for the guest."""

from __future__ import annotations

import os
from collections.abc import Callable

from pkvm.vmm.virtio.device import VirtioDevice
from pkvm.vmm.virtio.queue import Queue, QueueError

MAX_BYTES = 1 << 16
"""Bytes for one buffer at most: a device may give fewer than it is asked for."""


class Entropy(VirtioDevice):
    """The device. `source` makes so many random bytes."""

    name = "virtio-rng"
    device_id = 4
    queue_names = ("requests",)
    queue_size = 64

    def __init__(self, source: Callable[[int], bytes] = os.urandom) -> None:
        self._source = source

    def process(self, queue: Queue) -> None:
        """Fill every buffer that is available."""
        while (chain := queue.pop()) is not None:
            room = min(chain.writable_bytes, MAX_BYTES)
            if not room:
                raise QueueError("a buffer without room for entropy")
            chain.write(self._source(room))
            queue.push(chain)
