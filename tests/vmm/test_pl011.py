# SPDX-License-Identifier: GPL-2.0-or-later
"""The UART: bytes appear as they are sent, input interrupts or is found by polling, every access
is defined."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvm.vmm import pl011
from pkvm.vmm.pl011 import Pl011


class Input:
    """A source whose data can be added to."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = data
        self.asked = 0
        self.lock = threading.Lock()

    def take(self, limit: int) -> bytes:
        self.asked += 1
        with self.lock:
            taken, self.data = self.data[:limit], self.data[limit:]
        return taken


class Wire:
    """A line that keeps its changes."""

    def __init__(self) -> None:
        self.level = False
        self.levels: list[bool] = []

    def set(self, level: bool) -> None:
        if level != self.level:
            self.level = level
            self.levels.append(level)


class Wired:
    """A UART with its FIFOs enabled, an interrupt line and somebody who types."""

    def __init__(self) -> None:
        self.given = Input()
        self.line = Wire()
        self.uart = Pl011(lambda _: None, self.given.take, self.line)
        self.uart.write(pl011.LCR_H, 4, pl011.LCR_H_FEN)

    def type(self, data: bytes) -> None:
        with self.given.lock:
            self.given.data += data
        self.uart.arrived()


@pytest.fixture
def wired() -> Wired:
    return Wired()


@pytest.fixture
def sent() -> list[bytes]:
    return []


@pytest.fixture
def uart(sent: list[bytes]) -> Pl011:
    return Pl011(sent.append)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_what_is_sent_appears_byte_by_byte(uart: Pl011, sent: list[bytes], size: int) -> None:
    for byte in b"ok\n":
        uart.write(pl011.DR, size, 0x1234_5600 | byte)
    assert sent == [b"o", b"k", b"\n"]


def test_the_transmitter_is_always_ready(uart: Pl011) -> None:
    assert uart.read(pl011.FR, 4) == pl011.FR_TXFE | pl011.FR_RXFE
    uart.write(pl011.DR, 4, ord("x"))
    assert uart.read(pl011.FR, 4) == pl011.FR_TXFE | pl011.FR_RXFE


def test_input_is_received_in_order() -> None:
    uart = Pl011(lambda _: None, Input(b"ab").take)
    assert uart.read(pl011.FR, 4) == pl011.FR_TXFE | pl011.FR_RXFF  # one character without FIFOs
    assert uart.read(pl011.RIS, 4) == pl011.INT_RX
    assert [uart.read(pl011.DR, 4) for _ in range(3)] == [ord("a"), ord("b"), 0]
    assert uart.read(pl011.FR, 4) & pl011.FR_RXFE


def test_without_a_line_the_source_is_asked_only_when_nothing_is_left() -> None:
    given = Input(b"yz")
    uart = Pl011(lambda _: None, given.take)
    uart.write(pl011.LCR_H, 4, pl011.LCR_H_FEN)
    assert [chr(uart.read(pl011.DR, 4)) for _ in range(2)] == ["y", "z"]
    asked = given.asked
    assert uart.read(pl011.DR, 4) == 0
    assert given.asked == asked + 1


def test_with_a_line_the_source_is_asked_when_something_arrived(wired: Wired) -> None:
    wired.given.data = b"x"
    assert wired.uart.read(pl011.FR, 4) & pl011.FR_RXFE
    assert wired.given.asked == 0
    wired.uart.arrived()
    assert wired.uart.read(pl011.DR, 4) == ord("x")
    assert wired.uart.read(pl011.DR, 4) == 0


def test_the_receiver_interrupts_and_stops_when_it_is_empty(wired: Wired) -> None:
    uart = wired.uart
    uart.write(pl011.IMSC, 4, pl011.INT_RX | pl011.INT_RT)
    wired.type(b"ab")
    assert uart.read(pl011.MIS, 4) == pl011.INT_RT  # below the trigger level
    assert wired.line.levels == [True]
    uart.write(pl011.ICR, 4, 0x7FF)  # as long as there is something, the timeout elapses again
    assert uart.read(pl011.MIS, 4) == pl011.INT_RT
    uart.read(pl011.DR, 4)
    assert wired.line.levels == [True]
    uart.read(pl011.DR, 4)
    assert wired.line.levels == [True, False]


@pytest.mark.parametrize(
    ("select", "trigger"), [(0, 4), (1, 8), (2, 16), (3, 24), (4, 28), (7, 28)]
)
def test_the_trigger_level(wired: Wired, select: int, trigger: int) -> None:
    uart = wired.uart
    uart.write(pl011.IFLS, 4, select << 3)
    uart.write(pl011.IMSC, 4, pl011.INT_RX)
    wired.type(bytes(trigger - 1))
    assert wired.line.levels == []
    wired.type(b"x")
    assert wired.line.levels == [True]
    uart.read(pl011.DR, 4)
    assert wired.line.levels == [True, False]


def test_a_full_fifo_leaves_the_rest_at_the_source(wired: Wired) -> None:
    data = bytes(range(100))
    wired.type(data)
    assert wired.given.data == data[pl011.FIFO_DEPTH :]
    assert wired.uart.read(pl011.FR, 4) & pl011.FR_RXFF
    assert bytes(wired.uart.read(pl011.DR, 4) for _ in range(100)) == data
    assert wired.uart.read(pl011.FR, 4) & pl011.FR_RXFE


def test_the_transmitter_interrupts_after_each_character(wired: Wired) -> None:
    uart = wired.uart
    uart.write(pl011.IMSC, 4, pl011.INT_TX)
    assert wired.line.levels == []
    uart.write(pl011.DR, 4, ord("x"))
    assert wired.line.levels == [True]
    uart.write(pl011.ICR, 4, pl011.INT_TX)
    assert wired.line.levels == [True, False]
    uart.write(pl011.DR, 4, ord("y"))
    uart.write(pl011.IMSC, 4, 0)
    assert wired.line.levels == [True, False, True, False]


def test_there_is_no_dma(wired: Wired) -> None:
    wired.uart.write(pl011.DMACR, 4, 7)
    assert wired.uart.read(pl011.DMACR, 4) == 0


def test_input_from_another_thread_is_not_lost(wired: Wired) -> None:
    uart = wired.uart
    uart.write(pl011.IMSC, 4, pl011.INT_RX | pl011.INT_RT)
    data = bytes(n % 251 for n in range(2000))

    def type_all() -> None:
        for at in range(0, len(data), 7):
            wired.type(data[at : at + 7])

    typist = threading.Thread(target=type_all)
    typist.start()
    got = bytearray()
    end = time.monotonic() + 30
    while len(got) < len(data) and time.monotonic() < end:
        # As a driver does: only when the line is high.
        if wired.line.level:
            while not uart.read(pl011.FR, 4) & pl011.FR_RXFE:
                got.append(uart.read(pl011.DR, 4))
    typist.join()
    assert bytes(got) == data
    assert not wired.line.level


def test_identification(uart: Pl011) -> None:
    found = [uart.read(0xFE0 + 4 * n, 4) for n in range(8)]
    assert found == [0x11, 0x10, 0x34, 0x00, 0x0D, 0xF0, 0x05, 0xB1]
    # The peripheral id of an AMBA PL011, as a driver puts it together.
    assert sum(byte << 8 * n for n, byte in enumerate(found[:4])) & 0xF_FFFF == 0x41011


def test_reset_values_and_registers_that_hold(uart: Pl011) -> None:
    assert uart.read(pl011.CR, 4) == 0x300
    assert uart.read(pl011.IFLS, 4) == 0x12
    uart.write(pl011.IBRD, 4, 0xFFFF_FFFF)
    uart.write(pl011.LCR_H, 2, 0x170)
    assert uart.read(pl011.IBRD, 4) == 0xFFFF
    assert uart.read(pl011.LCR_H, 4) == 0x70


def test_interrupt_status_is_masked_and_cleared(uart: Pl011) -> None:
    uart.write(pl011.DR, 4, ord("x"))
    assert uart.read(pl011.RIS, 4) == pl011.INT_TX
    assert uart.read(pl011.MIS, 4) == 0
    uart.write(pl011.IMSC, 4, pl011.INT_TX)
    assert uart.read(pl011.MIS, 4) == pl011.INT_TX
    uart.write(pl011.ICR, 4, pl011.INT_TX)
    assert uart.read(pl011.RIS, 4) == 0


def test_parts_of_a_register(uart: Pl011) -> None:
    uart.write(pl011.IBRD, 4, 0xABCD)
    assert uart.read(pl011.IBRD, 1) == 0xCD
    assert uart.read(pl011.IBRD + 1, 1) == 0xAB
    assert uart.read(pl011.IBRD + 1, 4) == 0xAB
    assert uart.read(pl011.IBRD, 8) == 0xABCD
    uart.write(pl011.IBRD + 1, 1, 0)
    assert uart.read(pl011.IBRD, 4) == 0xABCD
    uart.write(pl011.IBRD, 1, 0x1234)
    assert uart.read(pl011.IBRD, 4) == 0x34


accesses = st.lists(
    st.tuples(
        st.booleans(),
        st.integers(0, 0xFFF),
        st.sampled_from((1, 2, 4, 8)),
        st.integers(0, 2**64 - 1),
    )
)


@given(accesses)
def test_every_access_is_defined(log: list[tuple[bool, int, int, int]]) -> None:
    sent: list[bytes] = []
    uart = Pl011(sent.append)
    for is_write, offset, size, value in log:
        if is_write:
            uart.write(offset, size, value)
        else:
            assert 0 <= uart.read(offset, size) < 1 << 8 * size
    assert len(sent) == sum(is_write and offset == 0 for is_write, offset, _, _ in log)


@given(st.integers(0x4C, 0xFDF), st.integers(0, 2**32 - 1))
def test_registers_that_do_not_exist_read_as_zero(offset: int, value: int) -> None:
    uart = Pl011(lambda _: None)
    uart.write(offset & ~3, 4, value)
    assert uart.read(offset & ~3, 4) == 0


def test_held_input_arrives_once_the_guest_has_opened_the_port() -> None:
    given, line = Input(b"typed ahead"), Wire()
    uart = Pl011(lambda _: None, given.take, line, hold_input=True)
    uart.write(pl011.LCR_H, 4, pl011.LCR_H_FEN)
    uart.arrived()
    uart.write(pl011.IMSC, 4, pl011.INT_RX | pl011.INT_RT)
    assert uart.read(pl011.FR, 4) & pl011.FR_RXFE
    assert uart.read(pl011.DR, 4) == 0
    uart.write(pl011.LCR_H, 4, pl011.LCR_H_FEN)
    assert line.level
    assert bytes(uart.read(pl011.DR, 4) for _ in range(11)) == b"typed ahead"
