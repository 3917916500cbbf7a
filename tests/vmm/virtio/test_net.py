# SPDX-License-Identifier: GPL-2.0-or-later
"""virtio-net on a socket pair that speaks passt's protocol, and a driver that does anything."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from queue import SimpleQueue

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.hostile_driver import RAM_BYTES, SECRET, Plan, attack, plans
from fakes.manual_loop import ManualLoop
from fakes.virtio_driver import Driver, Rig
from pkvm.vmm.errors import LoadError
from pkvm.vmm.virtio import mmio, net
from pkvm.vmm.virtio.links import MAX_FRAME, MAX_QUEUED, StreamLink
from pkvm.vmm.virtio.net import RECEIVE, TRANSMIT, Net, default_mac, parse_mac

MAC = bytes.fromhex("020000000001")
FRAME = bytes.fromhex("ffffffffffff 0200000000aa 88b5") + b"to the guest"
ANSWER = bytes.fromhex("0200000000aa 020000000001 88b5") + b"to the world"
NO_HEADER = bytes(12)
RECEIVED_HEADER = bytes(10) + b"\x01\x00"


class Peer:
    """The other end of the wire: passt's."""

    def __init__(self) -> None:
        self.socket, self.ours = socket.socketpair()
        self.socket.setblocking(False)
        self._received = b""

    def send(self, *frames: bytes) -> None:
        self.socket.send(b"".join(struct.pack(">I", len(frame)) + frame for frame in frames))

    def frames(self) -> list[bytes]:
        """The frames that have arrived."""
        try:
            while data := self.socket.recv(1 << 20):
                self._received += data
        except BlockingIOError:
            pass
        found = []
        while len(self._received) >= 4:
            end = 4 + int.from_bytes(self._received[:4], "big")
            if len(self._received) < end:
                break
            found.append(self._received[4:end])
            self._received = self._received[end:]
        return found

    def close(self) -> None:
        self.socket.close()


class Plugged:
    """A device on a wire, with its loop in the test's hands."""

    def __init__(self, *, ram_bytes: int = 1 << 20, mtu: int = 1500) -> None:
        self.peer = Peer()
        self.net = Net(StreamLink(self.peer.ours, "pair"), mac=MAC, mtu=mtu)
        assert isinstance(self.net._loop, ManualLoop)
        self.loop = self.net._loop
        self.rig = Rig(self.net, ram_bytes=ram_bytes)

    def close(self) -> None:
        self.rig.device.close()
        self.peer.close()


@pytest.fixture
def plugged(monkeypatch: pytest.MonkeyPatch) -> Iterator[Plugged]:
    monkeypatch.setattr(net, "Loop", ManualLoop)
    plugged = Plugged()
    yield plugged
    plugged.close()


def room_for_frames(driver: Driver, count: int, room: int = 1526) -> None:
    for _ in range(count):
        driver.add(writable=[room], queue=RECEIVE)
    driver.notify(RECEIVE)


def received(driver: Driver) -> list[bytes]:
    frames = []
    for used in driver.collect(RECEIVE):
        assert used.data[:12] == RECEIVED_HEADER
        frames.append(used.data[12 : used.length])
    return frames


def test_what_the_guest_sends(plugged: Plugged) -> None:
    driver = Driver(plugged.rig)
    for frame in (ANSWER, ANSWER + bytes(1486)):
        assert driver.request([NO_HEADER, frame], queue=TRANSMIT).length == 0
        assert plugged.peer.frames() == [frame]
    # Header and frame in one piece, and a frame without its Ethernet header, which is lost.
    driver.request([NO_HEADER + ANSWER], queue=TRANSMIT)
    driver.request([NO_HEADER + ANSWER[:13]], queue=TRANSMIT)
    assert plugged.peer.frames() == [ANSWER]


def test_what_the_guest_receives(plugged: Plugged) -> None:
    driver = Driver(plugged.rig)
    room_for_frames(driver, 3)
    plugged.peer.send(FRAME, FRAME + b"2")
    plugged.loop.settle()
    assert received(driver) == [FRAME, FRAME + b"2"]
    assert driver.acknowledge() == mmio.INTERRUPT_USED
    assert plugged.rig.wire.raised == 1


def test_frames_wait_for_buffers(plugged: Plugged) -> None:
    driver = Driver(plugged.rig)
    plugged.peer.send(*(FRAME + bytes([n]) for n in range(5)))
    plugged.loop.settle()
    for count in (1, 3):
        room_for_frames(driver, count)
    frames = received(driver)
    assert frames == [FRAME + bytes([n]) for n in range(4)]
    plugged.peer.send(FRAME)
    plugged.loop.settle()
    room_for_frames(driver, 2)
    plugged.loop.settle()
    assert received(driver) == [FRAME + b"\x04", FRAME]


def test_a_frame_in_pieces_and_many_in_one(plugged: Plugged) -> None:
    driver = Driver(plugged.rig)
    room_for_frames(driver, 4)
    stream = b"".join(struct.pack(">I", len(FRAME)) + FRAME for _ in range(4))
    for at in (0, 3, 7, 40, len(stream)):
        plugged.peer.socket.send(stream[:at])
        stream = stream[at:]
        plugged.loop.settle()
    assert received(driver) == [FRAME] * 4


def test_nothing_is_taken_before_the_driver_is_up(plugged: Plugged) -> None:
    driver = Driver(plugged.rig, start=False)
    plugged.peer.send(FRAME)
    assert not plugged.loop.look()
    driver.start()
    room_for_frames(driver, 1)
    plugged.loop.settle()
    assert received(driver) == [FRAME]
    driver.write(mmio.STATUS, 0)
    plugged.peer.send(FRAME)
    assert not plugged.loop.look()


def test_a_frame_that_fits_no_buffer_is_lost(plugged: Plugged) -> None:
    driver = Driver(plugged.rig)
    room_for_frames(driver, 1, room=100)
    plugged.peer.send(bytes(89), bytes(88), b"short")
    plugged.loop.settle()
    assert received(driver) == [bytes(88)]
    assert plugged.net.lost == 1


def test_configuration(plugged: Plugged) -> None:
    driver = Driver(plugged.rig)
    read = plugged.rig.device.read
    assert bytes(read(mmio.CONFIG + n, 1) for n in range(6)) == MAC
    assert read(mmio.CONFIG + 6, 2) == net.S_LINK_UP
    assert read(mmio.CONFIG + 10, 2) == 1500
    assert driver.features & (net.F_MAC | net.F_STATUS | net.F_MTU)


def test_a_closed_socket_takes_the_link_down(plugged: Plugged) -> None:
    driver = Driver(plugged.rig)
    room_for_frames(driver, 2)
    plugged.peer.send(FRAME)
    plugged.peer.close()
    plugged.loop.settle()
    assert received(driver) == [FRAME]
    assert driver.acknowledge() == mmio.INTERRUPT_USED | mmio.INTERRUPT_CONFIG
    assert plugged.rig.device.read(mmio.CONFIG + 6, 2) == 0
    assert not plugged.rig.needs_reset
    assert "virtio-net (slot 0): the socket pair is gone (closed): " in plugged.rig.report()
    assert driver.request([NO_HEADER + ANSWER], queue=TRANSMIT).length == 0
    assert len(plugged.rig.faults.lines()) == 1


def test_a_closed_socket_is_found_by_sending(plugged: Plugged) -> None:
    driver = Driver(plugged.rig)
    plugged.peer.close()
    driver.request([NO_HEADER + ANSWER], queue=TRANSMIT)
    assert not plugged.net.link_up
    assert driver.acknowledge() == mmio.INTERRUPT_USED | mmio.INTERRUPT_CONFIG
    assert "gone (Broken pipe)" in plugged.rig.report()


def test_a_peer_that_speaks_nonsense_is_gone(plugged: Plugged) -> None:
    driver = Driver(plugged.rig)
    plugged.peer.socket.send(struct.pack(">I", MAX_FRAME + 1))
    plugged.loop.settle()
    assert not plugged.net.link_up
    assert "announced a frame of 65550 bytes" in plugged.rig.report()
    room_for_frames(driver, 1)
    assert not plugged.rig.needs_reset


def test_a_peer_that_does_not_read_holds_nobody_up(plugged: Plugged) -> None:
    driver = Driver(plugged.rig)
    frame = ANSWER + bytes(60_000)
    sent = 2 * MAX_QUEUED // len(frame) + 20
    for _ in range(sent):
        driver.request([NO_HEADER + frame], queue=TRANSMIT)
    link = plugged.net._link
    assert isinstance(link, StreamLink)
    assert len(link._kept) <= MAX_QUEUED + len(frame)
    got = []
    while frames := plugged.peer.frames():
        got += frames
        plugged.loop.settle()
    assert 0 < len(got) < sent
    assert set(got) == {frame}
    driver.request([NO_HEADER + ANSWER], queue=TRANSMIT)
    assert plugged.peer.frames() == [ANSWER]


@pytest.mark.parametrize(
    ("readable", "writable", "queue"),
    [
        ([b"short"], [], TRANSMIT),
        ([bytes(MAX_FRAME + 13)], [], TRANSMIT),
        ([], [25], RECEIVE),
        ([NO_HEADER + ANSWER], [], RECEIVE),
    ],
)
def test_buffers_that_make_no_sense_break_the_device(
    plugged: Plugged, readable: list[bytes], writable: list[int], queue: int
) -> None:
    driver = Driver(plugged.rig)
    driver.add(readable, writable, queue)
    driver.notify(queue)
    plugged.peer.send(FRAME)
    plugged.loop.settle()
    assert plugged.rig.needs_reset
    driver = Driver(plugged.rig)
    room_for_frames(driver, 2)
    plugged.peer.send(FRAME)
    plugged.loop.settle()
    assert FRAME in received(driver)


def test_with_its_own_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer()
    device = Net(StreamLink(peer.ours, "pair"))
    rig = Rig(device)
    raised: SimpleQueue[bool] = SimpleQueue()
    monkeypatch.setattr(rig.wire, "set", raised.put)
    driver = Driver(rig)
    room_for_frames(driver, 1)
    peer.send(FRAME)
    while not raised.get(timeout=30):
        pass
    assert received(driver) == [FRAME]
    rig.device.close()
    rig.device.close()
    peer.close()


@settings(max_examples=100, deadline=None)
@given(plan=plans(2, st.builds(bytes.__add__, st.just(NO_HEADER), st.binary(max_size=60))))
def test_a_driver_that_does_anything(plan: Plan) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(net, "Loop", ManualLoop)
        plugged = Plugged(ram_bytes=RAM_BYTES)

        def receive(data: bytes) -> None:
            plugged.peer.frames()
            plugged.peer.send(FRAME + data)
            plugged.loop.settle()

        patch.setattr(plugged.net, "receive", receive, raising=False)
        try:
            attack(plugged.rig, plan)
            assert SECRET[:32] not in b"".join(plugged.peer.frames())
        finally:
            plugged.close()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.binary(min_size=14, max_size=200), max_size=12),
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
    st.booleans(),
)
def test_frames_go_both_ways_in_order(
    frames: list[bytes], buffers: list[int], indirect: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(net, "Loop", ManualLoop)
        plugged = Plugged()
        try:
            driver = Driver(plugged.rig, indirect=indirect, size=64)
            got = []
            for n, frame in enumerate(frames):
                plugged.peer.send(frame)
                driver.request([NO_HEADER, frame], queue=TRANSMIT)
                plugged.loop.settle()
                room_for_frames(driver, buffers[n % len(buffers)], room=300)
                plugged.loop.settle()
                got += received(driver)
            assert got == frames[: len(got)]
            assert plugged.peer.frames() == frames
        finally:
            plugged.close()


@pytest.mark.parametrize(
    "text", ["", "02:00:00:00:00", "01:00:00:00:00:01", "00:00:00:00:00:00", "02-00-00-00-00-01"]
)
def test_what_is_no_mac_address(text: str) -> None:
    with pytest.raises(LoadError, match=r"MAC address"):
        parse_mac(text)


def test_mac_addresses() -> None:
    assert parse_mac("52:54:00:Ab:cD:ef") == bytes.fromhex("525400abcdef")
    one, other = default_mac("tap0"), default_mac("tap1")
    assert one != other
    assert one == default_mac("tap0")
    assert one[0] == other[0] == 2
