# SPDX-License-Identifier: GPL-2.0-or-later
"""The scatter-gather engine, driven by its registers and a ring, by drivers and by attackers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.smmu_software import DATA, RAM_BYTES, Software
from fakes.stage2_trees import KIB4, PAGE_RO, RAM
from pkvm.events import DmaFault, SmmuEvent
from pkvm.machine import scatter as sg

BASE = 0x1000_1000
RING = DATA
STREAM = 2


class Board(Software):
    """The device behind an SMMU that maps the data pages to themselves; all but one are writable,
    and one is not there."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = sg.ScatterEngine(self.smmu.master(STREAM, "dma-sg"), self, base=BASE)
        self.memory.add_window(self.engine.window)
        for page in range(64):
            pa = DATA + page * KIB4
            if page != 63:
                self.tree.page(pa, pa, PAGE_RO if page == 62 else 0x7FF)
        self.tree.page(BASE, BASE)
        self.translate(STREAM)
        self.start()
        self.set(sg.RING, RING)
        self.set(sg.SIZE, 8)

    def set(self, register: int, value: int) -> None:
        self.memory.write(BASE + register, value.to_bytes(8, "little"))

    def get(self, register: int) -> int:
        return int.from_bytes(self.memory.read(BASE + register, 8), "little")

    def describe(self, index: int, source: int, destination: int, length: int) -> None:
        """Write a descriptor."""
        words = sg.DESCRIPTOR.pack(source, destination, length, 0, 0)
        self.memory.write(RING + index * 32, words)

    def done(self, index: int) -> int:
        return self.memory.read_u64(RING + index * 32 + 24)

    def state(self) -> tuple[int, int, int]:
        return self.get(sg.STATUS), self.get(sg.HEAD), self.get(sg.FAULT)


@pytest.fixture
def board() -> Board:
    return Board()


def page(number: int) -> int:
    return DATA + number * KIB4


def test_it_gathers_and_scatters_around_the_end_of_the_ring(board: Board) -> None:
    text = bytes(range(256)) * 40
    board.memory.write(page(1) + 5, text)
    for round_number in range(5):
        at = [(round_number * 3 + n) % 8 for n in range(3)]
        for n, (start, length) in enumerate(((0, 1), (1, 6000), (6001, len(text) - 6001))):
            board.describe(at[n], page(1) + 5 + start, page(20) + start, length)
        board.memory.write(page(20), bytes(len(text)))
        board.set(sg.TAIL, (at[2] + 1) % 8)
        assert board.state() == (0, (at[2] + 1) % 8, 0)
        assert [board.done(index) for index in at] == [1, 1, 1]
        assert board.memory.read(page(20), len(text)) == text
    assert board.events == []


@pytest.mark.parametrize(
    ("descriptor", "fault", "access"),
    [
        ((page(63), page(1), 8), page(63), "read"),
        ((page(1), page(63), 8), page(63), "write"),
        ((page(1), page(62), 8), page(62), "write"),
        ((page(61), page(30), 4 * KIB4), page(63), "read"),
        ((page(1), page(61), 4 * KIB4), page(62), "write"),
        ((page(1), page(2), (1 << 20) + 1), RING + 32, "read"),
        ((page(1), page(2), (1 << 32) - 1), RING + 32, "read"),
        (((1 << 64) - 4, page(2), 8), (1 << 64) - 4, "read"),
        ((RAM, page(2), 8), RAM, "read"),
    ],
)
def test_what_cannot_be_done_stops_it_there(
    board: Board, descriptor: tuple[int, int, int], fault: int, access: str
) -> None:
    board.describe(0, page(1), page(2), 16)
    board.describe(1, *descriptor)
    board.describe(2, page(1), page(3), 16)
    board.set(sg.TAIL, 3)
    assert board.state() == (1, 1, fault)
    assert [board.done(index) for index in range(3)] == [1, 0, 0]
    assert [event for event in board.events if isinstance(event, DmaFault)] == [
        DmaFault("dma-sg", fault, access)
    ]
    assert sum(isinstance(event, SmmuEvent) for event in board.events) == (fault != RING + 32)
    board.describe(1, page(1), page(2), 16)
    board.set(sg.TAIL, 3)
    assert board.state() == (0, 3, 0)


@pytest.mark.parametrize(
    ("size", "tail", "fault"),
    [
        (0, 0, 0),
        (1, 0, 1),
        (1025, 1, 1025),
        (1 << 63, 1, 1 << 63),
        (8, 8, 8),
        (8, 1 << 40, 1 << 40),
    ],
)
def test_numbers_that_cannot_be(board: Board, size: int, tail: int, fault: int) -> None:
    board.set(sg.SIZE, size)
    board.set(sg.TAIL, tail)
    assert board.state() == (1, 0, fault)


def test_a_ring_that_it_may_not_read_or_write(board: Board) -> None:
    board.set(sg.RING, page(63))
    board.set(sg.TAIL, 1)
    assert board.state() == (1, 0, page(63))
    board.set(sg.RING, page(62))
    board.set(sg.TAIL, 1)
    assert board.state() == (1, 0, page(62) + 24)


def test_a_descriptor_that_rings_the_own_bell_goes_nowhere(board: Board) -> None:
    board.memory.write_u64(page(1), 0)
    board.describe(0, page(1), BASE + sg.TAIL, 8)
    board.describe(1, page(1), BASE + sg.RING, 8)
    board.set(sg.TAIL, 2)
    assert board.state() == (0, 2, 0)
    assert board.get(sg.RING) == RING


def test_a_descriptor_that_rewrites_the_ring_is_taken_at_its_word(board: Board) -> None:
    board.memory.write(page(1), sg.DESCRIPTOR.pack(page(63), page(2), 8, 0, 0))
    board.describe(0, page(1), RING + 32, 32)
    board.describe(1, page(1), page(2), 8)
    board.set(sg.TAIL, 2)
    assert board.state() == (1, 1, page(63))


def test_reset(board: Board) -> None:
    board.describe(0, page(63), page(1), 8)
    board.set(sg.TAIL, 1)
    assert board.state() == (1, 0, page(63))
    board.set(sg.CTRL, 2)
    assert board.state() == (0, 0, 0)
    assert (board.get(sg.RING), board.get(sg.SIZE), board.get(sg.CTRL)) == (0, 0, 0)


@pytest.mark.parametrize(("offset", "size"), [(0, 4), (0x18, 4), (0x1C, 4), (0x40, 8)])
def test_crooked_accesses_do_nothing(board: Board, offset: int, size: int) -> None:
    board.memory.write(BASE + offset, b"\xff" * size)
    assert board.memory.read(BASE + offset, size) == bytes(size)
    assert board.state() == (0, 0, 0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_ring_ends(data: st.DataObject) -> None:
    board = Board()
    number = st.one_of(
        st.integers(0, (1 << 64) - 1),
        st.integers(0, 64 * KIB4).map(lambda at: DATA + at),
        st.sampled_from([BASE + sg.TAIL, BASE + sg.RING, RING, RAM + RAM_BYTES - 8]),
    )
    length = st.one_of(st.integers(0, 70_000), st.integers(0, (1 << 32) - 1))
    for index in range(8):
        board.describe(index, data.draw(number), data.draw(number), data.draw(length))
    board.set(sg.TAIL, data.draw(st.integers(0, 9)))
    status, head, _ = board.state()
    assert status in (0, 1)
    assert head < 8
