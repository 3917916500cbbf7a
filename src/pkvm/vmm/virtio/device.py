# SPDX-License-Identifier: GPL-2.0-or-later
"""`VirtioDevice`, what a kind of device is made of, and `Port`, what its transport offers it.

Locking. Each device has one lock, `Port.lock`, which covers everything that the
device and its queues hold. The transport takes it around every register access,
so `process`, `read_config`, `write_config`, `start` and `reset` run with it
held, in a vCPU's thread. A thread of the device's own (a reader of a socket or
a terminal) takes it through `Port.serving` to touch a queue, and blocks on its
input only while it does not hold it. Under the lock a device may use guest
memory and its own files; it must not call into the VMM or wait for a vCPU or
for its own thread. `close` is called without the lock, so that it can join.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pkvm.vmm.virtio.queue import Queue


class Port(Protocol):
    """The transport, as the device behind it sees it."""

    lock: threading.RLock
    """The device's lock."""

    @property
    def queues(self) -> tuple[Queue, ...]:
        """The device's queues, by index. The same objects for the port's life."""
        ...

    @property
    def features(self) -> int:
        """Feature bits that driver and device agreed on; 0 before FEATURES_OK."""
        ...

    @property
    def live(self) -> bool:
        """Whether the driver set DRIVER_OK and nothing has broken since."""
        ...

    def serving(self, queue: int) -> AbstractContextManager[Queue]:
        """`with port.serving(RX) as queue:` hold the device's lock, and use this queue in it.

        QueueError and GuestMemoryError raised inside end there: they are reported and the device
        goes DEVICE_NEEDS_RESET. At the end used buffers of every queue are published and the
        driver is interrupted if it wants to be. Any thread may; it nests.
        """
        ...

    def config_changed(self) -> None:
        """Tell the driver that the configuration is another (section 2.5). Lock held."""
        ...

    def fault(
        self, what: str, advice: str = "", *, queue: int | None = None, address: int | None = None
    ) -> None:
        """A line for the report: an I/O error, a closed socket. The device goes on."""
        ...


class VirtioDevice:
    """Base of the kinds of devices: a subclass sets the attributes and overrides what it needs.

    One object serves one slot, for as many lives of its VM as there are: `attach` is called at the
    start of each, `reset` whenever the driver resets it (and before a new life).
    """

    name = "virtio"
    """For the report: "virtio-blk"."""
    device_id = 0
    """Section 5."""
    device_features = 0
    """Feature bits 0-23 and 50-127 of the kind. The transport adds VERSION_1, ACCESS_PLATFORM,
    RING_INDIRECT_DESC and RING_EVENT_IDX."""
    queue_names: tuple[str, ...] = ()
    """A name for each queue; their number is the number of queues."""
    by_dma = False
    """Whether it reaches guest memory as a DMA-capable device does (`pkvm.vmm.dma_memory`)."""
    queue_size = 256
    """Descriptors of each queue at most (QueueNumMax), a power of 2."""

    port: Port

    def attach(self, port: Port) -> None:
        """The device is behind this transport now."""
        self.port = port

    def read_config(self) -> bytes:
        """The device-specific configuration space, all of it (at most 256 bytes)."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver wrote to the configuration space, within what `read_config` gives."""

    def start(self) -> None:
        """The driver set DRIVER_OK: `port.features` and the queues hold now."""

    def process(self, queue: Queue) -> None:
        """The driver notified `queue`. May raise QueueError and GuestMemoryError."""

    def reset(self) -> None:
        """Forget what the driver has done. Chains that are still held are stale from now on."""

    def close(self) -> None:
        """The VM ends: end threads, close files. Idempotent. Without the lock."""
