# SPDX-License-Identifier: GPL-2.0-or-later
"""`Stream`: one vsock connection, between a guest's port and a socket of the host.

It holds what the guest sent and the socket has not taken, at most BUFFER_BYTES
(the credit that the guest has), and nothing in the other direction: the socket
is read straight into a buffer of the driver's, when there is one and the guest
has room for it (section 5.10.6.3).
"""

from __future__ import annotations

import select
import socket
from enum import Enum

from pkvm.vmm.virtio.loop import IN, OUT, Ready
from pkvm.vmm.virtio.vsock_packet import (
    SHUTDOWN_BOTH,
    SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND,
    Header,
    Op,
)

BUFFER_BYTES = 1 << 17
"""`buf_alloc` of each connection."""
_UPDATE_BYTES = BUFFER_BYTES // 4
"""The guest is told of room that became free when it is this much."""
_U32 = 0xFFFF_FFFF


class State(Enum):
    """How far a connection is."""

    REQUESTED = "requested"
    """The host's side asked the guest."""
    OPEN = "open"
    DONE = "done"
    """Nothing more to say, once what is due has been sent."""


class CreditError(Exception):
    """The guest sent more than there is room for."""


class Stream:
    """A connection with `connection` behind it, which it closes. `due` are the packets to send, in
    the order of `Op`; data is sent when the socket has some (`readable`)."""

    def __init__(self, connection: socket.socket, state: State) -> None:
        connection.setblocking(False)
        self._socket = connection
        self.fd = connection.fileno()
        """The socket's file descriptor; its owner sets it to -1 when this is DONE."""
        self.on_ready: Ready = lambda _: None
        """Called when the socket is ready for what is `wanted`."""
        self.state = state
        self.due: set[Op] = set()
        self.readable = False
        """The socket may have data, or its end."""
        self.shutdown_flags = 0
        """Of SHUTDOWN, once it is due."""
        self._guest_shutdown = 0
        self._kept = bytearray()
        self._forwarded = 0
        self._told_forwarded = 0
        self._sent = 0
        self._guest_room = 0
        self._guest_forwarded = 0
        self._asked_for_credit = False

    @property
    def wanted(self) -> int:
        """What to wait for at the socket."""
        if self.state is State.DONE:
            return 0
        events = OUT if self._kept else 0
        if self._takes_more and not self.readable and self.credit:
            events |= IN
        return events

    @property
    def credit(self) -> int:
        """Bytes that the guest has room for."""
        in_flight = self._sent - self._guest_forwarded & _U32
        return max(0, self._guest_room - in_flight)

    @property
    def ready(self) -> bool:
        """Whether there is something to send to the guest."""
        return bool(self.due) or self.has_data

    @property
    def forwarded(self) -> int:
        """`fwd_cnt`: bytes of the guest's that the socket took."""
        return self._forwarded & _U32

    @property
    def _takes_more(self) -> bool:
        """Whether what the socket says still goes to the guest."""
        return (
            self.state is State.OPEN
            and not self._guest_shutdown & SHUTDOWN_RECEIVE
            and not self.shutdown_flags & SHUTDOWN_SEND
        )

    @property
    def has_data(self) -> bool:
        """Whether `read` may find something, and the guest has room for it."""
        return self.readable and self._takes_more and self.credit > 0

    # From the guest

    def hear(self, header: Header) -> None:
        """Note the credit that every packet of the guest's carries."""
        self._guest_room = header.buf_alloc
        self._guest_forwarded = header.fwd_cnt
        self._asked_for_credit = False

    def opened(self, greeting: bytes) -> None:
        """The guest accepted: tell the socket so."""
        self.state = State.OPEN
        self.due.discard(Op.REQUEST)
        try:
            if self._socket.send(greeting) != len(greeting):
                self.abort()
        except OSError:
            self.abort()

    def take(self, data: bytes) -> None:
        """Data for the socket. Raises CreditError if it is more than the guest has credit for."""
        if len(self._kept) + len(data) > BUFFER_BYTES:
            raise CreditError
        if self._guest_shutdown & SHUTDOWN_SEND:
            return
        self._kept += data
        self.flush()

    def guest_shuts_down(self, flags: int) -> None:
        """The guest will not send, or not receive, any more."""
        self._guest_shutdown |= flags & SHUTDOWN_BOTH
        self._settle()

    # To and from the socket

    def flush(self) -> None:
        """Write what is kept, as far as the socket takes it."""
        try:
            while self._kept:
                sent = self._socket.send(self._kept)
                del self._kept[:sent]
                self._forwarded += sent
        except BlockingIOError:
            pass
        except OSError:
            self.abort()
            return
        if self._forwarded - self._told_forwarded >= _UPDATE_BYTES:
            self.due.add(Op.CREDIT_UPDATE)
        self._settle()

    def read(self, limit: int) -> bytes:
        """Up to `limit` bytes from the socket for the guest; b"" if there are none now. At its end
        SHUTDOWN becomes due."""
        try:
            data = self._socket.recv(min(limit, self.credit))
        except BlockingIOError:
            self.readable = False
            return b""
        except OSError:
            self.abort()
            return b""
        if not data:
            self.readable = False
            self.shutdown_flags = SHUTDOWN_BOTH if self._hung_up() else SHUTDOWN_SEND
            self.due.add(Op.SHUTDOWN)
            self._settle()
            return b""
        self._sent = self._sent + len(data) & _U32
        if not self.credit and not self._asked_for_credit:
            self._asked_for_credit = True
            self.due.add(Op.CREDIT_REQUEST)
        return data

    def told(self) -> None:
        """A packet with the present `fwd_cnt` goes to the guest."""
        self._told_forwarded = self._forwarded
        self.due.discard(Op.CREDIT_UPDATE)

    def abort(self) -> None:
        """End the connection at once: RST is all that is due."""
        self.finish()
        self.due = {Op.RST}

    def finish(self) -> None:
        """The connection is over, and nobody is told."""
        self.state = State.DONE
        self.due.clear()
        self._kept.clear()
        self._socket.close()

    def _settle(self) -> None:
        """Pass on what the guest shut down, when all that it sent has been written."""
        if self.state is not State.OPEN or self._kept:
            return
        if self._guest_shutdown == SHUTDOWN_BOTH:
            self.abort()
            return
        try:
            if self._guest_shutdown & SHUTDOWN_SEND:
                self._socket.shutdown(socket.SHUT_WR)
            if self._guest_shutdown & SHUTDOWN_RECEIVE:
                self._socket.shutdown(socket.SHUT_RD)
        except OSError:
            self.abort()

    def _hung_up(self) -> bool:
        """Whether the socket's other end is closed, and not only quiet."""
        poll = select.poll()
        poll.register(self._socket, 0)
        return bool(poll.poll(0))
