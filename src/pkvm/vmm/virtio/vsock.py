# SPDX-License-Identifier: GPL-2.0-or-later
"""virtio-vsock (section 5.10) to Unix sockets, by the convention of Firecracker's device.

From the host: connect to the socket at PATH and say "CONNECT port\\n"; when the
guest accepts, "OK hostport\\n" comes back, and then what the guest says. From the
guest: a connection to port N of the host (CID 2) goes to the socket at PATH_N.

A hostile guest can have MAX_STREAMS connections and MAX_STRAYS answers waiting;
beyond that it is refused, or not listened to until it takes its answers.
"""

from __future__ import annotations

import re
import socket
from collections import deque
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pkvm.vmm.errors import LoadError
from pkvm.vmm.virtio.device import VirtioDevice
from pkvm.vmm.virtio.loop import IN, OUT, Loop
from pkvm.vmm.virtio.queue import Chain, Queue, QueueError
from pkvm.vmm.virtio.vsock_packet import (
    FIRST_GUEST_CID,
    HEADER_BYTES,
    HOST_CID,
    LAST_GUEST_CID,
    MAX_PAYLOAD,
    TYPE_STREAM,
    Header,
    Op,
)
from pkvm.vmm.virtio.vsock_stream import BUFFER_BYTES, CreditError, State, Stream

RECEIVE, TRANSMIT, EVENT = 0, 1, 2
F_STREAM = 1 << 0
MAX_STREAMS = 256
"""Connections at a time, those that have not said CONNECT yet included."""
MAX_STRAYS = 64
"""Answers to packets of no connection that wait for the guest to take them."""
FIRST_HOST_PORT = 1 << 30
"""Ports of the host's side of connections that the host opens, from here on."""

_GREETING_LIMIT = 32
_CONNECT = re.compile(rb"connect ([0-9]{1,10})\s*\Z", re.IGNORECASE)


class Key(NamedTuple):
    """A connection's name."""

    host_port: int
    guest_port: int


class Caller(NamedTuple):
    """Somebody on the host who has not said CONNECT yet."""

    socket: socket.socket
    said: bytearray


class Vsock(VirtioDevice):
    """The device: the guest is `cid`, and `path` is where the host's socket is made. Raises
    LoadError."""

    name = "virtio-vsock"
    device_id = 19
    device_features = F_STREAM
    queue_names = ("rx", "tx", "event")

    def __init__(self, cid: int, path: str) -> None:
        if not FIRST_GUEST_CID <= cid <= LAST_GUEST_CID:
            raise LoadError(
                f"a guest with the context id {cid} cannot be: choose {FIRST_GUEST_CID} to "
                f"{LAST_GUEST_CID}"
            )
        self.cid = cid
        self.path = path
        self._listener = listen(path)
        self._loop = Loop("virtio-vsock")
        self._streams: dict[Key, Stream] = {}
        self._callers: dict[int, Caller] = {}
        """By file descriptor."""
        self._ready: dict[Key, None] = {}
        """Connections that have something for the guest, the next one first."""
        self._strays: deque[Header] = deque()
        self._buffer: Chain | None = None
        self._next_port = FIRST_HOST_PORT

    def read_config(self) -> bytes:
        """guest_cid."""
        return self.cid.to_bytes(8, "little")

    def start(self) -> None:
        """From now on callers are let in; those who came before have waited."""
        self._loop.watch(self._listener.fileno(), IN, self._on_call)

    def process(self, queue: Queue) -> None:
        """Hear what the guest says and answer. Buffers for events are kept: there are none."""
        if queue.index != EVENT:
            self._pump()

    def reset(self) -> None:
        """Every connection ends."""
        self._loop.watch(self._listener.fileno(), 0, self._on_call)
        self._end_all()

    def close(self) -> None:
        """End every connection and remove the socket. Idempotent."""
        self._loop.close()
        self._end_all()
        if self._listener.fileno() >= 0:
            self._listener.close()
            Path(self.path).unlink(missing_ok=True)

    def _end_all(self) -> None:
        for stream in self._streams.values():
            stream.finish()
            self._leave(stream)
        for fd, caller in self._callers.items():
            self._loop.forget(fd)
            caller.socket.close()
        self._streams.clear()
        self._callers.clear()
        self._ready.clear()
        self._strays.clear()
        self._buffer = None

    # Packets

    def _pump(self) -> None:
        """Hear the guest as long as there is room for answers, and send what there is."""
        while True:
            more = False  # Where an error ends the block, too.
            with self.port.serving(TRANSMIT) as queue:
                more = self._hear(queue)
            with self.port.serving(RECEIVE) as queue:
                self._deliver(queue)
            if not more or len(self._strays) >= MAX_STRAYS:
                return

    def _hear(self, queue: Queue) -> bool:
        """Handle the guest's packets; True if answers have to be taken first."""
        while len(self._strays) < MAX_STRAYS:
            chain = queue.pop()
            if chain is None:
                return False
            queue.push(chain, 0)
            if chain.readable_bytes < HEADER_BYTES:
                raise QueueError(f"a packet's header of {chain.readable_bytes} bytes")
            header = Header.unpack(chain.read(0, HEADER_BYTES))
            if header.length > min(chain.readable_bytes - HEADER_BYTES, MAX_PAYLOAD):
                raise QueueError(f"a packet that says it has {header.length} bytes, and has not")
            payload = b""
            if header.op == Op.RW and header.length:
                payload = chain.read(HEADER_BYTES, header.length)
            if header.src_cid == self.cid:
                self._handle(header, payload)
        return True

    def _handle(self, header: Header, payload: bytes) -> None:
        key = Key(header.dst_port, header.src_port)
        ours = header.dst_cid == HOST_CID and header.type == TYPE_STREAM
        stream = self._streams.get(key) if ours else None
        if stream is not None:
            self._handle_stream(key, stream, header, payload)
        elif ours and header.op == Op.REQUEST:
            self._open(key, header)
        elif header.op != Op.RST:
            self._refuse(header)

    def _handle_stream(self, key: Key, stream: Stream, header: Header, payload: bytes) -> None:
        stream.hear(header)
        if header.op == Op.RST:
            stream.finish()
            self._leave(stream)
            del self._streams[key]
            self._ready.pop(key, None)
            return
        if stream.state is State.OPEN and header.op == Op.RW:
            try:
                stream.take(payload)
            except CreditError:
                self.port.fault(
                    f"the guest sent more than {BUFFER_BYTES} bytes ahead on a connection",
                    "its vsock driver does not keep to the credit; the connection was reset",
                    queue=TRANSMIT,
                )
                stream.abort()
        elif stream.state is State.OPEN and header.op == Op.SHUTDOWN:
            stream.guest_shuts_down(header.flags)
        elif stream.state is State.OPEN and header.op == Op.CREDIT_REQUEST:
            stream.due.add(Op.CREDIT_UPDATE)
        elif stream.state is State.REQUESTED and header.op == Op.RESPONSE:
            stream.opened(b"OK %d\n" % key.host_port)
        elif stream.state is not State.DONE and header.op != Op.CREDIT_UPDATE:
            stream.abort()
        self._touch(key, stream)

    def _open(self, key: Key, header: Header) -> None:
        """The guest wants to be connected to a port of the host's."""
        if self._full:
            self._refuse(header)
            return
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            connection.connect(f"{self.path}_{key.host_port}")
        except OSError:
            connection.close()
            self._refuse(header)
            return
        stream = self._add(key, connection, State.OPEN)
        stream.hear(header)
        stream.due.add(Op.RESPONSE)
        self._touch(key, stream)

    def _add(self, key: Key, connection: socket.socket, state: State) -> Stream:
        stream = Stream(connection, state)
        stream.on_ready = partial(self._on_socket, key, stream)
        self._streams[key] = stream
        return stream

    def _refuse(self, header: Header) -> None:
        """RST for a packet of no connection; there is room for it (`_hear`)."""
        self._strays.append(
            Header(
                header.dst_cid, self.cid, header.dst_port, header.src_port, 0, header.type, Op.RST,
                0, 0, 0,
            )
        )  # fmt: skip

    def _deliver(self, queue: Queue) -> None:
        while queue.live and (self._strays or self._ready):
            chain = self._buffer or queue.pop()
            if chain is None:
                return
            self._buffer = chain
            room = min(chain.writable_bytes - HEADER_BYTES, MAX_PAYLOAD)
            if room <= 0:
                raise QueueError(f"a receive buffer of {chain.writable_bytes} bytes")
            packet = self._next_packet(room)
            if packet:
                self._buffer = None
                chain.write(packet)
                queue.push(chain)

    def _next_packet(self, room: int) -> bytes:
        """The next packet for the guest, with at most `room` bytes behind its header; b"" if the
        connection whose turn it is has none after all."""
        if self._strays:
            return self._strays.popleft().pack()
        key = next(iter(self._ready))
        del self._ready[key]
        stream = self._streams[key]
        packet = self._packet_of(key, stream, room)
        self._touch(key, stream)
        return packet

    def _packet_of(self, key: Key, stream: Stream, room: int) -> bytes:
        for op in Op:
            if op not in stream.due:
                continue
            stream.due.discard(op)
            flags = stream.shutdown_flags if op is Op.SHUTDOWN else 0
            packet = self._header(key, stream, op, flags=flags).pack()
            if op is Op.RST:
                del self._streams[key]
            return packet
        if stream.has_data:
            data = stream.read(room)
            if data:
                return self._header(key, stream, Op.RW, length=len(data)).pack() + data
        return b""

    def _header(
        self, key: Key, stream: Stream, op: Op, *, length: int = 0, flags: int = 0
    ) -> Header:
        stream.told()
        return Header(
            HOST_CID, self.cid, key.host_port, key.guest_port, length, TYPE_STREAM, op, flags,
            BUFFER_BYTES, stream.forwarded,
        )  # fmt: skip

    def _touch(self, key: Key, stream: Stream) -> None:
        """After any change of a stream: let it have its turn, and wait for what it wants."""
        if stream.ready and key in self._streams:
            self._ready.setdefault(key)
        if stream.state is State.DONE:
            self._leave(stream)
        else:
            self._loop.watch(stream.fd, stream.wanted, stream.on_ready)

    def _leave(self, stream: Stream) -> None:
        """The stream's socket is closed: its number may be another's soon."""
        if stream.fd >= 0:
            self._loop.forget(stream.fd)
            stream.fd = -1

    # The host's side, in the loop's thread

    @property
    def _full(self) -> bool:
        return len(self._streams) + len(self._callers) >= MAX_STREAMS

    def _on_socket(self, key: Key, stream: Stream, events: int) -> None:
        with self.port.lock:
            if self._streams.get(key) is not stream or stream.state is State.DONE:
                return
            if events & OUT:
                stream.flush()
            if events & IN:
                stream.readable = True
            self._touch(key, stream)
            self._pump()

    def _on_call(self, _events: int) -> None:
        with self.port.lock:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.setblocking(False)
            if self._full or not self.port.live:
                connection.close()
                return
            fd = connection.fileno()
            self._callers[fd] = Caller(connection, bytearray())
            self._loop.watch(fd, IN, lambda _: self._on_said(fd))

    def _on_said(self, fd: int) -> None:
        """A caller says which port it wants. What follows the line is for the guest."""
        with self.port.lock:
            caller = self._callers.get(fd)
            if caller is None:
                return
            try:
                said = caller.socket.recv(_GREETING_LIMIT - len(caller.said), socket.MSG_PEEK)
                taken = caller.socket.recv(said.find(b"\n") + 1 or len(said))
            except BlockingIOError:
                return
            except OSError:
                taken = b""
            caller.said.extend(taken)
            whole = caller.said.endswith(b"\n")
            if taken and not whole and len(caller.said) < _GREETING_LIMIT:
                return
            del self._callers[fd]
            match = _CONNECT.match(caller.said) if whole else None
            if match is None or int(match[1]) > 0xFFFF_FFFF:
                self._loop.forget(fd)
                caller.socket.close()
                return
            self._call(caller.socket, int(match[1]))

    def _call(self, connection: socket.socket, guest_port: int) -> None:
        """Ask the guest for a connection to its port."""
        key = Key(self._next_port, guest_port)
        while key in self._streams:
            key = key._replace(host_port=key.host_port + 1)
        self._next_port = FIRST_HOST_PORT + (key.host_port + 1) % FIRST_HOST_PORT
        stream = self._add(key, connection, State.REQUESTED)
        stream.due.add(Op.REQUEST)
        self._touch(key, stream)
        self._pump()


def listen(path: str) -> socket.socket:
    """A Unix socket at `path` that takes callers. One that a process which ended has left is
    replaced. Raises LoadError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_left_over(path):
            Path(path).unlink()
        listener.bind(path)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise LoadError(
            f"{path}: no socket can be made there ({error.strerror or error}): choose another path"
        ) from None
    listener.setblocking(False)
    return listener


def _is_left_over(path: str) -> bool:
    """Whether there is a socket at which nobody listens."""
    if not Path(path).is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
    return False
