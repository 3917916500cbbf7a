# SPDX-License-Identifier: GPL-2.0-or-later
"""The secure world by itself: it maps what it is told to, and takes no descriptor's word."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvm.arm64 import ffa, ffa_memory
from pkvm.arm64.ffa import Function, Registers, Status
from pkvm.arm64.ffa_memory import Constituent
from pkvm.events import Event, SecureMemory
from pkvm.host.ffa import FfaCallError, FfaDriver
from pkvm.machine.bus import Bus
from pkvm.machine.memory import PhysicalMemory
from pkvm.machine.secure import PARTITIONS, SecureWorld
from pkvm.machine.secure_memory import MAX_BYTES, MAX_TRANSACTIONS
from pkvm.machine.secure_partition import Command

RAM = 0x8000_0000
PAGE = 4096
TX, RX = RAM, RAM + PAGE
SP, OTHER_SP = PARTITIONS
VERSIONS = (ffa.VERSION_1_0, ffa.VERSION_1_1, ffa.VERSION_1_2)
SHARE = Function.FFA_MEM_SHARE_64


class World:
    """A secure world, and a normal world that asks it."""

    def __init__(self, version: int = ffa.VERSION_1_2, *, mapped: bool = True) -> None:
        self.events: list[Event] = []
        self.memory = PhysicalMemory(RAM, 4 << 20)
        self.secure = SecureWorld(self.memory, self)
        self.driver = FfaDriver(self.smc, Bus(self.memory, "host"), TX, RX, version)
        if mapped:
            self.driver.map_buffers()

    def record(self, event: Event, /) -> None:
        self.events.append(event)

    def smc(self, registers: Registers) -> Registers:
        answer = self.secure.call(registers)
        assert len(answer) == ffa.REGISTERS
        return answer

    def refuses(self, status: Status, function: Function, *arguments: int) -> None:
        before = dict(self.secure.grants.by_handle), self.secure.grants.pages()
        with pytest.raises(FfaCallError) as error:
            self.driver.call(function, *arguments)
        assert error.value.status == status
        assert (dict(self.secure.grants.by_handle), self.secure.grants.pages()) == before

    def refuses_to_take(self, status: Status, data: bytes, total: int | None = None) -> None:
        self.memory.write(TX, data[:PAGE])
        length = min(len(data), PAGE)
        self.refuses(status, SHARE, len(data) if total is None else total, length)


def transaction(*ranges: tuple[int, int], version: int = ffa.VERSION_1_2, **more: int) -> bytes:
    constituents = [Constituent(*item) for item in ranges]
    return ffa_memory.write_transaction(version, constituents, receivers=[SP], **more)


def edit(data: bytes, offset: int, size: int, value: int) -> bytes:
    return data[:offset] + value.to_bytes(size, "little") + data[offset + size :]


@pytest.mark.parametrize("version", VERSIONS)
def test_memory_that_was_shared_is_read_and_written(version: int) -> None:
    world = World(version)
    ranges = [(RAM + 5 * PAGE, 1), (RAM + 9 * PAGE, 2)]
    handle = world.driver.give(ranges, SP)
    assert world.secure.grants.pages() == {(RAM >> 12) + at for at in (5, 9, 10)}
    assert world.driver.message(SP, Command.RETRIEVE, handle)[:2] == (0, 3 * PAGE)
    world.memory.write_u64(RAM + 10 * PAGE + 8, 0xABCD)
    assert world.driver.message(SP, Command.READ, handle, 2 * PAGE + 8)[:2] == (0, 0xABCD)
    assert world.driver.message(SP, Command.WRITE, handle, 0, 77)[0] == 0
    assert world.memory.read_u64(RAM + 5 * PAGE) == 77
    assert world.events == [SecureMemory("share", handle, 3)]


def test_it_gives_back_what_no_partition_has_mapped() -> None:
    world = World()
    handle = world.driver.give([(RAM + 5 * PAGE, 1)], SP, Function.FFA_MEM_LEND_64)
    world.driver.message(SP, Command.RETRIEVE, handle)
    world.refuses(Status.DENIED, Function.FFA_MEM_RECLAIM, *ffa.handle_words(handle), 0)
    assert world.driver.message(SP, Command.RELINQUISH, handle)[0] == 0
    assert world.driver.message(SP, Command.READ, handle, 0)[0] == Status.DENIED & ffa.W_MASK
    world.driver.reclaim(handle)
    assert world.secure.grants.pages() == frozenset()
    world.refuses(Status.INVALID_PARAMETERS, Function.FFA_MEM_RECLAIM, *ffa.handle_words(handle))


def test_a_partition_has_only_what_is_for_it() -> None:
    world = World()
    handle = world.driver.give([(RAM + 5 * PAGE, 1)], SP)
    denied = Status.DENIED & ffa.W_MASK
    assert world.driver.message(OTHER_SP, Command.RETRIEVE, handle)[0] == denied
    assert world.driver.message(SP, Command.READ, handle, 0)[0] == denied
    world.driver.message(SP, Command.RETRIEVE, handle)
    for offset in (PAGE, PAGE - 4, 1 << 63):
        answer = world.driver.message(SP, Command.READ, handle, offset)
        assert answer[0] == Status.INVALID_PARAMETERS & ffa.W_MASK
    assert world.driver.message(SP, 99)[0] == Status.NOT_SUPPORTED & ffa.W_MASK
    assert world.driver.message(SP, Command.PING, 41)[:2] == (0, 42)
    world.refuses(Status.INVALID_PARAMETERS, Function.FFA_MSG_SEND_DIRECT_REQ_64, 0x8009)
    world.refuses(Status.INVALID_PARAMETERS, Function.FFA_MSG_SEND_DIRECT_REQ_32, 7 << 16 | SP)


@pytest.mark.parametrize("fragment", [112, 128, 1024, PAGE])
def test_fragments_make_a_whole(fragment: int) -> None:
    world = World()
    ranges = [(RAM + (2 * at + 4) * PAGE, 1) for at in range(300)]
    handle = world.driver.give(ranges, SP, fragment=fragment)
    assert world.secure.grants.pages() == {pa >> 12 for pa, _ in ranges}
    assert world.driver.message(SP, Command.RETRIEVE, handle)[1] == 300 * PAGE
    whole = retrieve(world, handle)
    assert ffa_memory.read_constituents(whole[96:]) == [Constituent(*item) for item in ranges]


def retrieve(world: World, handle: int) -> bytes:
    """What the hypervisor would get."""
    request = ffa_memory.write_transaction(world.driver.version, [], receivers=[], handle=handle)[
        :48
    ]
    world.memory.write(TX, request)
    answer = world.driver.call(Function.FFA_MEM_RETRIEVE_REQ_32, 48, 48)
    assert answer[0] == Function.FFA_MEM_RETRIEVE_RESP
    whole = world.memory.read(RX, answer[2])
    while len(whole) < answer[1]:
        words = ffa.handle_words(handle)
        world.refuses(Status.BUSY, Function.FFA_MEM_FRAG_RX, *words, len(whole))
        world.driver.call(Function.FFA_RX_RELEASE)
        part = world.driver.call(Function.FFA_MEM_FRAG_RX, *words, len(whole))
        whole += world.memory.read(RX, part[3])
    world.driver.call(Function.FFA_RX_RELEASE)
    return whole


def test_a_bad_fragment_ends_the_transaction() -> None:
    ranges = [(RAM + (2 * at + 4) * PAGE, 1) for at in range(8)]
    data = transaction(*ranges)
    last = ffa_memory.write_constituents([Constituent(RAM + 5 * PAGE + 8, 1)] * 4)
    for length, rest in ((64, last), (7, last), (0, last), (32, data), (80, data)):
        world = World()
        world.memory.write(TX, data[:160])
        answer = world.driver.call(SHARE, len(data), 160)
        assert answer[0] == Function.FFA_MEM_FRAG_RX
        assert answer[3] == 160
        world.memory.write(TX, rest)
        with pytest.raises(FfaCallError):
            world.driver.call(Function.FFA_MEM_FRAG_TX, answer[1], answer[2], length)
        assert world.secure.grants.by_handle == {}


def test_a_transaction_may_be_given_up_half_way() -> None:
    world = World()
    data = transaction((RAM + 4 * PAGE, 1), (RAM + 8 * PAGE, 1))
    world.memory.write(TX, data[:112])
    answer = world.driver.call(SHARE, len(data), 112)
    handle = ffa.handle_of(answer[1], answer[2])
    retrieve_it = world.driver.message(SP, Command.RETRIEVE, handle)
    assert retrieve_it[0] == Status.INVALID_PARAMETERS & ffa.W_MASK
    world.driver.reclaim(handle)
    assert world.secure.grants.pages() == frozenset()


GOOD = transaction((RAM + 4 * PAGE, 2))
HEADER, ENDPOINT, COMPOSITE, FIRST = 0, 48, 80, 96


@pytest.mark.parametrize(
    "data",
    [
        GOOD[:40],
        GOOD[:-1],
        edit(GOOD, HEADER, 2, 1),
        edit(GOOD, 8, 8, 5),
        edit(GOOD, 24, 4, 8),
        edit(GOOD, 28, 4, 0),
        edit(GOOD, 28, 4, 3),
        edit(GOOD, 28, 4, 0xFFFF_FFFF),
        edit(GOOD, 32, 4, 0xFFFF_FFF0),
        edit(GOOD, ENDPOINT, 2, 0x8009),
        edit(GOOD, ENDPOINT + 4, 4, 0xFFFF_FFF8),
        edit(GOOD, ENDPOINT + 4, 4, 0),
        edit(GOOD, COMPOSITE, 4, 1),
        edit(GOOD, COMPOSITE, 4, 3),
        edit(GOOD, COMPOSITE + 4, 4, 0),
        edit(GOOD, COMPOSITE + 4, 4, 1 << 28),
        edit(GOOD, FIRST, 8, RAM + 8),
        edit(GOOD, FIRST + 8, 4, 0),
        transaction(),
    ],
    ids=range(19),
)
def test_descriptors_that_lie(data: bytes) -> None:
    World().refuses_to_take(Status.INVALID_PARAMETERS, data)


def test_memory_that_is_not_there_or_given_already() -> None:
    world = World()
    wrap = transaction((RAM + 4 * PAGE, 0xFFFF_FFFF))
    for data in (transaction((0x1000, 1)), wrap, transaction(((1 << 64) - PAGE, 1))):
        world.refuses_to_take(Status.DENIED, data)
    twice = transaction((RAM + 4 * PAGE, 2), (RAM + 5 * PAGE, 1))
    world.refuses_to_take(Status.DENIED, twice)
    world.driver.give([(RAM + 4 * PAGE, 2)], SP)
    world.refuses_to_take(Status.DENIED, transaction((RAM + 5 * PAGE, 1)))


def test_lengths_that_lie() -> None:
    world = World()
    for total in (0, len(GOOD) - 16, len(GOOD) + 16):
        world.refuses_to_take(Status.INVALID_PARAMETERS, GOOD, total)
    world.refuses_to_take(Status.NO_MEMORY, GOOD, MAX_BYTES + 16)
    world.refuses(Status.INVALID_PARAMETERS, SHARE, 8192, 4097)
    world.refuses(Status.INVALID_PARAMETERS, SHARE, 200, 100, TX, 1)


def test_there_is_an_end_to_transactions() -> None:
    world = World()
    for at in range(MAX_TRANSACTIONS):
        world.driver.give([(RAM + (4 + at) * PAGE, 1)], SP)
    world.refuses_to_take(Status.NO_MEMORY, transaction((RAM + 200 * PAGE, 1)))


def test_buffers() -> None:
    world = World(mapped=False)
    call = Function.FFA_RXTX_MAP_64
    for arguments in ((TX + 8, RX, 1), (TX, TX, 1), (TX, RX, 2), (TX, RX, 0), (0, RX, 1)):
        world.refuses(Status.INVALID_PARAMETERS, call, *arguments)
    for function in (SHARE, Function.FFA_PARTITION_INFO_GET, Function.FFA_RXTX_UNMAP):
        world.refuses(Status.INVALID_PARAMETERS, function)
    world.driver.map_buffers()
    world.refuses(Status.DENIED, call, TX, RX, 1)
    world.refuses(Status.DENIED, Function.FFA_RX_RELEASE)
    assert [it.endpoint for it in world.driver.partitions()] == [SP, OTHER_SP]
    world.driver.call(Function.FFA_PARTITION_INFO_GET, *PARTITIONS[SP])
    world.refuses(Status.BUSY, Function.FFA_PARTITION_INFO_GET)
    world.refuses(Status.INVALID_PARAMETERS, Function.FFA_PARTITION_INFO_GET, 1, 2, 3, 4)
    answer = world.driver.call(Function.FFA_PARTITION_INFO_GET, 0, 0, 0, 0, ffa.COUNT_ONLY)
    assert answer[2:4] == (2, 0)
    world.driver.unmap_buffers()


def test_versions() -> None:
    world = World(ffa.VERSION_1_0, mapped=False)
    for asked in (0x1_0000 << 1, 0x8001_0000, 0):
        assert world.smc(ffa.registers(Function.FFA_VERSION, asked))[0] == 0xFFFF_FFFF
    assert world.smc(ffa.registers(Function.FFA_VERSION, 0x1_0009))[0] == ffa.VERSION_1_2
    world.driver.map_buffers()
    assert world.smc(ffa.registers(Function.FFA_VERSION, 0x1_0000))[0] == 0xFFFF_FFFF
    world.driver.call(Function.FFA_FEATURES, SHARE)
    world.refuses(Status.NOT_SUPPORTED, Function.FFA_FEATURES, Function.FFA_MSG_SEND)
    world.refuses(Status.NOT_SUPPORTED, Function.FFA_MSG_SEND)
    assert world.driver.call(Function.FFA_ID_GET)[2] == ffa.NORMAL_WORLD
    assert world.driver.call(Function.FFA_SPM_ID_GET)[2] == ffa.SPMC


def test_donated_memory_stays() -> None:
    world = World()
    handle = world.driver.give([(RAM + 4 * PAGE, 1)], SP, Function.FFA_MEM_DONATE_64)
    world.refuses(Status.DENIED, Function.FFA_MEM_RECLAIM, *ffa.handle_words(handle))


@settings(max_examples=150, deadline=None)
@given(
    version=st.sampled_from(VERSIONS),
    edits=st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 1 << 32) | st.sampled_from([0, 16, 48, 64])),
        max_size=4,
    ),
    total=st.integers(0, 400) | st.just(128),
    length=st.integers(0, 4200) | st.just(128),
)
def test_no_descriptor_hurts(
    version: int, edits: list[tuple[int, int]], total: int, length: int
) -> None:
    """Whatever lies in the buffer: an answer, and on an error nothing is kept."""
    world = World(version)
    data = transaction((RAM + 4 * PAGE, 2), (RAM + 7 * PAGE, 1), version=version)
    for word, value in edits:
        data = edit(data, 4 * word, 4, value & 0xFFFF_FFFF)
    world.memory.write(TX, data)
    answer = world.smc(ffa.registers(SHARE, total, length))
    if ffa.status_of(answer) is not None:
        assert world.secure.grants.by_handle == {}
    for at in range(16):
        world.smc(ffa.registers(Function.FFA_MEM_FRAG_TX + at % 2, answer[1], answer[2], 16 * at))
