# SPDX-License-Identifier: GPL-2.0-or-later
"""`Disk`: a raw file, or a block device, in sectors of 512 bytes."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import sys
from collections.abc import Callable
from functools import cache

from pkvm.vmm.errors import LoadError

SECTOR = 512
_PUNCH_HOLE = 0x02 | 0x01
"""FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE (fallocate(2))."""
_ZEROES = bytes(1 << 20)


class Disk:
    """The file at `path`. Raises LoadError if it cannot be a disk, OSError if it cannot be opened.

    Offsets and lengths are bytes, within [0, `size`); the caller sees to that.
    """

    def __init__(self, path: str, *, read_only: bool = False) -> None:
        self.path = path
        self.read_only = read_only
        self._fd = -1
        # Non-blocking: a FIFO would wait for its other end here.
        flags = os.O_CLOEXEC | os.O_NONBLOCK | (os.O_RDONLY if read_only else os.O_RDWR)
        try:
            fd = os.open(path, flags)
        except OSError as error:
            if not read_only and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise LoadError(
                    f"{path}: the disk cannot be written: make it writable, or add ,ro"
                ) from error
            raise
        try:
            self.size = _checked_size(fd, path)
            _lock(fd, path, shared=read_only)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes. Raises OSError, also if the file has become shorter."""
        data = os.pread(self._fd, length, offset)
        while len(data) < length:
            more = os.pread(self._fd, length - len(data), offset + len(data))
            if not more:
                raise OSError(errno.EIO, "the file has become shorter than the disk")
            data += more
        return data

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Store `data`. Raises OSError; a part may have been written."""
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, offset)
            view = view[done:]
            offset += done

    def flush(self) -> None:
        """Put what was written onto the medium. Raises OSError."""
        os.fdatasync(self._fd) if hasattr(os, "fdatasync") else os.fsync(self._fd)

    def discard(self, offset: int, length: int) -> None:
        """The content is not needed any more: give the room back where the file system can. Raises
        OSError for what is no lack of support."""
        self._punch(offset, length)

    def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make the bytes zero; `unmap`: their room may be given back. Raises OSError."""
        if unmap and self._punch(offset, length):
            return
        while length:
            take = min(length, len(_ZEROES))
            self.write(offset, memoryview(_ZEROES)[:take])
            offset += take
            length -= take

    def close(self) -> None:
        """Close the file, and so unlock it. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _punch(self, offset: int, length: int) -> bool:
        """Make a hole, which reads as zeroes; whether that is supported."""
        fallocate = _fallocate()
        if fallocate is None or not length:
            return False
        if fallocate(self._fd, _PUNCH_HOLE, offset, length) == 0:
            return True
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV):
            return False
        raise OSError(number, os.strerror(number))


def _checked_size(fd: int, path: str) -> int:
    """The disk's bytes. Raises LoadError."""
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise LoadError(f"{path}: a disk is a raw file or a block device, and this is neither")
    size = os.lseek(fd, 0, os.SEEK_END)
    if not size:
        raise LoadError(f"{path}: the disk is empty: give it a size with `truncate -s 1G {path}`")
    if size % SECTOR:
        padded = -(-size // SECTOR) * SECTOR
        raise LoadError(
            f"{path}: a raw disk has whole sectors of {SECTOR} bytes, and this file has {size} "
            f"bytes: is it a disk image? `truncate -s {padded} {path}` pads it"
        )
    return size


def _lock(fd: int, path: str, *, shared: bool) -> None:
    """Two guests that write to one disk destroy it. Raises LoadError if it is in use."""
    try:
        fcntl.flock(fd, fcntl.LOCK_NB | (fcntl.LOCK_SH if shared else fcntl.LOCK_EX))
    except BlockingIOError:
        raise LoadError(
            f"{path}: another process uses the disk: end it first, or let both open it with ,ro"
        ) from None
    except OSError:
        # A file system without locks (ENOLCK, EOPNOTSUPP): as it is.
        return


@cache
def _fallocate() -> Callable[[int, int, int, int], int] | None:
    """fallocate(2), which Python does not have; None where the platform has none."""
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)
    if function is None:
        function = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if function is None:
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    function.restype = ctypes.c_int
    call: Callable[[int, int, int, int], int] = function
    return call
