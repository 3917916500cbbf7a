# SPDX-License-Identifier: GPL-2.0-or-later
"""virtio-net (section 5.1) without offloads: every frame goes as it is.

The loop's thread receives. While the driver has no buffers, nothing is taken
from the link, whose own queue then fills. What the driver sends goes out in its
vCPU's thread. When the link is gone, the driver sees its link go down.
"""

from __future__ import annotations

import hashlib
import re
import struct

from pkvm.vmm.errors import LoadError
from pkvm.vmm.virtio.device import VirtioDevice
from pkvm.vmm.virtio.links import MAX_FRAME, Link, LinkError
from pkvm.vmm.virtio.loop import IN, OUT, Loop
from pkvm.vmm.virtio.queue import Chain, Queue, QueueError

RECEIVE, TRANSMIT = 0, 1
F_MTU, F_MAC, F_STATUS = 1 << 3, 1 << 5, 1 << 16
S_LINK_UP = 1
DEFAULT_MTU = 1500
MIN_MTU, MAX_MTU = 1280, 65520
ETHERNET_BYTES = 14
HEADER_BYTES = 12
_HEADER = struct.pack("<BBHHHHH", 0, 0, 0, 0, 0, 0, 1)
"""struct virtio_net_hdr of a received frame: nothing to say but num_buffers."""

_config = struct.Struct("<6sHHH")


class Net(VirtioDevice):
    """The device, plugged into `link`, which it closes. `mac`: 6 bytes (default: made of the
    link's name, so that it stays the same)."""

    name = "virtio-net"
    device_id = 1
    device_features = F_MTU | F_MAC | F_STATUS
    queue_names = ("receiveq", "transmitq")

    def __init__(self, link: Link, *, mac: bytes | None = None, mtu: int = DEFAULT_MTU) -> None:
        self.mac = default_mac(link.identity) if mac is None else mac
        self.mtu = mtu
        self.link_up = True
        self.lost = 0
        """Received frames that found no buffer large enough."""
        self._link = link
        self._fd = link.fileno()
        self._loop = Loop("virtio-net")
        self._buffer: Chain | None = None
        self._waiting: list[bytes] = []
        """Frames that wait for buffers, the first one last."""

    def read_config(self) -> bytes:
        """mac, status, max_virtqueue_pairs (no F_MQ: one), mtu."""
        return _config.pack(self.mac, S_LINK_UP if self.link_up else 0, 1, self.mtu)

    def start(self) -> None:
        """From now on frames are taken from the link."""
        self._watch()

    def process(self, queue: Queue) -> None:
        """Send what there is; new receive buffers take frames that wait."""
        if queue.index == TRANSMIT:
            self._transmit(queue)
        else:
            self._fill(queue)
        self._watch()

    def reset(self) -> None:
        """Frames that wait are lost, as in a network card that is reset."""
        self._buffer = None
        self._waiting.clear()
        self._watch()

    def close(self) -> None:
        """Unplug. Idempotent."""
        self._loop.close()
        self._link.close()

    def _watch(self) -> None:
        """Wait for what can be used, lock held."""
        events = 0
        if self.link_up:
            if self.port.live and not self._waiting:
                events |= IN
            if self._link.sending:
                events |= OUT
        self._loop.watch(self._fd, events, self._ready)

    def _ready(self, events: int) -> None:
        """In the loop's thread: the link has frames, or room."""
        with self.port.serving(RECEIVE) as queue:
            try:
                if events & OUT:
                    self._link.flush()
                if events & IN and not self._waiting:
                    self._waiting = self._link.receive()[::-1]
            except LinkError as error:
                self._gone(error)
            self._fill(queue)
        with self.port.lock:
            self._watch()

    def _fill(self, queue: Queue) -> None:
        while self._waiting and queue.live:
            chain = self._buffer or queue.pop()
            if chain is None:
                return
            self._buffer = chain
            frame = self._waiting.pop()
            room = chain.writable_bytes
            if room < HEADER_BYTES + ETHERNET_BYTES:
                raise QueueError(f"a receive buffer of {room} bytes")
            if len(frame) < ETHERNET_BYTES:
                continue
            if room < HEADER_BYTES + len(frame):
                self.lost += 1
                continue
            self._buffer = None
            chain.write(_HEADER + frame)
            queue.push(chain)

    def _transmit(self, queue: Queue) -> None:
        while (chain := queue.pop()) is not None:
            data = chain.read_all(HEADER_BYTES + MAX_FRAME)
            queue.push(chain, 0)
            if len(data) < HEADER_BYTES:
                raise QueueError(f"a frame's header of {len(data)} bytes")
            if len(data) < HEADER_BYTES + ETHERNET_BYTES or not self.link_up:
                continue
            try:
                self._link.send(data[HEADER_BYTES:])
            except LinkError as error:
                self._gone(error)

    def _gone(self, error: LinkError) -> None:
        if self.link_up:
            self.link_up = False
            self.port.fault(str(error), error.advice)
            self.port.config_changed()


def default_mac(identity: str) -> bytes:
    """A locally administered unicast address made of a name."""
    digest = hashlib.blake2s(identity.encode(), digest_size=5).digest()
    return b"\x02" + digest


def parse_mac(text: str) -> bytes:
    """Six bytes of "02:00:00:00:00:01". Raises LoadError for what is no unicast address."""
    if re.fullmatch(r"([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}", text) is None:
        raise LoadError(f"{text!r} is not a MAC address such as 02:00:00:00:00:01")
    mac = bytes.fromhex(text.replace(":", ""))
    if mac[0] & 1 or mac == bytes(6):
        raise LoadError(f"the MAC address {text} is not of a single station: make its first even")
    return mac
