# SPDX-License-Identifier: GPL-2.0-or-later
"""Split virtqueues: chains come as the driver made them, go back in order, and no rule is broken
unnoticed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.virtio_driver import (
    INDIRECT,
    NEXT,
    PAGE,
    RAM_BASE,
    WRITE,
    Descriptor,
    Ram,
    VirtqueueWriter,
)
from pkvm.vmm.guest_memory import GuestMemory, GuestMemoryError, PrivatePageError
from pkvm.vmm.virtio.queue import Queue, QueueError, Segment

SIZE = 8
DATA = RAM_BASE + 0x8000


class Rig:
    """A queue of 8 descriptors at the start of RAM, live."""

    def __init__(self, size: int = SIZE) -> None:
        self.ram = Ram(0x10_0000)
        self.driver = VirtqueueWriter(self.ram, 0, size)
        self.queue = Queue(GuestMemory([(RAM_BASE, self.ram)]), 0, "test", 256)
        self.connect()

    def connect(self) -> None:
        queue, driver = self.queue, self.driver
        queue.size = driver.size
        queue.descriptors = driver.descriptors
        queue.driver_ring = driver.driver_ring
        queue.device_ring = driver.device_ring
        queue.check()
        queue.ready = queue.live = queue.indirect = True

    def indirect(self, head: int, *table: Descriptor, at: int = DATA + 0x4000) -> None:
        self.driver.put(at, b"".join(each.pack() for each in table))
        self.driver.describe(head, Descriptor(at, 16 * len(table), INDIRECT))
        self.driver.make_available(head)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_an_empty_queue_gives_nothing(rig: Rig) -> None:
    assert rig.queue.pop() is None
    assert not rig.queue.notify_needed()


def test_a_chain_has_its_segments_in_order(rig: Rig) -> None:
    rig.driver.describe(3, Descriptor(DATA, 4, NEXT, 1))
    rig.driver.describe(1, Descriptor(DATA + 0x100, 6, NEXT, 7))
    rig.driver.describe(7, Descriptor(DATA + 0x200, 5, NEXT | WRITE, 0))
    rig.driver.describe(0, Descriptor(DATA + 0x300, 3, WRITE))
    rig.driver.put(DATA, b"abcd")
    rig.driver.put(DATA + 0x100, b"efghij")
    rig.driver.make_available(3)

    chain = rig.queue.pop()

    assert chain is not None
    assert chain.head == 3
    assert chain.readable == [Segment(DATA, 4), Segment(DATA + 0x100, 6)]
    assert chain.writable == [Segment(DATA + 0x200, 5), Segment(DATA + 0x300, 3)]
    assert chain.read_all(10) == b"abcdefghij"
    assert chain.read(3, 3) == b"def"
    assert chain.read(8, 100) == b"ij"
    assert chain.read(10, 1) == b""
    assert chain.write(b"12345") + chain.write(b"6789") == 8
    assert chain.write(b"x") == 0
    assert rig.driver.get(DATA + 0x200, 6) == b"12345\0"
    assert rig.driver.get(DATA + 0x300, 4) == b"678\0"
    with pytest.raises(QueueError, match="at most 9"):
        chain.read_all(9)


def test_an_indirect_table_is_a_chain(rig: Rig) -> None:
    rig.indirect(5, Descriptor(DATA, 2, NEXT, 2), Descriptor(0, 0), Descriptor(DATA + 16, 4, WRITE))
    chain = rig.queue.pop()
    assert chain is not None
    assert chain.head == 5
    assert (chain.readable, chain.writable) == ([Segment(DATA, 2)], [Segment(DATA + 16, 4)])


def test_chains_go_back_together_when_they_are_published(rig: Rig) -> None:
    for n in range(3):
        rig.driver.describe(n, Descriptor(DATA + 16 * n, 16, WRITE))
    rig.driver.make_available(0, 1, 2)
    for n in range(3):
        chain = rig.queue.pop()
        assert chain is not None
        assert chain.write(b"x" * n) == n
        rig.queue.push(chain)
    assert rig.driver.used() == []
    rig.queue.publish()
    assert rig.driver.used() == [(0, 0), (1, 1), (2, 2)]
    assert rig.queue.notify_needed()
    assert not rig.queue.notify_needed()


def test_indexes_wrap_round(rig: Rig) -> None:
    rig.driver.describe(2, Descriptor(DATA, 4, WRITE))
    for round_ in range(0x1_0003):
        rig.driver.make_available(2)
        chain = rig.queue.pop()
        assert chain is not None
        rig.queue.push(chain, round_ & 3)
        rig.queue.publish()
        assert rig.driver.used() == [(2, round_ & 3)]
        assert rig.queue.pop() is None


@given(batches=st.lists(st.integers(1, SIZE), max_size=40), size=st.sampled_from([1, 2, 8]))
def test_every_chain_comes_back_once(batches: list[int], size: int) -> None:
    rig = Rig(size)
    for count in batches:
        count = min(count, size)
        for n in range(count):
            rig.driver.describe(n, Descriptor(DATA + n, 1, WRITE))
        rig.driver.make_available(*range(count))
        while (chain := rig.queue.pop()) is not None:
            rig.queue.push(chain, chain.write(b"."))
        rig.queue.publish()
        assert rig.driver.used() == [(n, 1) for n in range(count)]


class TestInterruptWishes:
    @staticmethod
    def round(rig: Rig, count: int = 1) -> bool:
        rig.driver.describe(0, Descriptor(DATA, 1, WRITE))
        for _ in range(count):
            rig.driver.make_available(0)
            chain = rig.queue.pop()
            assert chain is not None
            rig.queue.push(chain)
        rig.queue.publish()
        return rig.queue.notify_needed()

    def test_a_flag_keeps_the_device_quiet(self, rig: Rig) -> None:
        assert self.round(rig)
        rig.driver.set_flags(1)
        assert not self.round(rig)
        rig.driver.set_flags(0)
        assert self.round(rig)

    def test_an_event_index_says_when(self, rig: Rig) -> None:
        rig.queue.event_idx = True
        assert self.round(rig)
        rig.driver.set_used_event(3)
        assert not self.round(rig, 2)
        assert self.round(rig)
        rig.driver.set_used_event(5)
        assert self.round(rig, 5)

    @given(start=st.integers(0, 0xFFFF), steps=st.lists(st.integers(1, 5), max_size=8))
    def test_an_event_is_signalled_when_it_is_crossed(self, start: int, steps: list[int]) -> None:
        rig = Rig()
        rig.queue.event_idx = True
        assert self.round(rig)
        rig.driver.set_used_event(start)
        done = 1
        for step in steps:
            crossed = any((done + n) & 0xFFFF == start for n in range(step))
            assert self.round(rig, step) == crossed
            done += step

    def test_the_device_asks_for_notifications_when_it_has_found_nothing(self, rig: Rig) -> None:
        rig.queue.event_idx = True
        rig.driver.describe(0, Descriptor(DATA, 1, WRITE))
        rig.driver.make_available(0)
        assert rig.queue.pop() is not None
        assert rig.driver.avail_event == 0
        assert rig.queue.pop() is None
        assert rig.driver.avail_event == 1

    def test_a_chain_added_while_the_device_asks_is_found(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rig.queue.event_idx = True
        rig.driver.describe(0, Descriptor(DATA, 1, WRITE))
        rig.driver.make_available(0)
        assert rig.queue.pop() is not None
        write = rig.ram.write

        def write_and_add(offset: int, data: bytes) -> None:
            write(offset, data)
            monkeypatch.undo()
            rig.driver.make_available(0)

        monkeypatch.setattr(rig.ram, "write", write_and_add)
        assert rig.queue.pop() is not None

    def test_without_event_index_a_flag_asks(self, rig: Rig) -> None:
        rig.queue.want_notifications(False)
        assert rig.driver.word(rig.driver.device_ring) == 1
        rig.queue.want_notifications(True)
        assert rig.driver.word(rig.driver.device_ring) == 0


class TestBrokenRules:
    @staticmethod
    def refused(rig: Rig, match: str) -> None:
        before = bytes(rig.ram.bytes)
        with pytest.raises(QueueError, match=match):
            rig.queue.pop()
        assert rig.ram.bytes == before

    def test_bad_loop(self, rig: Rig) -> None:
        rig.driver.describe(0, Descriptor(DATA, 4, NEXT, 1))
        rig.driver.describe(1, Descriptor(DATA, 4, NEXT, 0))
        rig.driver.make_available(0)
        self.refused(rig, "does not end")

    def test_bad_indirect_loop(self, rig: Rig) -> None:
        rig.indirect(0, Descriptor(DATA, 4, NEXT, 0))
        self.refused(rig, "does not end")

    def test_bad_head(self, rig: Rig) -> None:
        rig.driver.make_available(SIZE)
        self.refused(rig, f"descriptor {SIZE} of {SIZE}")

    def test_bad_next(self, rig: Rig) -> None:
        rig.driver.describe(0, Descriptor(DATA, 4, NEXT, SIZE))
        rig.driver.make_available(0)
        self.refused(rig, f"goes on at descriptor {SIZE}")

    def test_bad_available_index(self, rig: Rig) -> None:
        rig.driver.put(rig.driver.driver_ring + 2, (SIZE + 1).to_bytes(2, "little"))
        self.refused(rig, f"{SIZE + 1} chains are available")

    def test_bad_order(self, rig: Rig) -> None:
        rig.driver.describe(0, Descriptor(DATA, 4, NEXT | WRITE, 1))
        rig.driver.describe(1, Descriptor(DATA, 4))
        rig.driver.make_available(0)
        self.refused(rig, "to read after one to write")

    def test_bad_indirect_in_a_chain(self, rig: Rig) -> None:
        rig.driver.describe(0, Descriptor(DATA, 4, NEXT, 1))
        rig.driver.describe(1, Descriptor(DATA, 16, INDIRECT))
        rig.driver.make_available(0)
        self.refused(rig, "within a chain")

    def test_bad_indirect_in_indirect(self, rig: Rig) -> None:
        rig.indirect(0, Descriptor(DATA, 16, INDIRECT))
        self.refused(rig, "within a chain")

    def test_bad_indirect_with_next(self, rig: Rig) -> None:
        rig.driver.describe(0, Descriptor(DATA, 16, INDIRECT | NEXT, 1))
        rig.driver.make_available(0)
        self.refused(rig, "has a next")

    def test_bad_indirect_not_negotiated(self, rig: Rig) -> None:
        rig.queue.indirect = False
        rig.indirect(0, Descriptor(DATA, 4))
        self.refused(rig, "not negotiated")

    @pytest.mark.parametrize("length", [0, 8, 17, 16 * 1025, 0xFFFF_FFF0])
    def test_bad_indirect_size(self, rig: Rig, length: int) -> None:
        rig.driver.describe(0, Descriptor(DATA, length, INDIRECT))
        rig.driver.make_available(0)
        self.refused(rig, "table of")

    def test_bad_total(self, rig: Rig) -> None:
        rig.driver.describe(0, Descriptor(DATA, 0xFFFF_FFFF, NEXT, 1))
        rig.driver.describe(1, Descriptor(DATA, 2))
        rig.driver.make_available(0)
        self.refused(rig, "a chain of more than")

    @pytest.mark.parametrize("size", [0, 3, 257, 512, 0xFFFF_FFFF])
    def test_bad_size(self, rig: Rig, size: int) -> None:
        rig.queue.size = size
        with pytest.raises(QueueError, match="power of 2"):
            rig.queue.check()

    @pytest.mark.parametrize("part", ["descriptors", "driver_ring", "device_ring"])
    def test_bad_alignment(self, rig: Rig, part: str) -> None:
        setattr(rig.queue, part, getattr(rig.queue, part) + 1)
        with pytest.raises(QueueError, match="not aligned"):
            rig.queue.check()

    @pytest.mark.parametrize("part", ["descriptors", "driver_ring", "device_ring"])
    @pytest.mark.parametrize(
        "address", [0, 0x0A00_0000, RAM_BASE - 16, RAM_BASE + 0x10_0000 - 16, (1 << 64) - 16]
    )
    def test_bad_place(self, rig: Rig, part: str, address: int) -> None:
        setattr(rig.queue, part, address)
        with pytest.raises(GuestMemoryError, match="not memory of the guest"):
            rig.queue.check()

    def test_bad_private_ring(self, rig: Rig) -> None:
        rig.ram.private.add(0)
        with pytest.raises(PrivatePageError) as caught:
            rig.queue.check()
        assert caught.value.ipa == RAM_BASE

    @pytest.mark.parametrize(
        ("address", "length"),
        [(0, 4), (RAM_BASE + 0x10_0000 - 2, 4), ((1 << 64) - 2, 4), (1 << 63, 0xFFFF_FFFF)],
    )
    def test_bad_buffer(self, rig: Rig, address: int, length: int) -> None:
        for flags in (0, WRITE):
            rig.driver.describe(0, Descriptor(address, length, flags))
            rig.driver.make_available(0)
            chain = rig.queue.pop()
            assert chain is not None
            with pytest.raises(GuestMemoryError):
                chain.write(bytes(8)) if flags else chain.read_all(1 << 32)

    def test_bad_private_buffer(self, rig: Rig) -> None:
        rig.ram.private.add(9)
        rig.driver.describe(0, Descriptor(DATA + PAGE - 2, 4))
        rig.driver.make_available(0)
        chain = rig.queue.pop()
        assert chain is not None
        with pytest.raises(PrivatePageError) as caught:
            chain.read_all(4)
        assert caught.value.ipa == DATA + PAGE


def test_a_reset_makes_chains_stale(rig: Rig) -> None:
    rig.driver.describe(0, Descriptor(DATA, 4, NEXT, 1))
    rig.driver.describe(1, Descriptor(DATA + 16, 4, WRITE))
    rig.driver.put(DATA, b"data")
    rig.driver.make_available(0)
    chain = rig.queue.pop()
    assert chain is not None
    rig.queue.reset()
    rig.connect()
    before = bytes(rig.ram.bytes)
    assert chain.stale
    assert chain.read_all(4) == b""
    assert chain.write(b"x") == 0
    rig.queue.push(chain)
    rig.queue.publish()
    assert rig.ram.bytes == before


def test_a_queue_that_is_not_live_touches_nothing(rig: Rig) -> None:
    rig.driver.describe(0, Descriptor(DATA, 4, WRITE))
    rig.driver.make_available(0)
    rig.queue.live = False
    rig.ram.private.update(range(16))
    assert rig.queue.pop() is None
    rig.queue.want_notifications(True)
    rig.queue.publish()
