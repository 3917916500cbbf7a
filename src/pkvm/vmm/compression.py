# SPDX-License-Identifier: GPL-2.0-or-later
"""Decompression of what a user brings, with a bound: gzip (RFC 1952) and zstd (RFC 8878).

A few bytes can claim to be any number of them: nothing here produces more than
it was allowed to, whatever the input says.
"""

from __future__ import annotations

import zlib

from pkvm.vmm.errors import LoadError

_CHUNK = 1 << 20
_GZIP_FORMAT = 31
"""zlib's `wbits` for a gzip member with its CRC and length."""


def gunzip(data: bytes | memoryview, limit: int) -> bytes:
    """The content of the first gzip member, whose CRC and length must hold; what follows it is
    left alone, as gzip does. Raises LoadError if it is corrupt or truncated, or has more than
    `limit` bytes."""
    member = zlib.decompressobj(_GZIP_FORMAT)
    try:
        content = member.decompress(data, limit + 1)
    except zlib.error as error:
        raise LoadError(f"the gzip data is corrupt ({error}): copy the file again") from None
    if len(content) > limit:
        raise _too_large(limit)
    if not member.eof:
        raise LoadError("the gzip data is truncated: copy the file again")
    return content


def check_gzip(data: bytes) -> None:
    """Look whether the first gzip member is whole, without keeping its content. Raises LoadError
    if it is corrupt or truncated."""
    member = zlib.decompressobj(_GZIP_FORMAT)
    rest: bytes | memoryview = data
    try:
        while not member.eof:
            content = member.decompress(rest, _CHUNK)
            rest = member.unconsumed_tail
            if not content and not rest and not member.eof:
                raise LoadError("the gzip data is truncated: copy the file again")
    except zlib.error as error:
        raise LoadError(f"the gzip data is corrupt ({error}): copy the file again") from None


def unzstd(data: bytes | memoryview, limit: int) -> bytes:
    """The content of the first zstd frame. A truncated frame gives what is there: the caller knows
    how much it must be. Raises LoadError if it is corrupt or has more than `limit` bytes."""
    # Imported here: few kernels need it.
    import zstandard

    content = bytearray()
    try:
        with zstandard.ZstdDecompressor().stream_reader(data) as frame:
            while len(content) <= limit:
                chunk = frame.read(min(_CHUNK, limit + 1 - len(content)))
                if not chunk:
                    return bytes(content)
                content += chunk
    except zstandard.ZstdError as error:
        raise LoadError(f"the zstd data is corrupt ({error}): copy the file again") from None
    raise _too_large(limit)


def _too_large(limit: int) -> LoadError:
    return LoadError(
        f"it decompresses to more than {limit} bytes, for which the guest has no room: give it "
        "more with --memory"
    )
