# SPDX-License-Identifier: GPL-2.0-or-later
"""Images: what is good is placed as it says, whatever else a user brings is refused in words."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.elf import ET_DYN, Elf, Phdr
from pkvm.vmm.board import IMAGE_BASE, RAM_BASE, Board
from pkvm.vmm.errors import LoadError
from pkvm.vmm.loader import Image, Segment, load_image

BOARD = Board(ram_bytes=16 << 20)


def test_a_flat_image_goes_behind_the_device_tree() -> None:
    image = load_image(b"\x1f\x20\x03\xd5" * 4, BOARD)
    assert image == Image((Segment(IMAGE_BASE, b"\x1f\x20\x03\xd5" * 4, 16),), IMAGE_BASE)
    assert (image.base, image.size) == (0x4020_0000, 16)


def test_a_flat_image_may_fill_ram_and_not_a_byte_more() -> None:
    room = BOARD.ram_end - IMAGE_BASE
    assert load_image(bytes(room), BOARD).segments[0].end == BOARD.ram_end
    with pytest.raises(LoadError, match="room for 14680064 behind"):
        load_image(bytes(room + 1), BOARD)


def test_an_elf_file_goes_where_it_says() -> None:
    data = Elf(
        entry=0x4030_0004,
        phdrs=[
            Phdr(0x4050_0000, b"data", memory=0x1000, flags=6),
            Phdr(0x1234, b"note", kind=4),
            Phdr(0x4030_0000, b"code" * 4, flags=5),
            Phdr(0x9999_0000, b"", memory=0),
        ],
    ).build()
    image = load_image(data, BOARD)
    assert image.entry == 0x4030_0004
    assert image.segments == (
        Segment(0x4030_0000, b"code" * 4, 16),
        Segment(0x4050_0000, b"data", 0x1000),
    )
    assert (image.base, image.size) == (0x4030_0000, 0x20_1000)


@pytest.mark.parametrize(
    ("elf", "what"),
    [
        (Elf(kind=ET_DYN), "position-independent .* link it statically"),
        (Elf(kind=1), "ET_REL, not an executable"),
        (Elf(machine=62), "EM_X86_64, not AArch64"),
        (Elf(endian=2), "big-endian"),
        (Elf(phdrs=[]), "nothing to load"),
        (Elf(phdrs=[Phdr(IMAGE_BASE, b"x", kind=4)]), "nothing to load"),
        (Elf(phdrs=[Phdr(IMAGE_BASE, b"12345678", memory=4)]), "8 bytes in the file and only 4"),
        (
            Elf(phdrs=[Phdr(IMAGE_BASE, b"1234", memory=4096, file_bytes=1000)]),
            "truncated",
        ),
        (Elf(phdrs=[Phdr(RAM_BASE, b"1234")]), "device tree is below"),
        (Elf(phdrs=[Phdr(0, b"1234")]), "does not lie in the RAM"),
        (Elf(phdrs=[Phdr(BOARD.ram_end - 4, b"12345678")]), "does not lie in the RAM"),
        (Elf(phdrs=[Phdr(2**64 - 4, b"12345678")]), "does not lie in the RAM"),
        (Elf(phdrs=[Phdr(IMAGE_BASE, b"1234", memory=2**64 - 1)]), "does not lie in the RAM"),
        (
            Elf(phdrs=[Phdr(IMAGE_BASE, b"1234", memory=2**64 - 1, file_bytes=2**64 - 1)]),
            "truncated",
        ),
        (
            Elf(phdrs=[Phdr(IMAGE_BASE + 8, b"1234"), Phdr(IMAGE_BASE, b"1" * 9)]),
            "0x40200000 and 0x40200008 overlap",
        ),
        (Elf(entry=0), "entry point 0x0"),
        (Elf(entry=IMAGE_BASE + 2), "entry point 0x40200002"),
        (Elf(entry=IMAGE_BASE + 16), "entry point 0x40200010"),
        (Elf(phdrs=[Phdr(IMAGE_BASE, b"12345678", flags=6)]), "executable segment"),
    ],
)
def test_an_elf_file_that_cannot_run_is_refused_in_words(elf: Elf, what: str) -> None:
    with pytest.raises(LoadError, match=what):
        load_image(elf.build(), BOARD)


def test_a_32_bit_elf_file_is_refused() -> None:
    ident = b"\x7fELF\1\1\1" + bytes(9)
    data = ident + struct.pack("<HHIIIIIHHHHHH", 2, 40, 1, 0, 0, 0, 0, 52, 32, 0, 40, 0, 0)
    with pytest.raises(LoadError, match="ELFCLASS32 EM_ARM, not AArch64"):
        load_image(data, BOARD)


def test_an_empty_image_is_refused() -> None:
    with pytest.raises(LoadError, match="empty"):
        load_image(b"", BOARD)


GOOD = Elf(phdrs=[Phdr(IMAGE_BASE, b"a" * 32), Phdr(IMAGE_BASE + 4096, b"b" * 32)]).build()


@pytest.mark.parametrize("length", range(1, len(GOOD)))
def test_a_truncated_elf_file_is_refused(length: int) -> None:
    if length < 4:
        assert load_image(GOOD[:length], BOARD).entry == IMAGE_BASE  # three bytes are a flat image
    else:
        with pytest.raises(LoadError):
            load_image(GOOD[:length], BOARD)


def holds(image: Image) -> bool:
    """What the loader promises of any image that it lets through."""
    ends = [IMAGE_BASE]
    for segment in image.segments:
        if segment.ipa < ends[-1] or len(segment.data) > segment.memory_bytes:
            return False
        ends.append(segment.end)
    return ends[-1] <= BOARD.ram_end and image.base <= image.entry < image.base + image.size


@given(st.lists(st.tuples(st.integers(0, 63 + 56 * 2), st.integers(0, 255)), max_size=5))
def test_a_corrupted_elf_file_is_loaded_safely_or_refused(changes: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for at, value in changes:
        data[at] = value
    try:
        image = load_image(bytes(data), BOARD)
    except LoadError:
        return
    assert holds(image)


@given(st.binary(max_size=400))
def test_elf_rubbish_is_refused(tail: bytes) -> None:
    try:
        image = load_image(b"\x7fELF" + tail, BOARD)
    except LoadError:
        return
    assert holds(image)


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), max_size=4))
def test_any_addresses_and_sizes(ranges: list[tuple[int, int]]) -> None:
    elf = Elf(phdrs=[Phdr(ipa, b"xxxx", memory=memory) for ipa, memory in ranges])
    try:
        image = load_image(elf.build(), BOARD)
    except LoadError:
        return
    assert holds(image)


@pytest.mark.parametrize(
    ("ram", "cpus", "what"),
    [
        (2 << 20, 1, "between 4M and"),
        (0, 1, "between 4M and"),
        (-4096, 1, "between 4M and"),
        (1 << 50, 1, "between 4M and 1023G"),
        ((8 << 20) + 1, 1, "multiple of 4K"),
        (8 << 20, 0, "choose 1 to 8"),
        (8 << 20, 9, "choose 1 to 8"),
    ],
)
def test_a_board_that_cannot_be_is_refused(ram: int, cpus: int, what: str) -> None:
    with pytest.raises(LoadError, match=what):
        Board(ram, cpus)


def test_a_command_line_that_cannot_be_is_refused() -> None:
    for line in ("a\0b", "x" * 4097, "ü" * 2049):
        with pytest.raises(LoadError, match="command line"):
            Board(command_line=line)
