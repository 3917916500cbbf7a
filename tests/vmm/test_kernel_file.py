# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernel files: what is good stands where its header says, whatever else is refused in words."""

from __future__ import annotations

import gzip
import os
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.kernels import efi_image, image, zboot, zstd
from pkvm.vmm.board import IMAGE_BASE, Board
from pkvm.vmm.compression import check_gzip, gunzip, unzstd
from pkvm.vmm.errors import LoadError
from pkvm.vmm.kernel_file import load_kernel
from pkvm.vmm.loader import Image, is_kernel_file, load_image

BOARD = Board(ram_bytes=16 << 20)
ROOM = BOARD.ram_end - IMAGE_BASE
PLAIN = image(b"kernel" * 1000, image_size=2 << 20)


def packed() -> dict[str, bytes]:
    return {
        "plain": PLAIN,
        "gzip": gzip.compress(PLAIN),
        "gzip with something behind it": gzip.compress(PLAIN) + b"\0" * 100 + b"signature",
        "zboot gzip": zboot(gzip.compress(PLAIN), b"gzip"),
        "zboot zstd": zboot(zstd(PLAIN), b"zstd", len(PLAIN)),
        "zboot zstd22": zboot(zstd(PLAIN), b"zstd22", len(PLAIN)),
    }


PACKED = packed()


@pytest.mark.parametrize("how", PACKED)
def test_every_packing_gives_the_same_kernel(how: str) -> None:
    assert is_kernel_file(PACKED[how])
    loaded = load_image(PACKED[how], BOARD)
    (segment,) = loaded.segments
    assert segment.data == PLAIN
    assert (segment.ipa, loaded.entry) == (IMAGE_BASE, IMAGE_BASE)
    assert loaded.size == 2 << 20
    assert loaded.page_bytes == 4096


def test_a_program_that_is_no_kernel_file_is_a_flat_binary() -> None:
    for data in (b"MZ" + bytes(100), b"\x1f", bytes(60) + b"ARM\x64", b"MZ\0\0zimX" + bytes(90)):
        assert not is_kernel_file(data)
        assert load_image(data, BOARD).segments[0].data == data


def test_text_offset_and_image_size_are_honoured() -> None:
    loaded = load_image(image(b"x", text_offset=0x8_0000, image_size=0x12_3456), BOARD)
    assert (loaded.entry, loaded.base) == (IMAGE_BASE + 0x8_0000,) * 2
    assert loaded.size == 0x12_3456
    # More in the file than is needed in memory, such as a signature.
    assert load_image(image(b"x" * 1000, image_size=100), BOARD).size == 1064


def test_a_kernel_from_before_3_17_stands_where_it_did() -> None:
    small = Board(ram_bytes=64 << 20)
    loaded = load_image(image(b"x" * 1000, text_offset=0x1234, image_size=0), small)
    assert loaded.entry == IMAGE_BASE + 0x8_0000
    assert loaded.size > 1064


@pytest.mark.parametrize(("flags", "page"), [(0, 0), (2, 4096), (4, 16384), (6, 65536)])
def test_the_page_size_is_told(flags: int, page: int) -> None:
    assert load_image(image(flags=flags), BOARD).page_bytes == page


def test_a_kernel_may_fill_ram_and_not_a_byte_more() -> None:
    assert load_image(image(image_size=ROOM), BOARD).size == ROOM
    with pytest.raises(LoadError, match=r"needs 15 MiB of memory, .* room for 14: .*--memory"):
        load_image(image(image_size=ROOM + 1), BOARD)
    with pytest.raises(LoadError, match="--memory"):
        load_image(image(image_size=ROOM, text_offset=4096), BOARD)
    bounced = Board(ram_bytes=16 << 20, bounce_bytes=2 << 20)
    assert load_image(image(image_size=ROOM - (2 << 20)), bounced)
    with pytest.raises(LoadError, match="--memory"):
        load_image(image(image_size=ROOM), bounced)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (image(flags=1), "big-endian"),
        (image(text_offset=123), "text_offset is 0x7b"),
        (image(text_offset=2 << 20), "text_offset is 0x200000"),
        (image(text_offset=2**64 - 4096), "text_offset is 0x"),
        (image(image_size=2**64 - 1), "--memory"),
        (gzip.compress(b"not a kernel"), "gzip file holds no arm64 kernel"),
        (gzip.compress(PACKED["gzip"]), "gzip file holds no arm64 kernel"),
        (gzip.compress(b""), "gzip file holds no arm64 kernel"),
        (gzip.compress(PLAIN)[:-1], "truncated"),
        (gzip.compress(PLAIN)[:-9], "truncated"),
        (b"\x1f\x8b", "truncated"),
        (gzip.compress(PLAIN)[:-8] + bytes(8), "corrupt"),
        (b"\x1f\x8b" + b"x" * 100, "corrupt"),
        (zboot(gzip.compress(b"no"), b"gzip"), "zboot file holds no arm64 kernel"),
        (zboot(zstd(PLAIN), b"zstd", len(PLAIN) + 1), "unpacks to 6064 bytes and says 6065"),
        (zboot(zstd(PLAIN)[:-20], b"zstd", len(PLAIN)), "and says 6064|corrupt"),
        (zboot(b"x" * 1000, b"zstd", 1000), "zstd data is corrupt"),
        (zboot(b"x" * 1000, b"xzkern", 1000), "'xzkern'.*only gzip and zstd"),
        (zboot(b"x" * 1000, b"\xff" * 32), "only gzip and zstd"),
        (PACKED["zboot gzip"][:40], "within its header"),
        (PACKED["zboot gzip"][:-30], "file is truncated"),
        (PACKED["zboot zstd"][:-30], "file is truncated"),
        (zboot(b"", b"gzip", offset=0x100)[:-30], "truncated"),
        (image()[:60], "within its header"),
    ],
)
def test_a_kernel_file_that_cannot_run_is_refused_in_words(data: bytes, what: str) -> None:
    assert is_kernel_file(data)
    with pytest.raises(LoadError, match=what) as caught:
        load_image(data, BOARD)
    assert "\n" not in str(caught.value)


def test_a_truncated_efi_kernel_is_noticed() -> None:
    whole = efi_image(b"x" * 4096, [(0x200, 0x800), (0xA00, 0x600)])
    assert load_image(whole, BOARD).segments[0].data == whole
    with pytest.raises(LoadError, match="sections end at byte 4096 of a file of 4095"):
        load_image(whole[:4095], BOARD)
    with pytest.raises(LoadError, match="within its PE header"):
        load_image(whole[:110], BOARD)
    with pytest.raises(LoadError, match="within its PE header"):
        load_image(efi_image(b"", [(0, 0)] * 9)[:-20], BOARD)


@pytest.mark.parametrize(
    "bomb",
    [
        gzip.compress(bytes(ROOM + 1)),
        zboot(gzip.compress(bytes(ROOM + 1)), b"gzip"),
        zboot(zstd(bytes(ROOM + 1)), b"zstd", 100),
    ],
)
def test_what_unpacks_to_more_than_there_is_room_for_is_refused(bomb: bytes) -> None:
    assert len(bomb) < 1 << 20
    with pytest.raises(LoadError, match=f"more than {ROOM} bytes.*--memory"):
        load_image(bomb, BOARD)


def test_a_bomb_costs_no_more_than_its_limit() -> None:
    # 1 GiB in about 1 MB, and a bound of 1000 bytes.
    packer = zlib.compressobj(9, wbits=31)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(1 << 10)) + packer.flush()
    with pytest.raises(LoadError, match="more than 1000 bytes"):
        gunzip(bomb, 1000)
    check_gzip(gzip.compress(b"x" * (5 << 20)))


@given(st.binary(max_size=3000), st.integers(0, 4000))
def test_decompression_gives_what_was_packed_up_to_the_limit(data: bytes, limit: int) -> None:
    for unpack, packed_data in ((gunzip, gzip.compress(data)), (unzstd, zstd(data))):
        if len(data) <= limit:
            assert unpack(packed_data, limit) == data
        else:
            with pytest.raises(LoadError, match=f"more than {limit} bytes"):
                unpack(packed_data, limit)


@given(st.binary(max_size=2000), st.data())
def test_a_truncated_gzip_member_is_always_noticed(content: bytes, data: st.DataObject) -> None:
    whole = gzip.compress(content)
    part = whole[: data.draw(st.integers(0, len(whole) - 1))]
    for attempt in (lambda: gunzip(part, 4000), lambda: check_gzip(part)):
        with pytest.raises(LoadError, match="truncated"):
            attempt()


def holds(loaded: Image, board: Board) -> bool:
    """What the loader promises of any kernel that it lets through."""
    (segment,) = loaded.segments
    return (
        segment.ipa == loaded.entry == loaded.base
        and IMAGE_BASE <= segment.ipa < IMAGE_BASE + (2 << 20)
        and segment.ipa % 4096 == 0
        and len(segment.data) <= segment.memory_bytes
        and segment.end <= board.bounce_base
    )


def load_or_refuse(data: bytes) -> None:
    try:
        loaded = load_kernel(data, BOARD)
    except LoadError:
        return
    assert holds(loaded, BOARD)


numbers = st.one_of(
    st.integers(0, 2**64 - 1), st.integers(0, 64).map(lambda n: 1 << n if n < 64 else 0)
)


@given(numbers, numbers, numbers, st.integers(0, 2**32 - 1), st.binary(max_size=100))
def test_any_header(offset: int, size: int, flags: int, pe_offset: int, body: bytes) -> None:
    kernel = image(body, text_offset=offset, image_size=size, flags=flags, pe_offset=pe_offset)
    load_or_refuse(kernel)
    load_or_refuse(gzip.compress(kernel))


EFI = efi_image(b"x" * 300, [(0, 100), (100, 200)])


@given(st.lists(st.tuples(st.integers(0, len(EFI) - 1), st.integers(0, 255)), max_size=8))
def test_a_corrupted_efi_kernel_is_loaded_safely_or_refused(changes: list[tuple[int, int]]) -> None:
    data = bytearray(EFI)
    for at, value in changes:
        data[at] = value
    load_or_refuse(bytes(data))


ZBOOTS = [PACKED["zboot gzip"], PACKED["zboot zstd"], PACKED["gzip"]]


@given(
    st.sampled_from(ZBOOTS),
    st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=8),
    st.integers(0, 700),
)
def test_corrupted_packings_are_unpacked_safely_or_refused(
    whole: bytes, changes: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(whole)
    for at, value in changes:
        if at < len(data):
            data[at] = value
    load_or_refuse(bytes(data))
    load_or_refuse(bytes(data)[:cut])


@given(st.binary(max_size=200), st.sampled_from([b"gzip", b"zstd", b"zstd22", b"lz4", b""]))
def test_any_zboot_payload(payload: bytes, kind: bytes) -> None:
    load_or_refuse(zboot(payload, kind, len(payload)))
    header = struct.pack("<2s2x4sII8x32s", b"MZ", b"zimg", 2**32 - 1, 2**32 - 1, kind)
    with pytest.raises(LoadError):
        load_kernel(header + payload, BOARD)


def test_random_zstd_data_is_refused() -> None:
    for _ in range(50):
        with pytest.raises(LoadError):
            load_kernel(zboot(b"\x28\xb5\x2f\xfd" + os.urandom(200), b"zstd", 200), BOARD)
