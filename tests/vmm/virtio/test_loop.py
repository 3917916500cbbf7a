# SPDX-License-Identifier: GPL-2.0-or-later
"""A device's own thread: files are served when they are ready, and it ends."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from queue import SimpleQueue

import pytest

from pkvm.vmm.virtio.loop import IN, OUT, Loop

PATIENCE_S = 30


Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


@pytest.fixture
def loop(pair: Pair) -> Iterator[Loop]:
    before = threading.active_count()
    loop = Loop("test")
    yield loop
    loop.close()
    assert threading.active_count() == before


def test_it_calls_when_there_is_input(loop: Loop, pair: Pair) -> None:
    got: SimpleQueue[tuple[int, bytes]] = SimpleQueue()
    loop.watch(pair[0].fileno(), IN, lambda events: got.put((events, pair[0].recv(10))))
    for data in (b"one", b"two"):
        pair[1].send(data)
        assert got.get(timeout=PATIENCE_S) == (IN, data)


def test_a_watch_can_be_changed_from_outside_and_inside(loop: Loop, pair: Pair) -> None:
    fd = pair[0].fileno()
    got: SimpleQueue[str] = SimpleQueue()

    def readable(_: int) -> None:
        pair[0].recv(10)
        got.put("in")
        loop.watch(fd, OUT, writable)

    def writable(_: int) -> None:
        got.put("out")
        loop.watch(fd, 0, writable)

    loop.watch(fd, IN, readable)
    pair[1].send(b"x")
    assert [got.get(timeout=PATIENCE_S) for _ in range(2)] == ["in", "out"]
    loop.watch(fd, OUT, writable)
    assert got.get(timeout=PATIENCE_S) == "out"
    loop.watch(fd, IN, readable)
    pair[1].send(b"y")
    assert got.get(timeout=PATIENCE_S) == "in"


def test_an_end_that_is_gone_counts_as_ready(loop: Loop, pair: Pair) -> None:
    got: SimpleQueue[int] = SimpleQueue()

    def ready(events: int) -> None:
        got.put(events)
        loop.forget(pair[0].fileno())

    loop.watch(pair[0].fileno(), IN | OUT, ready)
    assert got.get(timeout=PATIENCE_S) == OUT
    pair[1].close()
    loop.watch(pair[0].fileno(), IN, ready)
    assert got.get(timeout=PATIENCE_S) == IN


def test_a_forgotten_file_is_let_go(loop: Loop, pair: Pair) -> None:
    loop.watch(pair[0].fileno(), IN, lambda _: None)
    loop.forget(pair[0].fileno())
    pair[0].close()
    assert pair[1].recv(1) == b""


def test_without_files_there_is_no_thread() -> None:
    before = threading.active_count()
    loop = Loop("test")
    loop.forget(0)
    loop.watch(0, 0, lambda _: None)
    assert threading.active_count() == before
    loop.close()
    loop.close()
    loop.watch(0, IN, lambda _: None)
    assert threading.active_count() == before


def test_it_ends_while_many_wakes_wait(pair: Pair) -> None:
    loop = Loop("test")
    inside = threading.Event()
    leave = threading.Event()

    def ready(_: int) -> None:
        inside.set()
        leave.wait(PATIENCE_S)

    loop.watch(pair[0].fileno(), OUT, ready)
    assert inside.wait(PATIENCE_S)
    read, write = os.pipe()
    for _ in range(40_000):
        loop.watch(read, IN, lambda _: None)
        loop.watch(read, 0, lambda _: None)
    leave.set()
    loop.close()
    os.close(read)
    os.close(write)
