# SPDX-License-Identifier: GPL-2.0-or-later
"""The initramfs: checked as far as is quick, and placed behind the kernel.

The guest's kernel says little about one that it cannot read: it goes on and
panics for want of a root file system. So what can be seen to be wrong is said
before the guest starts.
"""

from __future__ import annotations

from pkvm.vmm.board import Board
from pkvm.vmm.compression import check_gzip
from pkvm.vmm.errors import LoadError
from pkvm.vmm.loader import GZIP_MAGIC, Image, Segment

ALIGNMENT = 2 << 20
GZIP_CHECK_LIMIT = 64 << 20
"""Larger ones are not unpacked just to see whether they are whole."""

CPIO_MAGICS = (b"070701", b"070702")
"""cpio "newc", without and with checksums."""
_COMPRESSIONS = (
    GZIP_MAGIC,
    b"BZh",
    b"\xfd7zXZ\0",
    b"\x5d\0\0",  # LZMA
    b"\x89LZO",
    b"\x02\x21\x4c\x18",  # LZ4, the legacy frame
    b"\x28\xb5\x2f\xfd",  # zstd
)
_HEADER_BYTES = 110
_FIELD_BYTES = 8
_FILE_SIZE_FIELD, _NAME_SIZE_FIELD = 6, 11
_END_NAME = b"TRAILER!!!\0"


def place_initrd(data: bytes, image: Image, board: Board) -> Segment:
    """The initramfs in the first 2 MiB-aligned place behind the kernel. Raises LoadError if it is
    none, is truncated or corrupt as far as can be seen, or does not fit."""
    check_initrd(data)
    base = -(-(image.base + image.size) // ALIGNMENT) * ALIGNMENT
    if base + len(data) > board.bounce_base:
        raise LoadError(
            f"the initramfs has {len(data)} bytes, and behind the kernel there is room for "
            f"{max(board.bounce_base - base, 0)}: give the guest more with --memory"
        )
    return Segment(base, data, len(data))


def check_initrd(data: bytes) -> None:
    """Whether the kernel could take this for an initramfs. Raises LoadError."""
    if data.startswith(CPIO_MAGICS):
        _check_cpio(data)
    elif not data.startswith(_COMPRESSIONS):
        what = "is empty" if not data else "is neither a cpio archive (newc) nor a compressed one"
        raise LoadError(f"the initramfs {what}: make it with cpio -o -H newc | gzip")
    elif data.startswith(GZIP_MAGIC) and len(data) <= GZIP_CHECK_LIMIT:
        check_gzip(data)


def _check_cpio(data: bytes) -> None:
    """Follow the headers to the archive's end; more archives may follow it."""
    at = 0
    while True:
        header = data[at : at + _HEADER_BYTES]
        if len(header) < _HEADER_BYTES:
            raise LoadError("the initramfs is truncated: copy it again")
        if not header.startswith(CPIO_MAGICS):
            raise LoadError(f"the initramfs is corrupt (no cpio header at byte {at}): make it anew")
        name_at = at + _HEADER_BYTES
        try:
            name_bytes = _field(header, _NAME_SIZE_FIELD)
            file_bytes = _field(header, _FILE_SIZE_FIELD)
        except ValueError:
            raise LoadError(
                f"the initramfs is corrupt (cpio header at byte {at}): make it anew"
            ) from None
        if data[name_at : name_at + name_bytes] == _END_NAME:
            return
        at = _align4(_align4(name_at + name_bytes) + file_bytes)


def _field(header: bytes, number: int) -> int:
    """Field `number` of a header, 8 hexadecimal digits. Raises ValueError."""
    start = len(CPIO_MAGICS[0]) + _FIELD_BYTES * number
    digits = header[start : start + _FIELD_BYTES]
    if not digits.isalnum():
        raise ValueError(digits)
    return int(digits, 16)


def _align4(value: int) -> int:
    return (value + 3) & ~3
