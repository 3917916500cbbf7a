# SPDX-License-Identifier: GPL-2.0-or-later
"""virtio-console: what is typed and printed, the size, and a driver that does anything."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.hostile_driver import RAM_BYTES, SECRET, Plan, attack, plans
from fakes.virtio_driver import Driver, Rig
from pkvm.vmm.virtio import mmio
from pkvm.vmm.virtio.console import MAX_OUTPUT, RECEIVE, TRANSMIT, Console


class Keyboard:
    """What was typed, and not taken yet."""

    def __init__(self) -> None:
        self.typed = b""

    def take(self, limit: int) -> bytes:
        data, self.typed = self.typed[:limit], self.typed[limit:]
        return data


@pytest.fixture
def keyboard() -> Keyboard:
    return Keyboard()


@pytest.fixture
def printed() -> list[bytes]:
    return []


@pytest.fixture
def rig(printed: list[bytes], keyboard: Keyboard) -> Rig:
    return Rig(Console(printed.append, keyboard.take))


def console(rig: Rig) -> Console:
    assert isinstance(rig.backend, Console)
    return rig.backend


@pytest.mark.parametrize("indirect", [False, True])
def test_what_is_printed_appears_at_once(rig: Rig, printed: list[bytes], indirect: bool) -> None:
    driver = Driver(rig, indirect=indirect)
    assert driver.request([b"hello ", b"there\r\n"], queue=TRANSMIT).length == 0
    assert printed == [b"hello there\r\n"]
    assert driver.acknowledge() == mmio.INTERRUPT_USED


def test_typed_bytes_come_when_there_is_a_buffer(rig: Rig, keyboard: Keyboard) -> None:
    driver = Driver(rig)
    keyboard.typed = b"0123456789"
    console(rig).arrived()
    assert driver.collect(RECEIVE) == []
    driver.add(writable=[4], queue=RECEIVE)
    driver.add(writable=[4], queue=RECEIVE)
    driver.notify(RECEIVE)
    assert [used.data for used in driver.collect(RECEIVE)] == [b"0123", b"4567"]
    assert keyboard.typed == b"89"


def test_a_buffer_waits_for_typed_bytes(rig: Rig, keyboard: Keyboard) -> None:
    driver = Driver(rig)
    driver.add(writable=[64], queue=RECEIVE)
    driver.notify(RECEIVE)
    assert driver.collect(RECEIVE) == []
    assert driver.acknowledge() == 0
    keyboard.typed = b"ls\r"
    console(rig).arrived()
    (used,) = driver.collect(RECEIVE)
    assert used.data[: used.length] == b"ls\r"
    assert driver.acknowledge() == mmio.INTERRUPT_USED


def test_buffers_given_before_the_driver_is_up_are_used(rig: Rig, keyboard: Keyboard) -> None:
    driver = Driver(rig, start=False)
    keyboard.typed = b"early"
    driver.add(writable=[64], queue=RECEIVE)
    console(rig).arrived()
    assert driver.collect(RECEIVE) == []
    driver.start()
    (used,) = driver.collect(RECEIVE)
    assert used.data[: used.length] == b"early"


def test_nothing_typed_is_lost_by_a_reset(rig: Rig, keyboard: Keyboard) -> None:
    driver = Driver(rig)
    driver.add(writable=[64], queue=RECEIVE)
    driver.notify(RECEIVE)
    driver.write(mmio.STATUS, 0)
    keyboard.typed = b"after"
    console(rig).arrived()
    driver = Driver(rig)
    driver.add(writable=[64], queue=RECEIVE)
    driver.notify(RECEIVE)
    (used,) = driver.collect(RECEIVE)
    assert used.data[: used.length] == b"after"


def test_the_size_and_its_changes(rig: Rig) -> None:
    console(rig).resize(80, 24)
    driver = Driver(rig)
    generation = driver.read(mmio.CONFIG_GENERATION)
    assert driver.read(mmio.CONFIG) == 80 | 24 << 16
    assert driver.read(mmio.CONFIG + 4) == 1
    console(rig).resize(132, 43)
    assert driver.acknowledge() == mmio.INTERRUPT_CONFIG
    assert driver.read(mmio.CONFIG) == 132 | 43 << 16
    assert driver.read(mmio.CONFIG_GENERATION) != generation
    console(rig).resize(132, 43)
    assert driver.acknowledge() == 0
    console(rig).resize(1 << 20, 1)
    assert driver.read(mmio.CONFIG) == 0xFFFF | 1 << 16


def test_a_size_may_be_known_before_there_is_a_transport(printed: list[bytes]) -> None:
    device = Console(printed.append)
    device.resize(100, 30)
    device.arrived()
    assert struct.unpack("<HH", Rig(device).backend.read_config()[:4]) == (100, 30)


def test_an_emergency_write_needs_no_driver(rig: Rig, printed: list[bytes]) -> None:
    rig.device.write(mmio.CONFIG + 8, 4, ord("!"))
    rig.device.write(mmio.CONFIG, 4, 5)
    assert printed == [b"!"]


def test_a_sink_that_fails_ends_the_run() -> None:
    class ScreenGone(Exception):
        pass

    def sink(_: bytes) -> None:
        raise ScreenGone

    driver = Driver(Rig(Console(sink)))
    with pytest.raises(ScreenGone):
        driver.request([b"x"], queue=TRANSMIT)


@pytest.mark.parametrize(
    ("readable", "writable", "queue"),
    [([bytes(MAX_OUTPUT), b"x"], [], TRANSMIT), ([b"x"], [], RECEIVE)],
)
def test_buffers_that_make_no_sense_break_the_device(
    rig: Rig, keyboard: Keyboard, readable: list[bytes], writable: list[int], queue: int
) -> None:
    driver = Driver(rig)
    keyboard.typed = b"x"
    driver.add(readable, writable, queue)
    driver.notify(queue)
    assert rig.needs_reset
    assert rig.backend.queue_names[queue] in rig.report()


class Typed(Console):
    """Input of the hostile driver's tests is what is typed."""

    def __init__(self) -> None:
        self.printed: list[bytes] = []
        self.keyboard = Keyboard()
        super().__init__(self.printed.append, self.keyboard.take)

    def receive(self, data: bytes) -> None:
        self.keyboard.typed = (self.keyboard.typed + data)[:4096]
        self.arrived()


@settings(max_examples=100, deadline=None)
@given(plan=plans(2, st.binary(max_size=40)))
def test_a_driver_that_does_anything(plan: Plan) -> None:
    device = Typed()
    attack(Rig(device, ram_bytes=RAM_BYTES), plan)
    assert SECRET[:32] not in b"".join(device.printed)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.binary(min_size=1, max_size=50), max_size=10),
    st.lists(st.integers(1, 64), min_size=1, max_size=12),
    st.booleans(),
)
def test_every_byte_arrives_once_and_in_order(
    typed: list[bytes], rooms: list[int], indirect: bool
) -> None:
    keyboard = Keyboard()
    rig = Rig(Console(lambda _: None, keyboard.take))
    driver = Driver(rig, indirect=indirect)
    got = b""
    for data in typed:
        keyboard.typed += data
        console(rig).arrived()
        for room in rooms:
            driver.add(writable=[room], queue=RECEIVE)
            driver.notify(RECEIVE)
            got += b"".join(used.data[: used.length] for used in driver.collect(RECEIVE))
            if len(driver._buffers) > 8:
                break
    assert got + keyboard.typed == b"".join(typed)
