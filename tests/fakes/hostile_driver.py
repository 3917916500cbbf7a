# SPDX-License-Identifier: GPL-2.0-or-later
"""A driver that does anything, for property-based tests of virtio devices.

`plans()` draws what it does; `attack(backend, plan)` does it, and asserts that
the device stays whole: no access raises, the device stores nowhere but into
the buffers that the rings gave it and into the used rings, it never gets at a
private page, and after a reset it serves a driver that behaves well.
"""

from __future__ import annotations

import struct
from typing import NamedTuple
from unittest.mock import patch

from hypothesis import strategies as st

from fakes.virtio_driver import INDIRECT, NEXT, PAGE, RAM_BASE, WRITE, Descriptor, Driver, Rig
from pkvm.vmm.virtio import mmio
from pkvm.vmm.virtio.queue import Chain, Queue

RAM_BYTES = 32 * PAGE
SIZE = 8
TABLES, BUFFERS = 16 * PAGE, 20 * PAGE
SECRET = bytes(range(0xF0, 0x100)) * (PAGE // 16)
"""What stands in private pages."""


class Register(NamedTuple):
    """A store of any size anywhere in the window."""

    offset: int
    size: int
    value: int


class Describe(NamedTuple):
    """A descriptor of a queue's table, or of one of the indirect tables (`queue` -1)."""

    queue: int
    number: int
    descriptor: Descriptor


class Fill(NamedTuple):
    """Bytes at an offset of a buffer: headers of requests, true and false."""

    offset: int
    data: bytes


class Offer(NamedTuple):
    """Heads made available, then a notification; `jump` moves the ring's index too far."""

    queue: int
    heads: list[int]
    jump: int


class Ask(NamedTuple):
    """A request that is sound, or nearly so: parts to read, the first of which starts with `data`,
    then parts to write; `flaw` takes the place of part `at` of it. It is made available."""

    queue: int
    data: bytes
    readable: list[int]
    writable: list[int]
    flaw: Descriptor | None
    at: int
    indirect: bool
    start_anew: bool
    """Reset the device first, and set it up again."""


class Hide(NamedTuple):
    """A page becomes private, or is shared again."""

    page: int
    private: bool


class Reset(NamedTuple):
    """A reset; `well`: the driver starts anew after it."""

    well: bool


class Input(NamedTuple):
    """Something comes from outside (for devices that take input)."""

    data: bytes


Step = Register | Describe | Fill | Offer | Ask | Hide | Reset | Input


class Plan(NamedTuple):
    indirect: bool
    event_idx: bool
    steps: list[Step]


_addresses = st.one_of(
    st.integers(0, 11).map(lambda n: RAM_BASE + BUFFERS + n * 1000),
    st.integers(0, 3).map(lambda n: RAM_BASE + TABLES + n * 256),
    st.integers(0, RAM_BYTES - 1).map(lambda n: RAM_BASE + n),
    st.sampled_from([
        0, 0x0900_0000, 0x0A00_0000, 0x0A00_0100, RAM_BASE - 1, RAM_BASE + RAM_BYTES - 1,
        RAM_BASE + RAM_BYTES, (1 << 64) - 1, (1 << 64) - PAGE, 1 << 63,
    ]),
)  # fmt: skip
_lengths = st.one_of(
    st.sampled_from([0, 1, 4, 12, 16, 44, 511, 512, 513, 1024, PAGE, 0x7FFF_FFFF, 0xFFFF_FFFF]),
    st.integers(0, 2048),
)
_descriptors = st.builds(
    Descriptor,
    _addresses,
    _lengths,
    st.sampled_from([0, NEXT, WRITE, NEXT | WRITE, INDIRECT, INDIRECT | NEXT, 7, 0xFFFF]),
    st.one_of(st.integers(0, SIZE), st.just(0xFFFF)),
)
_sound = st.builds(
    Descriptor,
    st.integers(0, 11).map(lambda n: RAM_BASE + BUFFERS + n * 1000),
    st.sampled_from([1, 16, 512, 1000]),
    st.sampled_from([0, NEXT, NEXT, WRITE, NEXT | WRITE]),
    st.integers(0, SIZE - 1),
)
_registers = st.builds(
    Register,
    st.one_of(
        st.sampled_from([
            mmio.STATUS, mmio.QUEUE_NOTIFY, mmio.QUEUE_READY, mmio.QUEUE_SEL, mmio.QUEUE_NUM,
            mmio.INTERRUPT_ACK, mmio.DRIVER_FEATURES, mmio.QUEUE_DESC_LOW, mmio.QUEUE_DRIVER_LOW,
            mmio.QUEUE_DEVICE_LOW, mmio.QUEUE_DEVICE_HIGH,
        ]),
        st.integers(0, 0x1FF),
    ),
    st.sampled_from([4, 4, 4, 1, 2, 8]),
    st.one_of(st.integers(0, 16), _addresses, st.integers(0, (1 << 64) - 1)),
)  # fmt: skip


def plans(queues: int, fills: st.SearchStrategy[bytes]) -> st.SearchStrategy[Plan]:
    """Plans against a device of so many queues; `fills` draws what its requests are made of."""
    queue = st.integers(0, queues - 1)
    pages = st.integers(0, RAM_BYTES // PAGE - 1)
    rooms = st.sampled_from([1, 16, 44, 512, 513, 1000])
    asks = st.builds(
        Ask,
        queue,
        fills,
        st.one_of(st.just([]), st.just([512]), st.lists(rooms, max_size=3)),
        st.one_of(
            st.sampled_from([[1], [512, 1], [1000, 25], [20, 1]]),
            st.lists(rooms, min_size=1, max_size=3),
            st.lists(rooms, max_size=3),
        ),
        st.one_of(st.none(), st.none(), _descriptors),
        st.integers(0, 5),
        st.booleans(),
        st.booleans(),
    )
    step: st.SearchStrategy[Step] = st.one_of(
        _registers,
        st.builds(Describe, st.integers(-1, queues - 1), st.integers(0, SIZE - 1), _descriptors),
        st.builds(Describe, queue, st.integers(0, SIZE - 1), _sound),
        st.builds(Describe, queue, st.integers(0, SIZE - 1), _sound),
        st.builds(Fill, st.integers(0, 11).map(lambda n: n * 1000), fills),
        st.builds(
            Offer,
            queue,
            st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=3),
            st.sampled_from([0, 0, 0, 0, 0, 1, SIZE + 1, 0x8000]),
        ),
        st.builds(Offer, queue, st.lists(st.integers(0, SIZE), max_size=3), st.just(0)),
        *[asks] * 6,
        st.builds(
            Hide,
            st.one_of(st.sampled_from([0, TABLES // PAGE, BUFFERS // PAGE]), pages),
            st.booleans(),
        ),
        st.builds(Reset, st.booleans()),
        st.builds(Input, fills),
    )
    return st.builds(Plan, st.booleans(), st.booleans(), st.lists(step, max_size=25))


class _Watch:
    """Knows where the device may store: the parts of chains that it popped and has not given back
    in a step before, and used rings."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.rings: list[tuple[int, int]] = []
        self.held: list[Chain] = []
        self.given_back: list[Chain] = []
        self._pop, self._push, self._publish = Queue.pop, Queue.push, Queue.publish

    def pop(self, queue: Queue) -> Chain | None:
        self._allow_ring(queue)
        chain = self._pop(queue)
        if chain is not None:
            self.held.append(chain)
        return chain

    def push(self, queue: Queue, chain: Chain, written: int | None = None) -> None:
        self.given_back.append(chain)
        self._push(queue, chain, written)

    def publish(self, queue: Queue) -> None:
        self._allow_ring(queue)
        self._publish(queue)

    def _allow_ring(self, queue: Queue) -> None:
        self.rings.append((queue.device_ring - RAM_BASE, 6 + 8 * queue.size))

    def check(self, before: bytes) -> None:
        """Every byte that the device changed is in a place where it may store."""
        ram = self.rig.ram
        allowed = self.rings + [
            (at - RAM_BASE, room) for chain in self.held for at, room in chain.writable
        ]
        for offset, length in ram.written:
            assert any(at <= offset and offset + length <= at + room for at, room in allowed), (
                f"a store to {offset:#x} (+{length:#x})"
            )
        untouched = bytearray(ram.bytes)
        for offset, length in ram.written:
            untouched[offset : offset + length] = before[offset : offset + length]
        assert untouched == before
        ram.written.clear()
        self.rings.clear()
        gone = set(map(id, self.given_back))
        self.held = [chain for chain in self.held if not chain.stale and id(chain) not in gone]
        self.given_back.clear()


def attack(rig: Rig, plan: Plan) -> None:
    """Do what `plan` says to the device of `rig`, whose RAM has RAM_BYTES."""
    watch = _Watch(rig)
    with (
        patch.object(Queue, "pop", lambda queue: watch.pop(queue)),
        patch.object(Queue, "push", lambda queue, chain, n=None: watch.push(queue, chain, n)),
        patch.object(Queue, "publish", lambda queue: watch.publish(queue)),
    ):
        attacker = _Attacker(rig, plan)
        for step in plan.steps:
            before = attacker.prepare(step)
            attacker.act(step)
            watch.check(before)
    attacker.disclose()
    rig.ram.private.clear()
    driver = Driver(rig, size=SIZE)
    assert rig.device.live
    assert not rig.needs_reset
    assert driver.read(mmio.INTERRUPT_STATUS) == 0


class _Attacker:
    def __init__(self, rig: Rig, plan: Plan) -> None:
        self.rig = rig
        self.features = ~0
        if not plan.indirect:
            self.features &= ~mmio.F_INDIRECT_DESC
        if not plan.event_idx:
            self.features &= ~mmio.F_EVENT_IDX
        self.driver = Driver(rig, size=SIZE, features=self.features)
        assert self.driver.free_at <= TABLES

    def prepare(self, step: Step) -> bytes:
        """The driver's own stores for `step`; RAM after them."""
        ram = self.rig.ram
        if isinstance(step, Hide):
            self._hide(step)
        elif isinstance(step, Fill):
            start = BUFFERS + step.offset
            ram.bytes[start : start + len(step.data)] = step.data
        elif isinstance(step, Describe):
            if step.queue < 0:
                start = TABLES + 16 * step.number
                ram.bytes[start : start + 16] = step.descriptor.pack()
            else:
                self.driver.queues[step.queue].describe(step.number, step.descriptor)
        elif isinstance(step, Offer):
            ring = self.driver.queues[step.queue]
            ring.available = ring.available + step.jump & 0xFFFF
            ring.make_available(*step.heads)
        elif isinstance(step, Ask):
            if step.start_anew:
                self._start_anew()
            self._lay_out(step)
        elif isinstance(step, Reset) and step.well:
            self._start_anew()
        return bytes(ram.bytes)

    def _start_anew(self) -> None:
        for ring in self.driver.queues:
            start, end = ring.descriptors - RAM_BASE, ring.end - RAM_BASE
            self.rig.ram.bytes[start:end] = bytes(end - start)
        self.driver = Driver(self.rig, size=SIZE, features=self.features)

    def _lay_out(self, step: Ask) -> None:
        """Put the parts one behind the other into the buffers, and describe them."""
        ram, ring = self.rig.ram, self.driver.queues[step.queue]
        at = BUFFERS
        ram.bytes[at : at + len(step.data)] = step.data
        parts = []
        for flags, lengths in ((0, [len(step.data), *step.readable]), (WRITE, step.writable)):
            for length in lengths:
                parts.append(Descriptor(RAM_BASE + at, length, flags))
                at += length
        chain = [part._replace(flags=part.flags | NEXT, next=n + 1) for n, part in enumerate(parts)]
        chain[-1] = parts[-1]
        if step.flaw is not None and step.at < len(chain):
            chain[step.at] = step.flaw
        if step.indirect:
            table = b"".join(part.pack() for part in chain)
            ram.bytes[TABLES : TABLES + len(table)] = table
            ring.describe(0, Descriptor(RAM_BASE + TABLES, len(table), INDIRECT))
        else:
            for n, part in enumerate(chain):
                ring.describe(n, part)
        ring.make_available(0)

    def act(self, step: Step) -> None:
        device = self.rig.device
        if isinstance(step, Register):
            device.write(step.offset, step.size, step.value & (1 << 8 * step.size) - 1)
            assert 0 <= device.read(step.offset, step.size) < 1 << 8 * step.size
        elif isinstance(step, Offer | Ask):
            self.driver.notify(step.queue)
        elif isinstance(step, Reset):
            self.driver.write(mmio.STATUS, 0)
            assert self.rig.status == 0
            assert not self.rig.wire.level
            if step.well:
                self.driver = Driver(self.rig, size=SIZE, features=self.features)
        elif isinstance(step, Input):
            receive = getattr(self.rig.backend, "receive", None)
            if receive is not None:
                receive(step.data)

    def _hide(self, step: Hide) -> None:
        ram = self.rig.ram
        start = step.page * PAGE
        if step.private and step.page not in ram.private:
            ram.private.add(step.page)
            ram.bytes[start : start + PAGE] = SECRET
        elif not step.private and step.page in ram.private:
            ram.private.remove(step.page)
            ram.bytes[start : start + PAGE] = bytes(PAGE)

    def disclose(self) -> None:
        """No secret stands where the host can read."""
        ram = self.rig.ram
        for page in range(RAM_BYTES // PAGE):
            if page not in ram.private:
                assert SECRET[:32] not in ram.bytes[page * PAGE : (page + 1) * PAGE]


def u32(*values: int) -> bytes:
    """Little-endian words, for fills."""
    return struct.pack(f"<{len(values)}I", *values)
