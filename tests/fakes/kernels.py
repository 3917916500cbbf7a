# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernel files and initramfs archives, made of numbers."""

from __future__ import annotations

import struct

import zstandard

from pkvm import guests

IMAGE_HEADER_BYTES = 64


def image(
    body: bytes = b"",
    *,
    code: bytes = struct.pack("<I", 0x1400_0010),
    text_offset: int = 0,
    image_size: int | None = None,
    flags: int = 0xA,
    pe_offset: int = 0,
) -> bytes:
    """An arm64 Image: 8 bytes of code (default: branch behind the header), the header's numbers,
    `body`. Default flags: little-endian, 4 KiB pages, anywhere in memory."""
    size = IMAGE_HEADER_BYTES + len(body) if image_size is None else image_size
    numbers = struct.pack("<QQQ", text_offset, size, flags)
    header = code.ljust(8, b"\0") + numbers + bytes(24) + b"ARM\x64" + struct.pack("<I", pe_offset)
    return header + body


def efi_image(body: bytes, sections: list[tuple[int, int]], **numbers: int) -> bytes:
    """An Image that is an EFI program too: `sections` are (offset, bytes) in the file."""
    table = b"".join(
        struct.pack("<8sIIII16x", b".text", size, offset, size, offset) for offset, size in sections
    )
    coff = struct.pack("<4sHHIIIHH", b"PE\0\0", 0xAA64, len(sections), 0, 0, 0, 16, 0)
    return image(coff + bytes(16) + table + body, code=b"MZ\x40\xfa", pe_offset=64, **numbers)


def zstd(data: bytes) -> bytes:
    """As the kernel's build does: the frame says neither its size nor its checksum."""
    return zstandard.ZstdCompressor(
        level=1, write_checksum=False, write_content_size=False
    ).compress(data)


def zboot(payload: bytes, kind: bytes, size: int | None = None, *, offset: int = 0x100) -> bytes:
    """An EFI zboot file; `size` is the number behind the payload, where its format has none."""
    header = struct.pack("<2s2x4sII8x32s", b"MZ", b"zimg", offset, len(payload), kind)
    tail = b"" if size is None else struct.pack("<I", size)
    return header.ljust(offset, b"\xcc") + payload + tail + b"the stub's code"


def cpio(files: dict[str, bytes], magic: bytes = b"070701") -> bytes:
    """A newc archive of regular files."""
    archive = b""
    for name, data in {**files, "TRAILER!!!": b""}.items():
        fields = [0] * 13
        fields[1], fields[6], fields[11] = 0o100644, len(data), len(name) + 1
        archive += magic + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        archive += bytes(-len(archive) % 4) + data
        archive += bytes(-len(archive) % 4)
    return archive


def program(name: str, **numbers: int) -> bytes:
    """A guest program as an Image: entered at the header, it runs from the next page on."""
    body = bytes(4096 - IMAGE_HEADER_BYTES) + guests.image(name)
    return image(body, code=struct.pack("<I", 0x1400_0000 | 4096 // 4), **numbers)
