# SPDX-License-Identifier: GPL-2.0-or-later
"""The UART: bytes appear as they are sent, input is found by polling, every access is defined."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvm.vmm import pl011
from pkvm.vmm.pl011 import Pl011


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


def test_input_is_received_in_order(uart: Pl011) -> None:
    uart.feed(b"ab")
    assert uart.read(pl011.FR, 4) == pl011.FR_TXFE
    assert uart.read(pl011.RIS, 4) == pl011.INT_RX
    assert [uart.read(pl011.DR, 4) for _ in range(3)] == [ord("a"), ord("b"), 0]
    assert uart.read(pl011.FR, 4) & pl011.FR_RXFE


def test_a_source_is_asked_only_when_nothing_is_left() -> None:
    asked = []

    def source() -> bytes:
        asked.append(1)
        return b"yz" if len(asked) == 1 else b""

    uart = Pl011(lambda _: None, source)
    assert [chr(uart.read(pl011.DR, 4)) for _ in range(2)] == ["y", "z"]
    assert len(asked) == 1
    assert uart.read(pl011.DR, 4) == 0
    assert len(asked) == 2


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
