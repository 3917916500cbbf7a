# SPDX-License-Identifier: GPL-2.0-or-later
"""A device's loop without a thread: a test says when it looks at the files."""

from __future__ import annotations

import select

from pkvm.vmm.virtio.loop import IN, OUT, Ready


class ManualLoop:
    """Stands in for `pkvm.vmm.virtio.loop.Loop`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.watched: dict[int, tuple[int, Ready]] = {}

    def watch(self, fd: int, events: int, ready: Ready) -> None:
        if events:
            self.watched[fd] = (events, ready)
        else:
            self.watched.pop(fd, None)

    def forget(self, fd: int) -> None:
        self.watched.pop(fd, None)

    def close(self) -> None:
        self.watched.clear()

    def look(self) -> bool:
        """Serve what is ready now; False if nothing is."""
        poll = select.poll()
        for fd, (events, _) in self.watched.items():
            poll.register(fd, events)
        found = False
        for fd, happened in poll.poll(0):
            events, ready = self.watched.get(fd, (0, None))
            if happened & ~(IN | OUT):
                assert not happened & select.POLLNVAL, "a closed file is still watched"
                happened |= IN | OUT
            if ready is not None and happened & events:
                found = True
                ready(happened & events)
        return found

    def settle(self) -> None:
        """Serve until nothing is ready."""
        for _ in range(10_000):
            if not self.look():
                return
        raise AssertionError("the loop spins")
