# SPDX-License-Identifier: GPL-2.0-or-later
"""Wires of virtio-net: a real TAP interface, a real passt, and what cannot be had."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.manual_loop import ManualLoop
from fakes.virtio_driver import Driver, Rig
from pkvm.vmm.errors import LoadError
from pkvm.vmm.virtio import net
from pkvm.vmm.virtio.links import LinkError, StreamLink, Tap
from pkvm.vmm.virtio.net import RECEIVE, TRANSMIT, Net

MAC = bytes.fromhex("020000000001")
EXPERIMENT = 0x88B5
"""An EtherType for local experiments (IEEE 802)."""
FRAME = bytes.fromhex("ffffffffffff 020000000001 88b5") + bytes(range(50))
PATIENCE_S = 30


def can_make_tap() -> bool:
    try:
        Tap("pkvm-probe").close()
    except LoadError:
        return False
    return shutil.which("ip") is not None


needs_tap = pytest.mark.skipif(not can_make_tap(), reason="no TAP interface can be made here")
needs_passt = pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def name() -> str:
    return f"pkvm{os.getpid() % 100_000}"


@pytest.fixture
def tap(name: str) -> Iterator[Tap]:
    tap = Tap(name)
    no_ipv6 = Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6")
    if no_ipv6.exists():
        # Without IPv6 the kernel sends nothing of its own accord.
        no_ipv6.write_text("1")
    ip("link", "set", name, "up")
    yield tap
    tap.close()


@pytest.fixture
def station(name: str, tap: Tap) -> Iterator[socket.socket]:
    """The host's end of the TAP interface."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(EXPERIMENT)) as station:
        station.bind((name, EXPERIMENT))
        station.settimeout(PATIENCE_S)
        yield station


@needs_tap
def test_frames_cross_a_tap_interface(tap: Tap, station: socket.socket) -> None:
    tap.send(FRAME)
    assert station.recv(2000) == FRAME
    for n in range(3):
        station.send(FRAME + bytes([n]))
    assert tap.receive() == [FRAME + bytes([n]) for n in range(3)]
    assert tap.receive() == []


@needs_tap
def test_a_device_on_a_tap_interface(
    tap: Tap, station: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(net, "Loop", ManualLoop)
    device = Net(tap, mac=MAC)
    assert isinstance(device._loop, ManualLoop)
    driver = Driver(Rig(device))
    driver.request([bytes(12), FRAME], queue=TRANSMIT)
    assert station.recv(2000) == FRAME
    driver.add(writable=[1526], queue=RECEIVE)
    driver.notify(RECEIVE)
    station.send(FRAME)
    device._loop.settle()
    (used,) = driver.collect(RECEIVE)
    assert used.data[12 : used.length] == FRAME


@needs_tap
def test_while_a_tap_interface_is_down_frames_are_lost(name: str, tap: Tap) -> None:
    ip("link", "set", name, "down")
    tap.send(FRAME)
    assert tap.receive() == []
    tap.send(b"")


@needs_tap
@pytest.mark.parametrize("found_by", ["sending", "receiving"])
def test_a_vanished_tap_interface_takes_the_link_down(
    name: str, tap: Tap, found_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(net, "Loop", ManualLoop)
    device = Net(tap, mac=MAC)
    assert isinstance(device._loop, ManualLoop)
    rig = Rig(device)
    driver = Driver(rig)
    ip("link", "delete", name)
    if found_by == "sending":
        assert driver.request([bytes(12), FRAME], queue=TRANSMIT).length == 0
    device._loop.settle()
    assert not device.link_up
    assert f"the TAP interface {name} is gone" in rig.report()
    assert not rig.needs_reset


@needs_tap
def test_a_tap_interface_has_one_user(name: str, tap: Tap) -> None:
    with pytest.raises(LoadError, match="is in use"):
        Tap(name)


@needs_tap
def test_an_interface_of_another_kind() -> None:
    with pytest.raises(LoadError, match="is not a TAP interface"):
        Tap("lo")


@pytest.mark.parametrize("name", ["", "x" * 16, "a/b", "a\0b"])
def test_bad_names_of_interfaces(name: str) -> None:
    with pytest.raises(LoadError, match="not the name of a network interface"):
        Tap(name)


def test_without_the_tun_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pkvm.vmm.virtio.links._TUN", "/nonexistent/tun")
    with pytest.raises(LoadError, match=r"No such file.*passt=SOCKET"):
        Tap("tap0")


def test_nobody_at_the_socket(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="nobody can be reached"):
        StreamLink.connect(str(tmp_path / "none"))
    with pytest.raises(LoadError, match="too long"):
        StreamLink.connect(str(tmp_path / ("x" * 200)))


@pytest.fixture
def passt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StreamLink]:
    """A connection to a passt of our own, which ends with it."""
    # passt gives up root's rights, and then needs a place where it may make its socket.
    folder = tmp_path_factory.getbasetemp().parent.parent / f"pkvm-passt-{os.getpid()}"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    path = folder / "socket"
    process = subprocess.Popen(
        [
            "passt", "--foreground", "--one-off", "--quiet", "--socket", str(path),
            "--mtu", "1500", "--address", "10.0.2.15", "--netmask", "255.255.255.0",
            "--gateway", "10.0.2.2",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                link = StreamLink.connect(str(path))
                break
            except LoadError:
                if process.poll() is not None:
                    pytest.skip("passt does not start here")
                assert time.monotonic() < end
                time.sleep(0.01)
        yield link
        link.close()
        process.wait(PATIENCE_S)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)


@needs_passt
def test_passt_answers_arp(passt: StreamLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net, "Loop", ManualLoop)
    device = Net(passt, mac=MAC)
    assert isinstance(device._loop, ManualLoop)
    driver = Driver(Rig(device))
    driver.add(writable=[1526], queue=RECEIVE)
    driver.notify(RECEIVE)
    who_has = struct.pack(
        ">6s6sHHHBBH6s4s6s4s",
        b"\xff" * 6, MAC, 0x0806, 1, 0x0800, 6, 4, 1,
        MAC, bytes([10, 0, 2, 15]), bytes(6), bytes([10, 0, 2, 2]),
    )  # fmt: skip
    driver.request([bytes(12), who_has], queue=TRANSMIT)
    end = time.monotonic() + PATIENCE_S
    while not (back := driver.collect(RECEIVE)):
        assert time.monotonic() < end
        device._loop.settle()
    answer = back[0].data[12 : back[0].length]
    assert answer[:6] == MAC
    assert answer[12:14] == b"\x08\x06"
    assert answer[20:22] == b"\0\x02"
    assert answer[28:32] == bytes([10, 0, 2, 2])


@needs_passt
def test_when_passt_goes_the_link_is_gone(passt: StreamLink) -> None:
    passt._socket.shutdown(socket.SHUT_WR)
    with pytest.raises(LinkError, match="closed"):
        receive_until_it_is_gone(passt)


def receive_until_it_is_gone(link: StreamLink) -> None:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        link.receive()
