# SPDX-License-Identifier: GPL-2.0-or-later
"""virtio-vsock with real Unix sockets: both ways to connect, credit, ends, and hostile drivers."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fakes.hostile_driver import RAM_BYTES, SECRET, Plan, attack, plans
from fakes.manual_loop import ManualLoop
from fakes.virtio_driver import Driver, Rig
from pkvm.vmm.errors import LoadError
from pkvm.vmm.virtio import mmio, vsock
from pkvm.vmm.virtio.vsock import FIRST_HOST_PORT, MAX_STRAYS, MAX_STREAMS, RECEIVE, TRANSMIT, Vsock
from pkvm.vmm.virtio.vsock_packet import (
    HEADER_BYTES,
    HOST_CID,
    SHUTDOWN_BOTH,
    SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND,
    TYPE_STREAM,
    Header,
    Op,
)
from pkvm.vmm.virtio.vsock_stream import BUFFER_BYTES

CID = 42
ROOM = 1 << 16
"""`buf_alloc` of the guest."""
GUEST_PORT, HOST_PORT = 1024, 5000
PACKET = 4096


class Packet(NamedTuple):
    header: Header
    data: bytes

    @property
    def op(self) -> Op:
        return Op(self.header.op)


class Guest:
    """The guest's side, with the device's loop in the test's hands."""

    def __init__(self, path: Path, *, ram_bytes: int = 8 << 20, buffers: int = 16) -> None:
        self.path = path
        self.device = Vsock(CID, str(path))
        assert isinstance(self.device._loop, ManualLoop)
        self.loop = self.device._loop
        self.rig = Rig(self.device, ram_bytes=ram_bytes)
        self.buffers = buffers
        self.forwarded = 0
        """`fwd_cnt` that the guest says."""
        self.start()

    def start(self) -> None:
        self.driver = Driver(self.rig, size=64)
        self._mark = self.driver.free_at
        self.give(self.buffers)

    def give(self, count: int, room: int = HEADER_BYTES + PACKET) -> None:
        """Receive buffers for the device."""
        for _ in range(count):
            self.driver.add(writable=[room], queue=RECEIVE)
        self.driver.notify(RECEIVE)

    def send(
        self,
        op: int,
        data: bytes = b"",
        *,
        guest_port: int = GUEST_PORT,
        host_port: int = HOST_PORT,
        flags: int = 0,
        cid: int = CID,
        to: int = HOST_CID,
        kind: int = TYPE_STREAM,
        room: int = ROOM,
        forwarded: int | None = None,
    ) -> None:
        header = Header(
            cid, to, guest_port, host_port, len(data), kind, op, flags, room,
            self.forwarded if forwarded is None else forwarded,
        )  # fmt: skip
        parts = [header.pack(), data] if data else [header.pack()]
        self.driver.request(parts, queue=TRANSMIT)

    def take(self) -> list[Packet]:
        """What the device sent, its loop having run; its buffers are replaced."""
        found = []
        self.loop.settle()
        while back := self.driver.collect(RECEIVE):
            for used in back:
                header = Header.unpack(used.data[:HEADER_BYTES])
                assert used.length == HEADER_BYTES + header.length
                found.append(Packet(header, used.data[HEADER_BYTES : used.length]))
            self.give(len(back))
            self.loop.settle()
        return found

    def take_ops(self) -> list[Op]:
        return [packet.op for packet in self.take()]

    def close(self) -> None:
        self.rig.device.close()


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guest]:
    monkeypatch.setattr(vsock, "Loop", ManualLoop)
    guest = Guest(tmp_path / "v")
    yield guest
    guest.close()


def unix() -> socket.socket:
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    found.settimeout(30)
    return found


@pytest.fixture
def service(guest: Guest) -> Iterator[socket.socket]:
    """A listener on the host at the socket of port HOST_PORT."""
    with unix() as listener:
        listener.bind(f"{guest.path}_{HOST_PORT}")
        listener.listen()
        yield listener


@pytest.fixture
def server(guest: Guest, service: socket.socket) -> Iterator[socket.socket]:
    """The host's end of a connection that the guest opened."""
    guest.send(Op.REQUEST)
    (packet,) = guest.take()
    assert packet.op is Op.RESPONSE
    server, _ = service.accept()
    server.settimeout(30)
    with server:
        yield server


@pytest.fixture
def caller(guest: Guest) -> Iterator[socket.socket]:
    with unix() as caller:
        caller.connect(str(guest.path))
        yield caller


def received(sender: socket.socket) -> bytes:
    """What has arrived at a socket, without waiting."""
    sender.setblocking(False)
    data = b""
    try:
        while part := sender.recv(1 << 20):
            data += part
    except BlockingIOError:
        pass
    sender.settimeout(30)
    return data


def at_its_end(end: socket.socket) -> bool:
    return end.recv(1) == b""


# Connections that the guest opens


def test_the_guest_connects_to_a_port_of_the_host(guest: Guest, server: socket.socket) -> None:
    guest.send(Op.RW, b"to the host")
    assert server.recv(100) == b"to the host"
    server.send(b"to the guest")
    (packet,) = guest.take()
    assert packet.op is Op.RW
    assert packet.data == b"to the guest"
    header = packet.header
    assert (header.src_cid, header.dst_cid) == (HOST_CID, CID)
    assert (header.src_port, header.dst_port) == (HOST_PORT, GUEST_PORT)
    assert (header.buf_alloc, header.fwd_cnt) == (BUFFER_BYTES, len("to the host"))


def test_nobody_listens(guest: Guest) -> None:
    guest.send(Op.REQUEST)
    (packet,) = guest.take()
    assert packet.op is Op.RST
    assert (packet.header.src_port, packet.header.dst_port) == (HOST_PORT, GUEST_PORT)
    assert guest.rig.faults.lines() == []


@pytest.mark.parametrize(("to", "kind"), [(3, TYPE_STREAM), (HOST_CID, 2)])
def test_other_contexts_and_types_are_refused(
    guest: Guest, service: socket.socket, to: int, kind: int
) -> None:
    guest.send(Op.REQUEST, to=to, kind=kind)
    (packet,) = guest.take()
    assert packet.op is Op.RST
    assert packet.header.src_cid == to
    assert packet.header.type == kind
    guest.send(Op.RST, to=to, kind=kind)
    assert guest.take() == []


def test_packets_of_another_guest_are_dropped(guest: Guest, service: socket.socket) -> None:
    guest.send(Op.REQUEST, cid=CID + 1)
    assert guest.take() == []


@pytest.mark.parametrize("op", [Op.RESPONSE, Op.SHUTDOWN, Op.RW, Op.CREDIT_UPDATE, 0, 99])
def test_packets_of_no_connection_are_answered_with_rst(guest: Guest, op: int) -> None:
    guest.send(op)
    assert guest.take_ops() == [Op.RST]
    guest.send(Op.RST)
    assert guest.take() == []


@pytest.mark.parametrize("op", [Op.REQUEST, Op.RESPONSE, 0, 99])
def test_a_packet_out_of_place_ends_the_connection(
    guest: Guest, server: socket.socket, op: int
) -> None:
    guest.send(op)
    assert guest.take_ops() == [Op.RST]
    assert at_its_end(server)
    guest.send(Op.RW, b"x")
    assert guest.take_ops() == [Op.RST]


def test_the_guest_resets(guest: Guest, server: socket.socket) -> None:
    guest.send(Op.RST)
    assert at_its_end(server)
    assert guest.take() == []


# Connections that the host opens


def open_by_host(guest: Guest, caller: socket.socket, after: bytes = b"") -> int:
    """The host's port of a connection by CONNECT."""
    caller.send(b"CONNECT %d\n" % GUEST_PORT + after)
    (packet,) = guest.take()
    assert packet.op is Op.REQUEST
    assert packet.header.dst_port == GUEST_PORT
    host_port = packet.header.src_port
    guest.send(Op.RESPONSE, host_port=host_port)
    assert caller.recv(100) == b"OK %d\n" % host_port
    return host_port


def test_the_host_connects_to_a_port_of_the_guest(guest: Guest, caller: socket.socket) -> None:
    host_port = open_by_host(guest, caller, after=b"and at once")
    assert host_port >= FIRST_HOST_PORT
    (packet,) = guest.take()
    assert packet.data == b"and at once"
    guest.send(Op.RW, b"answer", host_port=host_port)
    assert caller.recv(100) == b"answer"


def test_a_greeting_may_come_in_pieces(guest: Guest, caller: socket.socket) -> None:
    for piece in (b"con", b"nect", b" 77", b"\r"):
        caller.send(piece)
        assert guest.take() == []
    caller.send(b"\n")
    (packet,) = guest.take()
    assert packet.header.dst_port == 77


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n",
        b"CONNECT\n",
        b"CONNECT x\n",
        b"CONNECT 4294967296\n",
        b"x" * 40,
        b"\n",
    ],
)
def test_who_says_something_else_is_hung_up_on(
    guest: Guest, caller: socket.socket, said: bytes
) -> None:
    caller.send(said)
    assert guest.take() == []
    with pytest.raises(ConnectionResetError) if len(said) > 32 else nullcontext():
        assert at_its_end(caller)


def test_who_leaves_before_greeting_is_forgotten(guest: Guest, caller: socket.socket) -> None:
    guest.loop.settle()
    caller.send(b"CONN")
    guest.loop.settle()
    caller.close()
    assert guest.take() == []
    assert not guest.device._callers


def test_the_guest_refuses(guest: Guest, caller: socket.socket) -> None:
    caller.send(b"CONNECT 1\n")
    (packet,) = guest.take()
    guest.send(Op.RST, guest_port=1, host_port=packet.header.src_port)
    assert at_its_end(caller)


def test_callers_wait_until_the_driver_is_up(guest: Guest) -> None:
    guest.driver.write(mmio.STATUS, 0)
    with unix() as caller:
        caller.connect(str(guest.path))
        caller.send(b"CONNECT 1\n")
        guest.loop.settle()
        guest.start()
        assert guest.take_ops() == [Op.REQUEST]


def test_data_before_the_connection_is_open_ends_it(guest: Guest, caller: socket.socket) -> None:
    caller.send(b"CONNECT 1\n")
    (packet,) = guest.take()
    guest.send(Op.RW, b"early", guest_port=1, host_port=packet.header.src_port)
    assert guest.take_ops() == [Op.RST]
    assert at_its_end(caller)


# Credit


def test_the_device_keeps_to_the_guests_credit(guest: Guest, server: socket.socket) -> None:
    server.setblocking(False)
    sent = 0
    while sent < 2 * ROOM:
        try:
            sent += server.send(bytes(ROOM))
        except BlockingIOError:
            pass
        packets = guest.take()
        if not packets:
            break
    got = sum(packet.header.length for packet in packets)
    assert got <= ROOM
    got = ROOM
    # With the credit used up it asks for more, once.
    guest.send(Op.CREDIT_UPDATE, forwarded=1000)
    packets = guest.take()
    assert [packet.op for packet in packets] == [Op.RW, Op.CREDIT_REQUEST]
    assert packets[0].header.length == 1000
    guest.send(Op.CREDIT_UPDATE, forwarded=1000)
    assert guest.take() == []
    guest.send(Op.CREDIT_UPDATE, forwarded=1000, room=ROOM + 7)
    packets = guest.take()
    assert [packet.header.length for packet in packets] == [7, 0]


def test_credit_that_makes_no_sense_is_none(guest: Guest, server: socket.socket) -> None:
    guest.send(Op.CREDIT_UPDATE, forwarded=5000)
    server.send(b"x")
    assert guest.take() == []
    guest.send(Op.CREDIT_UPDATE, forwarded=0, room=0)
    assert guest.take() == []
    guest.send(Op.CREDIT_UPDATE, forwarded=0)
    assert guest.take_ops() == [Op.RW]


def test_the_guest_is_told_of_room_that_became_free(guest: Guest, server: socket.socket) -> None:
    guest.send(Op.CREDIT_REQUEST)
    (packet,) = guest.take()
    assert (packet.op, packet.header.fwd_cnt) == (Op.CREDIT_UPDATE, 0)
    for _ in range(7):
        guest.send(Op.RW, bytes(4096))
    assert guest.take() == []
    guest.send(Op.RW, bytes(4096))
    (packet,) = guest.take()
    assert (packet.op, packet.header.fwd_cnt) == (Op.CREDIT_UPDATE, 8 * 4096)
    assert len(received(server)) == 8 * 4096


def test_what_the_host_does_not_read_is_kept_within_the_credit(
    guest: Guest, server: socket.socket
) -> None:
    sent = 0
    forwarded = 0
    while True:
        if sent + 4096 - forwarded > BUFFER_BYTES:
            break
        guest.send(Op.RW, sent.to_bytes(4, "little") * 1024)
        sent += 4096
        for packet in guest.take():
            forwarded = packet.header.fwd_cnt
    (stream,) = guest.device._streams.values()
    assert 0 < len(stream._kept) <= BUFFER_BYTES
    got = b""
    while len(got) < sent:
        got += received(server)
        guest.take()
    assert got == b"".join(n.to_bytes(4, "little") * 1024 for n in range(0, sent, 4096))
    guest.send(Op.CREDIT_REQUEST)
    (packet,) = guest.take()
    assert packet.header.fwd_cnt == sent


def test_more_than_the_credit_ends_the_connection(guest: Guest, server: socket.socket) -> None:
    ops: list[Op] = []
    for _ in range(200):
        guest.send(Op.RW, bytes(60_000))
        ops += guest.take_ops()
        if Op.RST in ops:
            break
    assert ops[-1] is Op.RST
    assert "sent more than 131072 bytes ahead" in guest.rig.report()
    assert not guest.rig.needs_reset
    assert not guest.device._streams


# Ends


def test_the_host_ends_its_half(guest: Guest, server: socket.socket) -> None:
    server.send(b"last words")
    server.shutdown(socket.SHUT_WR)
    packets = guest.take()
    assert [packet.op for packet in packets] == [Op.RW, Op.SHUTDOWN]
    assert packets[1].header.flags == SHUTDOWN_SEND
    guest.send(Op.RW, b"still heard")
    assert server.recv(100) == b"still heard"
    guest.send(Op.SHUTDOWN, flags=SHUTDOWN_BOTH)
    assert guest.take_ops() == [Op.RST]
    assert at_its_end(server)


def test_the_host_hangs_up(guest: Guest, server: socket.socket) -> None:
    server.send(b"bye")
    server.close()
    packets = guest.take()
    assert [packet.op for packet in packets] == [Op.RW, Op.SHUTDOWN]
    assert packets[1].header.flags == SHUTDOWN_BOTH
    guest.send(Op.RST)
    assert guest.take() == []
    assert not guest.device._streams


def test_the_guest_ends_its_half(guest: Guest, server: socket.socket) -> None:
    guest.send(Op.RW, b"last words")
    guest.send(Op.SHUTDOWN, flags=SHUTDOWN_SEND)
    assert server.recv(100) == b"last words"
    assert at_its_end(server)
    server.send(b"still heard")
    (packet,) = guest.take()
    assert packet.data == b"still heard"
    guest.send(Op.RW, b"too late")
    guest.send(Op.SHUTDOWN, flags=SHUTDOWN_RECEIVE)
    assert guest.take_ops() == [Op.RST]


def test_the_guest_will_not_receive(guest: Guest, server: socket.socket) -> None:
    guest.send(Op.SHUTDOWN, flags=SHUTDOWN_RECEIVE)
    with pytest.raises(BrokenPipeError):
        server.send(b"in vain")
    guest.send(Op.RW, b"words")
    assert server.recv(100) == b"words"
    assert guest.take() == []


def test_a_guest_that_leaves_is_heard_to_the_end(guest: Guest, server: socket.socket) -> None:
    for _ in range(BUFFER_BYTES // 4096):
        guest.send(Op.RW, bytes(4096))
    guest.take()
    guest.send(Op.SHUTDOWN, flags=SHUTDOWN_BOTH)
    got = 0
    while part := server.recv(1 << 20):
        got += len(part)
        guest.loop.settle()
    assert got == BUFFER_BYTES
    assert guest.take_ops() == [Op.RST]


def test_a_host_that_hangs_up_on_data_resets(guest: Guest, server: socket.socket) -> None:
    server.close()
    guest.send(Op.RW, b"x")
    assert Op.RST in guest.take_ops()
    assert not guest.device._streams


# Limits


def test_answers_wait_for_buffers_and_are_bounded(guest: Guest) -> None:
    guest.take()
    device = guest.device
    driver = guest.driver
    # Not one buffer more: those that are there are used up first.
    for _ in range(3 * MAX_STRAYS):
        header = Header(CID, HOST_CID, 1, 1, 0, TYPE_STREAM, Op.RW, 0, 0, 0)
        mark = driver.free_at
        driver.add([header.pack()], queue=TRANSMIT)
        driver.notify(TRANSMIT)
        if not driver.collect(TRANSMIT):
            break
        driver.free_at = mark
    assert len(device._strays) == MAX_STRAYS
    ops = guest.take_ops()
    assert set(ops) == {Op.RST}
    assert len(ops) == guest.buffers + MAX_STRAYS + 1
    assert not device._strays


def test_there_are_only_so_many_connections(guest: Guest, service: socket.socket) -> None:
    ends = []
    service.listen(MAX_STREAMS + 1)
    for port in range(MAX_STREAMS + 1):
        guest.send(Op.REQUEST, guest_port=port)
        (packet,) = guest.take()
        if packet.op is Op.RST:
            break
        ends.append(service.accept()[0])
    assert len(ends) == MAX_STREAMS
    with unix() as caller:
        caller.connect(str(guest.path))
        guest.loop.settle()
        assert at_its_end(caller)
    for end in ends:
        end.close()
    guest.take()


def test_a_reset_ends_every_connection(guest: Guest, server: socket.socket) -> None:
    with unix() as caller:
        caller.connect(str(guest.path))
        guest.loop.settle()
        guest.driver.write(mmio.STATUS, 0)
        assert at_its_end(server)
        assert at_its_end(caller)
    guest.start()
    guest.send(Op.RW, b"x")
    assert guest.take_ops() == [Op.RST]


@pytest.mark.parametrize("length", [0, 10, HEADER_BYTES - 1])
def test_bad_headers_break_the_device(guest: Guest, length: int) -> None:
    guest.driver.request([bytes(length or 1)], queue=TRANSMIT)
    assert guest.rig.needs_reset
    guest.start()
    guest.send(Op.RW, b"x")
    assert guest.take_ops() == [Op.RST]


def test_a_packet_shorter_than_it_says(guest: Guest) -> None:
    header = Header(CID, HOST_CID, 1, 1, 5, TYPE_STREAM, Op.RW, 0, 0, 0)
    guest.driver.request([header.pack(), b"four"], queue=TRANSMIT)
    assert guest.rig.needs_reset
    assert "5 bytes, and has not" in guest.rig.report()


def test_a_receive_buffer_without_room(guest: Guest) -> None:
    guest.driver.write(mmio.STATUS, 0)
    guest.buffers = 0
    guest.start()
    guest.give(1, room=HEADER_BYTES)
    guest.send(Op.RW, b"x")
    assert guest.rig.needs_reset
    assert "queue rx" in guest.rig.report()


# The socket


def test_the_socket_is_removed_at_the_end(guest: Guest) -> None:
    assert guest.path.is_socket()
    guest.close()
    guest.close()
    assert not guest.path.exists()


def test_a_socket_that_was_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "v"
    with unix() as left:
        left.bind(str(path))
    Vsock(CID, str(path)).close()
    with unix() as used:
        used.bind(str(path))
        used.listen()
        with pytest.raises(LoadError, match="in use"):
            Vsock(CID, str(path))
    assert path.is_socket()


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "v"
    path.write_text("mine")
    with pytest.raises(LoadError, match="in use"):
        Vsock(CID, str(path))
    assert path.read_text() == "mine"
    with pytest.raises(LoadError, match="No such file"):
        Vsock(CID, str(tmp_path / "none" / "v"))
    with pytest.raises(LoadError, match="too long"):
        Vsock(CID, str(tmp_path / ("x" * 200)))


@pytest.mark.parametrize("cid", [0, 1, 2, 0xFFFF_FFFF, 1 << 40])
def test_bad_context_ids(tmp_path: Path, cid: int) -> None:
    with pytest.raises(LoadError, match="context id"):
        Vsock(cid, str(tmp_path / "v"))


def test_the_configuration_has_the_context_id(guest: Guest) -> None:
    assert guest.rig.device.read(mmio.CONFIG, 8) == CID


def test_with_its_own_thread(tmp_path: Path) -> None:
    device = Vsock(CID, str(tmp_path / "v"))
    rig = Rig(device)
    driver = Driver(rig)
    for _ in range(4):
        driver.add(writable=[HEADER_BYTES + 100], queue=RECEIVE)
    driver.notify(RECEIVE)
    with unix() as caller:
        caller.connect(str(tmp_path / "v"))
        caller.send(b"CONNECT 9\nhello")
        while not (back := driver.collect(RECEIVE)):
            pass
        header = Header.unpack(back[0].data[:HEADER_BYTES])
        answer = Header(CID, HOST_CID, 9, header.src_port, 0, TYPE_STREAM, Op.RESPONSE, 0, ROOM, 0)
        driver.request([answer.pack()], queue=TRANSMIT)
        assert caller.recv(100) == b"OK %d\n" % header.src_port
        while not (back := driver.collect(RECEIVE)):
            pass
        assert back[0].data[HEADER_BYTES : back[0].length] == b"hello"
        rig.device.close()
        assert at_its_end(caller)


# Anything

_ports = st.sampled_from([GUEST_PORT, GUEST_PORT + 1, FIRST_HOST_PORT, 0, 0xFFFF_FFFF])
_headers = st.builds(
    Header,
    st.sampled_from([CID, CID, CID, 1]),
    st.sampled_from([HOST_CID, HOST_CID, HOST_CID, CID]),
    _ports,
    st.sampled_from([HOST_PORT, HOST_PORT, FIRST_HOST_PORT, 1]),
    st.sampled_from([0, 0, 1, 16, 1000, 0xFFFF_FFFF]),
    st.sampled_from([TYPE_STREAM, TYPE_STREAM, TYPE_STREAM, 2]),
    st.integers(0, 8),
    st.integers(0, 3),
    st.sampled_from([0, 1, ROOM, 0xFFFF_FFFF]),
    st.sampled_from([0, 1, 0xFFFF_FFFF]),
).map(Header.pack)


@settings(max_examples=100, deadline=None)
@given(plan=plans(3, _headers))
def test_a_driver_that_does_anything(tmp_path_factory: pytest.TempPathFactory, plan: Plan) -> None:
    path = tmp_path_factory.mktemp("v") / "v"
    with pytest.MonkeyPatch.context() as patch, unix() as listener:
        patch.setattr(vsock, "Loop", ManualLoop)
        listener.bind(f"{path}_{HOST_PORT}")
        listener.listen(128)
        listener.setblocking(False)
        device = Vsock(CID, str(path))
        loop = device._loop
        assert isinstance(loop, ManualLoop)
        ends: list[socket.socket] = []
        heard = bytearray()

        def receive(data: bytes) -> None:
            try:
                ends.append(listener.accept()[0])
            except BlockingIOError:
                pass
            if len(ends) % 3 == 0:
                ends.append(unix())
                ends[-1].connect(str(path))
            for end in ends:
                try:
                    end.send(b"CONNECT 1024\n" + data)
                    heard.extend(received(end))
                except OSError:
                    pass
            loop.settle()

        patch.setattr(device, "receive", receive, raising=False)
        try:
            attack(Rig(device, ram_bytes=RAM_BYTES), plan)
            for end in ends:
                try:
                    heard.extend(received(end))
                except OSError:
                    pass
            assert SECRET[:32] not in heard
            assert len(device._strays) <= MAX_STRAYS
        finally:
            device.close()
            for end in ends:
                end.close()


class Conversations(RuleBasedStateMachine):
    """Several connections, both ways, with buffers and credit in any order: every byte arrives
    once and in order, and what the device keeps stays bounded."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(vsock, "Loop", ManualLoop)
        path = Path(self.folder.name) / "v"
        self.guest = Guest(path, buffers=2, ram_bytes=4 << 20)
        self.listener = unix()
        self.listener.bind(f"{path}_{HOST_PORT}")
        self.listener.listen(16)
        self.ends: dict[int, socket.socket] = {}
        self.to_host: dict[int, bytearray] = {}
        self.to_guest: dict[int, bytearray] = {}
        self.at_host: dict[int, bytearray] = {}
        self.at_guest: dict[int, bytearray] = {}
        self.device_forwarded: dict[int, int] = {}
        self.device_room: dict[int, int] = {}

    def teardown(self) -> None:
        for _ in range(2000):
            if not self._move():
                break
        for port in self.ends:
            assert self.at_guest[port] == self.to_guest[port]
            assert self.at_host[port] == self.to_host[port]
            self.ends[port].close()
        self.guest.close()
        self.listener.close()
        self.patch.undo()
        self.folder.cleanup()

    @precondition(lambda self: len(self.ends) < 4)
    @rule()
    def connect(self) -> None:
        port = GUEST_PORT + len(self.ends)
        self.to_host[port], self.to_guest[port] = bytearray(), bytearray()
        self.at_host[port], self.at_guest[port] = bytearray(), bytearray()
        self.device_forwarded[port] = self.device_room[port] = 0
        self.guest.send(Op.REQUEST, guest_port=port, room=3000)
        self.ends[port] = self.listener.accept()[0]
        self._take()
        assert self.device_room[port] == BUFFER_BYTES

    @precondition(lambda self: self.ends)
    @rule(which=st.integers(0, 3), length=st.integers(1, 40_000))
    def host_says(self, which: int, length: int) -> None:
        port = GUEST_PORT + which % len(self.ends)
        end = self.ends[port]
        data = bytes((len(self.to_guest[port]) + n) % 251 for n in range(length))
        end.setblocking(False)
        try:
            sent = end.send(data)
        except BlockingIOError:
            sent = 0
        self.to_guest[port] += data[:sent]

    @precondition(lambda self: self.ends)
    @rule(which=st.integers(0, 3), length=st.integers(1, 60_000))
    def guest_says(self, which: int, length: int) -> None:
        port = GUEST_PORT + which % len(self.ends)
        sent = len(self.to_host[port])
        credit = self.device_room[port] - (sent - self.device_forwarded[port])
        length = min(length, credit)
        if not length:
            return
        data = bytes((sent + n) % 241 for n in range(length))
        self.to_host[port] += data
        self._say(port, Op.RW, data)

    @precondition(lambda self: self.ends)
    @rule(which=st.integers(0, 3))
    def host_reads(self, which: int) -> None:
        port = GUEST_PORT + which % len(self.ends)
        self.at_host[port] += received(self.ends[port])

    @precondition(lambda self: self.ends)
    @rule(which=st.integers(0, 3))
    def guest_gives_credit(self, which: int) -> None:
        self._say(GUEST_PORT + which % len(self.ends), Op.CREDIT_UPDATE)

    @rule()
    def guest_takes(self) -> None:
        self._take()

    @invariant()
    def what_the_device_keeps_is_bounded(self) -> None:
        for stream in self.guest.device._streams.values():
            assert len(stream._kept) <= BUFFER_BYTES
        assert self.guest.rig.faults.lines() == []

    def _say(self, port: int, op: Op, data: bytes = b"") -> None:
        taken = len(self.at_guest[port])
        self.guest.send(op, data, guest_port=port, room=3000, forwarded=taken)

    def _take(self) -> bool:
        found = self.guest.take()
        for packet in found:
            port = packet.header.dst_port
            assert packet.op in (Op.RW, Op.RESPONSE, Op.CREDIT_UPDATE, Op.CREDIT_REQUEST)
            self.device_forwarded[port] = packet.header.fwd_cnt
            self.device_room[port] = packet.header.buf_alloc
            self.at_guest[port] += packet.data
            assert len(packet.data) <= 3000
        return bool(found)

    def _move(self) -> bool:
        moved = self._take()
        for port in self.ends:
            self._say(port, Op.CREDIT_UPDATE)
            got = received(self.ends[port])
            self.at_host[port] += got
            moved |= bool(got)
        return self._take() or moved


TestConversations = Conversations.TestCase
TestConversations.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
