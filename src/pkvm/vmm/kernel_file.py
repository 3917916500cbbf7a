# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernel files: Linux's arm64 `Image` and what it is packed in, from bytes to a place in RAM.

`Image` is described in the kernel's Documentation/arch/arm64/booting.rst;
anything may have that form, not only Linux. It comes as it is, as a gzip file,
or as an EFI zboot file (drivers/firmware/efi/libstub/zboot-header.S), whose
payload is packed with gzip or zstd.
"""

from __future__ import annotations

import struct

from pkvm.vmm.board import IMAGE_BASE, PAGE_SIZE, Board
from pkvm.vmm.compression import gunzip, unzstd
from pkvm.vmm.errors import LoadError
from pkvm.vmm.loader import GZIP_MAGIC, Image, Segment, is_image_format, is_zboot

KERNEL_LIMIT = 1 << 30
"""Bytes that a kernel may have, packed or not."""
IMAGE_ALIGNMENT = 2 << 20
"""The kernel stands text_offset above a multiple of this."""
OLD_TEXT_OFFSET = 0x8_0000
"""Where a kernel from before 3.17 stands, which does not say so (image_size is 0)."""
OLD_IMAGE_BYTES = 16 << 20
"""What such a kernel gets for its BSS; QEMU gives it no less."""

_HEADER = struct.Struct("<8xQQQ28xI")
"""text_offset, image_size, flags, and behind the magic the offset of the PE header."""
_BIG_ENDIAN = 1
_PAGE_SIZES = {0: 0, 1: 4 << 10, 2: 16 << 10, 3: 64 << 10}

_ZBOOT = struct.Struct("<2s2x4sII8x32s")
"""DOS magic, "zimg", offset and size of the payload, the name of its compression."""
_ZBOOT_SIZE_BYTES = 4
"""Behind a payload that does not tell its own unpacked size stands that size."""


def load_kernel(data: bytes, board: Board) -> Image:
    """The Image in a kernel file, in its place. Raises LoadError for what is no kernel file, or is
    corrupt, truncated, not for this machine or too large for the board's RAM."""
    limit = min(KERNEL_LIMIT, max(board.bounce_base - IMAGE_BASE, 0))
    if is_zboot(data):
        data = _unpack_zboot(data, limit)
        packing = "EFI zboot file"
    elif data.startswith(GZIP_MAGIC):
        data = gunzip(data, limit)
        packing = "gzip file"
    else:
        packing = "file"
    if not is_image_format(data):
        raise LoadError(
            f"the {packing} holds no arm64 kernel (no Image header): give an arm64 Image, plain, "
            "gzipped or as an EFI zboot file"
        )
    return _place(data, board)


def _unpack_zboot(data: bytes, limit: int) -> bytes:
    if len(data) < _ZBOOT.size:
        raise LoadError("the EFI zboot file ends within its header: copy it again")
    _, _, offset, size, name = _ZBOOT.unpack_from(data)
    kind = name.partition(b"\0")[0].decode("ascii", "backslashreplace")
    end = offset + size
    if kind == "gzip":
        if end > len(data):
            raise _truncated_zboot(end, len(data))
        return gunzip(memoryview(data)[offset:end], limit)
    if kind not in ("zstd", "zstd22"):
        raise LoadError(
            f"the EFI zboot file is packed with {kind!r}: only gzip and zstd can be unpacked here; "
            "unpack it, or build the kernel with CONFIG_KERNEL_GZIP or CONFIG_KERNEL_ZSTD"
        )
    if end + _ZBOOT_SIZE_BYTES > len(data):
        raise _truncated_zboot(end + _ZBOOT_SIZE_BYTES, len(data))
    content = unzstd(memoryview(data)[offset:end], limit)
    wanted = int.from_bytes(data[end : end + _ZBOOT_SIZE_BYTES], "little")
    if len(content) != wanted:
        raise LoadError(
            f"the EFI zboot file unpacks to {len(content)} bytes and says {wanted}: copy it again"
        )
    return content


def _truncated_zboot(end: int, size: int) -> LoadError:
    return LoadError(
        f"the EFI zboot file's payload ends at byte {end} of a file of {size}: the file is "
        "truncated, copy it again"
    )


def _place(data: bytes, board: Board) -> Image:
    if len(data) < _HEADER.size:
        raise LoadError("the kernel ends within its header: copy the file again")
    text_offset, image_size, flags, pe_offset = _HEADER.unpack_from(data)
    if flags & _BIG_ENDIAN:
        raise LoadError(
            "the kernel is big-endian, and this machine runs little-endian ones: build it without "
            "CONFIG_CPU_BIG_ENDIAN"
        )
    if image_size == 0:
        text_offset = OLD_TEXT_OFFSET
        image_size = len(data) + OLD_IMAGE_BYTES
    if text_offset % PAGE_SIZE or text_offset >= IMAGE_ALIGNMENT:
        raise LoadError(
            f"the kernel's text_offset is {text_offset:#x}, which is no page within 2 MiB: its "
            "header is corrupt, copy the file again"
        )
    _check_whole(data, pe_offset)
    base = IMAGE_BASE + text_offset
    memory_bytes = max(image_size, len(data))
    if base + memory_bytes > board.bounce_base:
        raise LoadError(
            f"the kernel needs {-(-memory_bytes >> 20)} MiB of memory, and the guest has room for "
            f"{max(board.bounce_base - base, 0) >> 20}: give it more with --memory"
        )
    return Image((Segment(base, data, memory_bytes),), base, page_bytes=_PAGE_SIZES[flags >> 1 & 3])


def _check_whole(data: bytes, pe_offset: int) -> None:
    """An Image does not say how long its file is, but the PE header of one that is an EFI program
    too says where its sections end."""
    if data[:2] != b"MZ" or data[pe_offset : pe_offset + 4] != b"PE\0\0":
        return
    try:
        sections, optional_bytes = struct.unpack_from("<2xH12xH", data, pe_offset + 4)
        first = pe_offset + 24 + optional_bytes
        for number in range(sections):
            raw_bytes, raw_offset = struct.unpack_from("<16xII", data, first + 40 * number)
            if raw_bytes + raw_offset > len(data):
                raise LoadError(
                    f"the kernel's sections end at byte {raw_bytes + raw_offset} of a file of "
                    f"{len(data)}: the file is truncated, copy it again"
                )
    except struct.error:
        raise LoadError("the kernel ends within its PE header: copy the file again") from None
