# SPDX-License-Identifier: GPL-2.0-or-later
"""Packets of virtio-vsock (section 5.10.6): struct virtio_vsock_hdr and its numbers."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

HOST_CID = 2
"""The context that this end of every connection is in."""
FIRST_GUEST_CID = 3
LAST_GUEST_CID = 0xFFFF_FFFE
TYPE_STREAM = 1
SHUTDOWN_RECEIVE, SHUTDOWN_SEND = 1, 2
"""Flags of SHUTDOWN: who sends it will receive no more, or send no more."""
SHUTDOWN_BOTH = SHUTDOWN_RECEIVE | SHUTDOWN_SEND
MAX_PAYLOAD = 1 << 16

_header = struct.Struct("<QQIIIHHIII")
HEADER_BYTES = _header.size


class Op(IntEnum):
    """What a packet does (`op`)."""

    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


class Header(NamedTuple):
    """struct virtio_vsock_hdr, in its order."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    length: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int

    def pack(self) -> bytes:
        """The 44 bytes."""
        return _header.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """Of 44 bytes."""
        return cls(*_header.unpack(data))
