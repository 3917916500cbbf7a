# SPDX-License-Identifier: GPL-2.0-or-later
"""virtio-console (section 5.3) with one port: `console=hvc0` of a Linux guest.

Output appears at once. Input waits at a source until the driver has given a
buffer for it. The size of the terminal behind it is in the configuration.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from pkvm.vmm.virtio.device import Port, VirtioDevice
from pkvm.vmm.virtio.queue import Chain, Queue, QueueError

RECEIVE, TRANSMIT = 0, 1
F_SIZE, F_EMERG_WRITE = 1 << 0, 1 << 2
MAX_OUTPUT = 1 << 16
"""Bytes of one buffer at most."""
MAX_INPUT = 4096
"""Bytes that are put into one buffer at most."""

_config = struct.Struct("<HHII")
_EMERGENCY = 8
"""Offset of emerg_wr: what is written to it is output, also before the driver is up."""


class Console(VirtioDevice):
    """The device: `sink` gets what the guest writes, under the device's lock. `source` has the
    input: called with a number of bytes it returns as many or fewer, b"" if it has none; whoever
    has new input calls `arrived`."""

    name = "virtio-console"
    device_id = 3
    device_features = F_SIZE | F_EMERG_WRITE
    queue_names = ("receiveq", "transmitq")
    queue_size = 64

    def __init__(
        self, sink: Callable[[bytes], object], source: Callable[[int], bytes] = lambda _: b""
    ) -> None:
        self._sink = sink
        self._source = source
        self._size = (0, 0)
        self._attached = False
        self._buffer: Chain | None = None
        """A buffer that waits for input."""

    def attach(self, port: Port) -> None:
        """The device is behind this transport now."""
        super().attach(port)
        self._attached = True

    def arrived(self) -> None:
        """There may be input at the source. Any thread may call it."""
        if self._attached:
            with self.port.serving(RECEIVE) as queue:
                self._fill(queue)

    def resize(self, columns: int, rows: int) -> None:
        """The terminal has this size now. Any thread may call it."""
        size = (min(columns, 0xFFFF), min(rows, 0xFFFF))
        if not self._attached:
            self._size = size
            return
        with self.port.lock:
            if size != self._size:
                self._size = size
                self.port.config_changed()

    def read_config(self) -> bytes:
        """cols, rows, max_nr_ports (no F_MULTIPORT: one), emerg_wr."""
        return _config.pack(*self._size, 1, 0)

    def write_config(self, offset: int, data: bytes) -> None:
        """The emergency write of one character."""
        if offset == _EMERGENCY and data:
            self._sink(data[:1])

    def start(self) -> None:
        """Input may wait already."""
        self.arrived()

    def process(self, queue: Queue) -> None:
        """Output is written; a new receive buffer takes input that waits."""
        if queue.index == RECEIVE:
            self._fill(queue)
            return
        while (chain := queue.pop()) is not None:
            data = chain.read_all(MAX_OUTPUT)
            queue.push(chain, 0)
            if data:
                self._sink(data)

    def reset(self) -> None:
        """Input that is still at the source stays there."""
        self._buffer = None

    def _fill(self, queue: Queue) -> None:
        while queue.live:
            chain = self._buffer or queue.pop()
            if chain is None:
                return
            room = min(chain.writable_bytes, MAX_INPUT)
            if not room:
                raise QueueError("a receive buffer without room")
            data = self._source(room)
            if not data:
                self._buffer = chain
                return
            self._buffer = None
            chain.write(data)
            queue.push(chain)
