# SPDX-License-Identifier: GPL-2.0-or-later
"""An initramfs is placed behind the kernel; what the kernel could not read is refused in words."""

from __future__ import annotations

import gzip
import lzma
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.kernels import cpio, image, zstd
from pkvm.vmm.board import IMAGE_BASE, Board
from pkvm.vmm.errors import LoadError
from pkvm.vmm.initrd import check_initrd, place_initrd
from pkvm.vmm.loader import Image, load_image

BOARD = Board(ram_bytes=16 << 20)
ARCHIVE = cpio({"init": b"#!/bin/sh\n", "etc/motd": b"hello" * 100, "empty": b""})


def kernel(size: int) -> Image:
    return load_image(image(image_size=size), BOARD)


@pytest.mark.parametrize(
    ("kernel_bytes", "where"),
    [(4096, 2 << 20), (2 << 20, 2 << 20), ((2 << 20) + 1, 4 << 20)],
)
def test_it_stands_behind_the_kernel(kernel_bytes: int, where: int) -> None:
    segment = place_initrd(ARCHIVE, kernel(kernel_bytes), BOARD)
    assert (segment.ipa, segment.data) == (IMAGE_BASE + where, ARCHIVE)
    assert segment.end == segment.ipa + len(ARCHIVE)


def test_it_may_fill_the_memory_up_to_the_bounce_pool() -> None:
    data = gzip.compress(b"x") + bytes(4 << 20)
    board = Board(ram_bytes=16 << 20, bounce_bytes=2 << 20)
    room = board.bounce_base - IMAGE_BASE - (2 << 20)
    padded = data.ljust(room, b"\0")
    assert place_initrd(padded, kernel(4096), board).end == board.bounce_base
    with pytest.raises(LoadError, match=f"{room + 1} bytes.*room for {room}: .*--memory"):
        place_initrd(padded + b"\0", kernel(4096), board)
    with pytest.raises(LoadError, match="room for 0"):
        place_initrd(data, kernel(14 << 20), BOARD)


@pytest.mark.parametrize(
    "data",
    [
        ARCHIVE,
        cpio({"a": b"1"}, magic=b"070702"),
        ARCHIVE + bytes(512) + gzip.compress(ARCHIVE),  # early firmware in front
        gzip.compress(ARCHIVE),
        gzip.compress(ARCHIVE) + bytes(100),
        lzma.compress(ARCHIVE),
        zstd(ARCHIVE),
        b"BZh91AY",
        b"\x02\x21\x4c\x18....",
    ],
)
def test_good_ones_pass(data: bytes) -> None:
    check_initrd(data)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "is empty"),
        (b"not an archive", "neither a cpio archive"),
        (bytes(1000), "neither"),
        (image(), "neither"),
        (gzip.compress(ARCHIVE)[:-1], "truncated"),
        (gzip.compress(ARCHIVE)[:30], "truncated"),
        (gzip.compress(ARCHIVE)[:-8] + bytes(8), "corrupt"),
        (b"070701", "truncated"),
        (ARCHIVE[:400], "truncated"),
        (ARCHIVE.replace(b"TRAILER", b"TRAILED"), "truncated"),
        (b"070701" + b"x" * 104 + bytes(1000), "corrupt"),
        (b"070701" + b"+" * 104 + bytes(1000), "corrupt"),
        (b"070701" + b"0" * 104 + b"\0" * 1000, "no cpio header at byte 112"),
    ],
)
def test_bad_ones_are_refused_in_words(data: bytes, what: str) -> None:
    with pytest.raises(LoadError, match=what):
        check_initrd(data)


@given(st.dictionaries(st.text("abc/", min_size=1), st.binary(max_size=50), max_size=4))
def test_every_archive_passes_and_every_part_of_one_is_truncated(files: dict[str, bytes]) -> None:
    archive = cpio(files)
    check_initrd(archive)
    for cut in range(6, len(archive) - len("TRAILER!!!\0") - 3, 7):
        with pytest.raises(LoadError, match="truncated"):
            check_initrd(archive[:cut])


@given(st.lists(st.tuples(st.integers(0, len(ARCHIVE) - 1), st.integers(0, 255)), max_size=6))
def test_a_corrupted_archive_passes_or_is_refused(changes: list[tuple[int, int]]) -> None:
    data = bytearray(ARCHIVE)
    for at, value in changes:
        data[at] = value
    with suppress(LoadError):  # and nothing else
        check_initrd(bytes(data))
