# SPDX-License-Identifier: GPL-2.0-or-later
"""The copy engine, driven by register accesses over a bus as a driver (or an attacker) does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.stage2_trees import GIB1, KIB4, MIB2, PAGE_RO, PAGE_WO, RAM, Tree
from pkvm.events import DmaFault, Event
from pkvm.machine import dma
from pkvm.machine.bus import Bus
from pkvm.machine.memory import BusError, PhysicalMemory
from pkvm.machine.stage2 import Access

BASE = 0x1000_0000
RAM_BYTES = 2 << 20
DATA = RAM + (1 << 20)
MAX_BYTES = 1 << 40


class Board:
    """Memory, a driver's bus in bypass, and the device behind a stage-2."""

    def __init__(self, *, bypass: bool = False) -> None:
        self.events: list[Event] = []
        self.memory = PhysicalMemory(RAM, RAM_BYTES)
        self.tree = Tree(self.memory, RAM)
        self.driver = Bus(self.memory, "driver")
        self.bus = Bus(self.memory, "dma")
        self.engine = dma.CopyEngine(self.bus, self, base=BASE, max_bytes=MAX_BYTES)
        self.memory.add_window(self.engine.window)
        if not bypass:
            self.bus.attach(self.tree.context)

    def record(self, event: Event) -> None:
        self.events.append(event)

    def set(self, register: int, value: int) -> None:
        self.driver.write_u64(BASE + register, value)

    def get(self, register: int) -> int:
        return self.driver.read_u64(BASE + register)

    def copy(self, source: int, destination: int, length: int) -> int:
        """Start a copy; STATUS after it."""
        self.set(dma.SRC, source)
        self.set(dma.DST, destination)
        self.set(dma.LEN, length)
        self.set(dma.CTRL, dma.CTRL_START)
        return self.get(dma.STATUS)


@pytest.fixture
def board() -> Board:
    return Board()


def test_it_copies_through_its_stage_2(board: Board) -> None:
    for index in range(4):
        board.tree.page(index * KIB4, DATA + (3 - index) * KIB4)
        board.tree.page(MIB2 + index * KIB4, DATA + (8 + 2 * index) * KIB4)
    payload = bytes(range(1, 251)) * 40
    board.bus.write(0x123, payload)
    assert board.copy(0x123, MIB2 + 0x777, len(payload)) == dma.STATUS_DONE
    assert board.bus.read(MIB2 + 0x777, len(payload)) == payload
    assert board.bus.read(MIB2 + 0x776, 1) == b"\0"
    assert board.bus.read(MIB2 + 0x777 + len(payload), 1) == b"\0"
    assert board.get(dma.FAULT_IPA) == 0
    assert board.events == []


def test_a_large_copy_stops_at_the_hole_and_not_before(board: Board) -> None:
    """Bytes move in large pieces; what is before the refused page has been moved, all of it."""
    payload = bytes(range(256)) * 16 * 60
    for index in range(60):
        board.tree.page(MIB2 + index * KIB4, DATA + index * KIB4)
        if index != 37:
            board.tree.page(2 * MIB2 + index * KIB4, DATA + (64 + index) * KIB4)
    board.memory.write(DATA, payload)
    length = 60 * KIB4 - 3
    assert board.copy(MIB2 + 3, 2 * MIB2, length) == dma.STATUS_FAULT
    assert board.get(dma.FAULT_IPA) == 2 * MIB2 + 37 * KIB4
    moved = 37 * KIB4
    assert board.memory.read(DATA + 64 * KIB4, moved) == payload[3 : 3 + moved]
    assert board.memory.read(DATA + 101 * KIB4, KIB4) == bytes(KIB4)
    board.tree.page(2 * MIB2 + 37 * KIB4, DATA + 101 * KIB4)
    assert board.copy(MIB2 + 3, 2 * MIB2, length) == dma.STATUS_DONE
    assert board.memory.read(DATA + 64 * KIB4, length) == payload[3:]


def test_reset(board: Board) -> None:
    assert board.copy(0x10000, 0, 8) == dma.STATUS_FAULT
    board.set(dma.CTRL, dma.CTRL_RESET)
    assert [board.get(offset) for offset in (dma.SRC, dma.DST, dma.LEN, dma.STATUS)] == [0] * 4
    assert board.get(dma.FAULT_IPA) == 0


@pytest.mark.parametrize(
    ("source", "destination", "fault", "access"),
    [
        (0x10000, 0, 0x10000, "read"),
        (0x1FF8, 0, 0x2000, "read"),
        (0, 0x10008, 0x10008, "write"),
        (0, 0x1FF0, 0x2000, "write"),
        (0x4000, 0, 0x4000, "read"),
        (0, 0x3000, 0x3000, "write"),
        (1 << 40, 0, 1 << 40, "read"),
        (0, (1 << 64) - 8, (1 << 64) - 8, "write"),
    ],
)
def test_a_refused_address_stops_it(
    board: Board, source: int, destination: int, fault: int, access: str
) -> None:
    board.tree.page(0, DATA)
    board.tree.page(KIB4, DATA + KIB4)
    board.tree.page(3 * KIB4, DATA, PAGE_RO)
    board.tree.page(4 * KIB4, DATA, PAGE_WO)
    assert board.copy(source, destination, 0x40) == dma.STATUS_FAULT
    assert board.get(dma.FAULT_IPA) == fault
    assert board.events == [DmaFault("dma-copy", fault, access)]


def test_bytes_before_the_fault_have_moved(board: Board) -> None:
    board.tree.page(0, DATA)
    board.tree.page(KIB4, DATA + KIB4)
    board.bus.write(0, b"abcdefgh")
    assert board.copy(0, 0x1FFC, 8) == dma.STATUS_FAULT
    assert board.bus.read(0x1FFC, 4) == b"abcd"


def test_a_fault_is_forgotten_by_the_next_start(board: Board) -> None:
    board.tree.page(0, DATA)
    assert board.copy(MIB2, 0, 8) == dma.STATUS_FAULT
    assert board.copy(0, 8, 8) == dma.STATUS_DONE
    assert board.get(dma.FAULT_IPA) == 0
    assert board.copy(GIB1, 0, 0) == dma.STATUS_DONE


def test_an_address_that_passes_stage_2_but_where_nothing_answers(board: Board) -> None:
    board.tree.page(0, DATA)
    board.tree.page(KIB4, 0x2000_0000)
    assert board.copy(KIB4, 0, 8) == dma.STATUS_FAULT
    assert board.get(dma.FAULT_IPA) == KIB4


@pytest.mark.parametrize("length", [MAX_BYTES + 1, (1 << 64) - 1])
def test_a_length_beyond_the_address_space_moves_nothing(board: Board, length: int) -> None:
    board.tree.page(0, DATA)
    board.bus.write(0, b"abcd")
    assert board.copy(0, 0x800, length) == dma.STATUS_FAULT
    assert board.get(dma.FAULT_IPA) == 0
    assert board.bus.read(0x800, 4) == bytes(4)
    assert board.events == [DmaFault("dma-copy", 0, "read")]


def test_overlapping_ranges_are_copied_upwards_by_pages(board: Board) -> None:
    board.tree.block(0, RAM, 2)
    base = 1 << 20
    payload = bytes(range(256)) * 32
    board.bus.write(base + KIB4, payload)
    assert board.copy(base + KIB4, base, len(payload)) == dma.STATUS_DONE
    assert board.bus.read(base, len(payload)) == payload
    board.bus.write(base, bytes(4 * KIB4))
    board.bus.write(base, b"\x5a" * KIB4)
    assert board.copy(base, base + KIB4, 3 * KIB4) == dma.STATUS_DONE
    assert board.bus.read(base, 4 * KIB4) == b"\x5a" * 4 * KIB4


def test_registers_hold_64_bits_and_status_is_read_only(board: Board) -> None:
    board.set(dma.SRC, (1 << 64) - 1)
    assert board.get(dma.SRC) == (1 << 64) - 1
    board.set(dma.STATUS, 7)
    board.set(dma.FAULT_IPA, 7)
    board.set(dma.LEN, 8)
    board.set(dma.CTRL, 0xFE)
    assert board.events == []
    for register in (dma.STATUS, dma.FAULT_IPA, dma.CTRL, 0x28 + 8, 0xFF8):
        assert board.get(register) == 0


def test_only_whole_registers_are_accessed(board: Board) -> None:
    board.set(dma.LEN, 0x1122_3344_5566_7788)
    for size in (1, 2, 4):
        assert board.driver.read(BASE + dma.LEN, size) == bytes(size)
        board.driver.write(BASE + dma.LEN, bytes(size))
    assert board.driver.read(BASE + dma.LEN + 4, 8) == bytes(8)
    board.driver.write(BASE + dma.LEN - 4, bytes(8))
    assert board.get(dma.LEN) == 0x1122_3344_5566_7788


def test_it_may_be_pointed_at_its_own_registers(board: Board) -> None:
    """Its stage-2 may let it: the start that it writes itself comes while it is busy."""
    board.tree.page(0, DATA)
    board.tree.page(KIB4, BASE)
    board.bus.write_u64(0, dma.CTRL_START)
    assert board.copy(0, KIB4 + dma.CTRL, 8) == dma.STATUS_DONE
    assert board.copy(KIB4 + dma.STATUS, 8, 8) == dma.STATUS_DONE
    assert board.bus.read_u64(8) == dma.STATUS_BUSY
    board.bus.write_u64(0, 0x1234)
    assert board.copy(0, KIB4 + dma.SRC, 8) == dma.STATUS_DONE
    assert board.get(dma.SRC) == 0x1234


def test_a_copy_is_finished_when_the_start_returns_whoever_looks_on() -> None:
    """The driver's bus is free while bytes move, so others may look; they see it busy."""
    board = Board()
    seen: list[int] = []

    def on_fault(ipa: int, _access: Access, _fsc: int) -> bool:
        seen.append(board.get(dma.STATUS))
        board.driver.invalidate()
        board.tree.page(ipa, DATA)
        return True

    board.bus.on_fault = on_fault
    assert board.copy(0, KIB4, 8) == dma.STATUS_DONE
    assert seen == [dma.STATUS_BUSY, dma.STATUS_BUSY]


interesting = st.one_of(
    st.integers(0, 0x6000),
    st.integers(MIB2 - 64, MIB2 + 64),
    st.sampled_from((RAM, RAM + RAM_BYTES - 8, BASE, BASE + dma.CTRL, 1 << 40, (1 << 64) - 1)),
    st.integers(0, (1 << 64) - 1),
)


@given(
    bypass=st.booleans(),
    steps=st.lists(
        st.tuples(
            st.one_of(st.sampled_from((0, 8, 0x10, 0x18, 0x20, 0x28)), st.integers(-8, 0x1008)),
            st.sampled_from((1, 2, 3, 4, 8, 8, 8, 8, 16)),
            interesting,
            st.booleans(),
        ),
        max_size=30,
    ),
)
def test_a_hostile_driver_gets_defined_behaviour(
    bypass: bool, steps: list[tuple[int, int, int, bool]]
) -> None:
    board = Board(bypass=bypass)
    for index in range(4):
        board.tree.page(index * KIB4, DATA + index * KIB4)
    board.tree.page(4 * KIB4, BASE)
    tables = board.memory.read(RAM, 16 * KIB4)
    for offset, size, value, is_write in steps:
        inside = offset >= 0 and offset + size <= dma.WINDOW_BYTES and size in (1, 2, 4, 8)
        try:
            if is_write:
                board.driver.write(
                    BASE + offset, (value & (1 << 8 * size) - 1).to_bytes(size, "little")
                )
            else:
                board.driver.read(BASE + offset, size)
        except BusError:
            # A page's end splits an access, and a piece of an odd size finds nobody.
            assert not inside
        assert board.get(dma.STATUS) in (dma.STATUS_DONE, dma.STATUS_FAULT)
    assert all(isinstance(event, DmaFault) for event in board.events)
    if not bypass:
        assert board.memory.read(RAM, 16 * KIB4) == tables
