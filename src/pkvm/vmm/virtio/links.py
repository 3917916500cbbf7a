# SPDX-License-Identifier: GPL-2.0-or-later
"""What a network device is plugged into: a TAP interface, or a stream socket to `passt`.

A link carries Ethernet frames without their check sequence. Nothing here
blocks: a frame that the other end has no room for is lost, as on any wire. A
link that is gone raises LinkError and stays gone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from typing import Protocol

from pkvm.vmm.errors import LoadError

MAX_FRAME = 65535 + 14
"""Bytes of a frame at most: the largest packet, behind an Ethernet header."""
BATCH = 64
"""Frames that are read from an interface at a time at most."""
RECEIVE_BYTES = 1 << 18
"""Bytes that are read from a socket at a time at most."""
MAX_QUEUED = 1 << 20
"""Bytes kept for a socket whose other end does not read them; frames beyond are lost."""

_TUN = "/dev/net/tun"
_TUNSETIFF = 0x4004_54CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_NAME_BYTES = 15
_length = struct.Struct(">I")


class LinkError(Exception):
    """The link is gone; the text says how, `advice` what the user can do."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(what)
        self.advice = advice


class Link(Protocol):
    """One end of a wire. One thread receives; everything else is called under one lock."""

    identity: str
    """What it is called by the user, the same in each run."""

    def fileno(self) -> int:
        """The file to wait for."""
        ...

    def receive(self) -> list[bytes]:
        """The frames that are there; some may be left. Raises LinkError."""
        ...

    def send(self, frame: bytes) -> None:
        """Send a frame, keep it for `flush`, or lose it. Raises LinkError."""
        ...

    def flush(self) -> None:
        """Send what is kept, as far as there is room. Raises LinkError."""
        ...

    @property
    def sending(self) -> bool:
        """Whether something is kept for `flush`."""
        ...

    def close(self) -> None:
        """Unplug. Idempotent."""
        ...


class Tap:
    """The TAP interface `name`, which is made, for as long as this lasts, if it is not there and
    the user may make one. Raises LoadError."""

    sending = False

    def __init__(self, name: str) -> None:
        encoded = name.encode()
        if not encoded or len(encoded) > _NAME_BYTES or b"/" in encoded or b"\0" in encoded:
            raise LoadError(f"{name!r} is not the name of a network interface")
        self.identity = name
        self._fd = -1
        try:
            fd = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise LoadError(
                f"a TAP interface needs {_TUN} ({error.strerror}): load the module tun, or use "
                "--net passt=SOCKET, which needs no privileges"
            ) from None
        try:
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", encoded, _IFF_TAP | _IFF_NO_PI))
        except OSError as error:
            os.close(fd)
            raise LoadError(_tap_trouble(name, error)) from None
        self._fd = fd

    def fileno(self) -> int:
        """The file to wait for."""
        return self._fd

    def receive(self) -> list[bytes]:
        """The frames that are there, up to BATCH. Raises LinkError."""
        frames: list[bytes] = []
        try:
            while len(frames) < BATCH:
                frames.append(os.read(self._fd, MAX_FRAME))
        except BlockingIOError:
            pass
        except OSError as error:
            if not frames:
                raise self._gone(error) from None
        return frames

    def send(self, frame: bytes) -> None:
        """Send a frame; it is lost while the interface is down. Raises LinkError."""
        try:
            os.write(self._fd, frame)
        except BlockingIOError:
            return
        except OSError as error:
            # EIO: the interface is down. EINVAL and the like: the frame is nonsense.
            if error.errno in (errno.EBADFD, errno.ENODEV, errno.ENXIO, errno.EBADF):
                raise self._gone(error) from None

    def flush(self) -> None:
        """Nothing is ever kept."""

    def close(self) -> None:
        """Unplug. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _gone(self, error: OSError) -> LinkError:
        return LinkError(
            f"the TAP interface {self.identity} is gone ({error.strerror})",
            "the guest's link is down; make the interface again and restart the guest",
        )


def _tap_trouble(name: str, error: OSError) -> str:
    """Why the interface cannot be had."""
    if error.errno == errno.EBUSY:
        return f"the TAP interface {name} is in use: give each guest one of its own"
    if error.errno == errno.EPERM:
        return (
            f"the TAP interface {name} may not be used, or is not there: make one with "
            f"`ip tuntap add dev {name} mode tap user $USER` as root, or use --net passt=SOCKET"
        )
    if error.errno == errno.EINVAL:
        return f"the network interface {name} is not a TAP interface"
    return f"the TAP interface {name} cannot be used: {error.strerror}"


class StreamLink:
    """A stream socket on which each frame follows its length, 4 bytes, big-endian: what QEMU's
    `-netdev stream` speaks, and with it passt."""

    def __init__(self, connection: socket.socket, identity: str) -> None:
        self.identity = identity
        self._socket = connection
        connection.setblocking(False)
        self._received = bytearray()
        self._kept = bytearray()

    @classmethod
    def connect(cls, path: str) -> StreamLink:
        """To the Unix socket at `path`, on which somebody listens. Raises LoadError."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(path)
        except OSError as error:
            connection.close()
            raise LoadError(
                f"{path}: nobody can be reached at this socket ({error.strerror or error}): start "
                f"`passt --socket {path}` first"
            ) from None
        return cls(connection, path)

    @property
    def sending(self) -> bool:
        """Whether something is kept for `flush`."""
        return bool(self._kept)

    def fileno(self) -> int:
        """The file to wait for."""
        return self._socket.fileno()

    def receive(self) -> list[bytes]:
        """The frames that are there; some may be left. Raises LinkError."""
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise self._gone(error.strerror or str(error)) from None
        if not data:
            raise self._gone("closed")
        self._received += data
        return self._frames()

    def send(self, frame: bytes) -> None:
        """Send a frame, keep it for `flush`, or lose it. Raises LinkError."""
        if self._kept and len(self._kept) + len(frame) > MAX_QUEUED:
            return
        self._kept += _length.pack(len(frame))
        self._kept += frame
        self.flush()

    def flush(self) -> None:
        """Send what is kept, as far as there is room. Raises LinkError."""
        try:
            while self._kept:
                sent = self._socket.send(self._kept)
                del self._kept[:sent]
        except BlockingIOError:
            return
        except OSError as error:
            self._kept.clear()
            raise self._gone(error.strerror or str(error)) from None

    def close(self) -> None:
        """Unplug. Idempotent."""
        self._socket.close()

    def _frames(self) -> list[bytes]:
        """The whole frames among the bytes received."""
        frames: list[bytes] = []
        received = self._received
        at = 0
        while len(received) - at >= _length.size:
            (length,) = _length.unpack_from(received, at)
            if length > MAX_FRAME:
                raise self._gone(f"the other end announced a frame of {length} bytes")
            if len(received) - at - _length.size < length:
                break
            at += _length.size
            frames.append(bytes(received[at : at + length]))
            at += length
        del received[:at]
        return frames

    def _gone(self, how: str) -> LinkError:
        return LinkError(
            f"the socket {self.identity} is gone ({how})",
            "the guest's link is down; start passt again and restart the guest",
        )
