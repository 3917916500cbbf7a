# SPDX-License-Identifier: GPL-2.0-or-later
"""The bus: translation, the TLB's honesty about missing invalidations, faults, devices, locks."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fakes.stage2_trees import (
    BLOCK_RWX,
    GIB1,
    KIB4,
    MIB2,
    PAGE_RO,
    PAGE_RWX,
    PAGE_WO,
    RAM,
    Tree,
    rubbish_word,
)
from pkvm.machine import tlb as tlb_module
from pkvm.machine.bus import FAULT_RETRIES, Bus
from pkvm.machine.memory import BusError, DeviceWindow, PhysicalMemory
from pkvm.machine.stage2 import Access, Stage2Fault, walk
from pkvm.machine.tlb import TlbEntry

RAM_BYTES = 8 << 20
DATA = RAM + (4 << 20)


@pytest.fixture
def memory() -> PhysicalMemory:
    return PhysicalMemory(RAM, RAM_BYTES)


@pytest.fixture
def tree(memory: PhysicalMemory) -> Tree:
    return Tree(memory, RAM)


@pytest.fixture
def bus(memory: PhysicalMemory, tree: Tree) -> Bus:
    bus = Bus(memory, "test")
    bus.attach(tree.context)
    return bus


class TestBypass:
    def test_addresses_are_physical(self, memory: PhysicalMemory) -> None:
        bus = Bus(memory, "test")
        assert bus.context is None
        bus.write(DATA - 3, b"abcdef")
        assert memory.read(DATA - 3, 6) == b"abcdef"
        assert bus.read(DATA - 3, 6) == b"abcdef"
        bus.write_u64(DATA, 1 << 63)
        assert bus.read_u64(DATA) == 1 << 63

    @pytest.mark.parametrize("pa", [0, RAM - 1, RAM + RAM_BYTES, 1 << 64, -8])
    def test_nothing_answers_outside_ram(self, memory: PhysicalMemory, pa: int) -> None:
        bus = Bus(memory, "test")
        for _ in range(2):
            with pytest.raises(BusError):
                bus.read(pa, 1)
            with pytest.raises(BusError):
                bus.write_u64(pa, 1)

    def test_bytes_before_the_end_of_ram_are_reached(self, memory: PhysicalMemory) -> None:
        bus = Bus(memory, "test")
        with pytest.raises(BusError):
            bus.write(RAM + RAM_BYTES - 2, b"abcd")
        assert memory.read(RAM + RAM_BYTES - 2, 2) == b"ab"

    def test_attaching_a_stage_2_ends_it_at_once(self, memory: PhysicalMemory, tree: Tree) -> None:
        bus = Bus(memory, "test")
        bus.write_u64(DATA, 1)
        bus.attach(tree.context)
        with pytest.raises(Stage2Fault):
            bus.read_u64(DATA)


class TestAccess:
    def test_pages_are_split_and_joined(self, memory: PhysicalMemory, tree: Tree, bus: Bus) -> None:
        for index, pa in enumerate((DATA + 5 * KIB4, DATA, DATA + KIB4, DATA + 9 * KIB4)):
            tree.page(index * KIB4, pa)
        payload = bytes(range(256)) * 64
        bus.write(0x800, payload[:0x3000])
        assert bus.read(0x800, 0x3000) == payload[:0x3000]
        assert memory.read(DATA + 5 * KIB4 + 0x800, 0x800) == payload[:0x800]
        assert memory.read(DATA, 0x2000) == payload[0x800:0x2800]
        assert memory.read(DATA + 9 * KIB4, 0x800) == payload[0x2800:0x3000]

    def test_a_run_may_mix_pages_and_blocks(
        self, memory: PhysicalMemory, tree: Tree, bus: Bus
    ) -> None:
        tree.block(0, DATA)
        tree.page(MIB2, DATA + MIB2)
        tree.page(MIB2 + KIB4, DATA)
        memory.write(DATA + MIB2 - 1, b"abc")
        assert bus.read(MIB2 - 1, 3) == b"abc"
        assert len(bus.read(0, MIB2 + 2 * KIB4)) == MIB2 + 2 * KIB4

    def test_length_zero_touches_nothing(self, bus: Bus) -> None:
        assert bus.read(0, 0) == b""
        bus.write(0, b"")
        with pytest.raises(ValueError, match="cannot read -1"):
            bus.read(0, -1)

    @pytest.mark.parametrize("data", [b"abcd", bytearray(b"abcd"), memoryview(b"abcd")])
    def test_what_bytes_may_be(
        self, tree: Tree, bus: Bus, data: bytes | bytearray | memoryview
    ) -> None:
        tree.page(0, DATA)
        tree.page(KIB4, DATA + 8 * KIB4)
        bus.write(0xFFE, data)
        assert bus.read(0xFFE, 4) == b"abcd"

    def test_words(self, memory: PhysicalMemory, tree: Tree, bus: Bus) -> None:
        tree.page(0, DATA)
        tree.page(KIB4, DATA + 8 * KIB4)
        for address in (0, 0xFF8, 0x123, 0xFFC):
            for _ in range(2):
                bus.write_u64(address, 0x1122_3344_5566_7788)
                assert bus.read_u64(address) == 0x1122_3344_5566_7788
                assert bus.read(address, 8) == bytes.fromhex("8877665544332211")
        for address in (0, 0x123):
            for value in (1 << 64, -1):
                with pytest.raises(ValueError, match=r"64-bit|format 'Q'"):
                    bus.write_u64(address, value)

    def test_pages_before_the_refused_one_are_written(
        self, memory: PhysicalMemory, tree: Tree, bus: Bus
    ) -> None:
        tree.page(0, DATA)
        tree.page(KIB4, DATA + KIB4, PAGE_RO)
        with pytest.raises(Stage2Fault) as caught:
            bus.write(0xFFC, b"abcdefgh")
        assert (caught.value.ipa, caught.value.fsc) == (0x1000, 0x0F)
        assert memory.read(DATA + 0xFFC, 8) == b"abcd\0\0\0\0"
        with pytest.raises(Stage2Fault) as caught:
            bus.read(0x1FF8, 16)
        assert (caught.value.ipa, caught.value.fsc) == (0x2000, 0x07)

    def test_permissions_are_of_the_access(self, tree: Tree, bus: Bus) -> None:
        tree.page(0, DATA, PAGE_RO)
        tree.page(KIB4, DATA, PAGE_WO)
        assert bus.read_u64(0) == 0
        bus.write_u64(KIB4, 5)
        assert bus.read_u64(0) == 5
        for _ in range(2):
            with pytest.raises(Stage2Fault, match=r"write of IPA 0x0 .* permission"):
                bus.write_u64(0, 1)
            with pytest.raises(Stage2Fault, match=r"read of IPA 0x1000 .* permission"):
                bus.read_u64(KIB4)


class TestTlb:
    @pytest.mark.parametrize("level", [1, 2, 3])
    def test_a_stale_translation_serves_until_it_is_invalidated(
        self, memory: PhysicalMemory, tree: Tree, bus: Bus, level: int
    ) -> None:
        address = GIB1 + 0x1008
        if level == 1:
            tree.block(GIB1, GIB1 * 2, 1)
        elif level == 2:
            tree.block(GIB1, RAM + (4 << 20), 2)
        else:
            tree.page(GIB1 + KIB4, DATA)
        where = walk(memory, tree.context, address, Access.READ).pa
        bus.write_u64(address, 77)
        tree.put(address, level, 0)
        assert bus.read_u64(address) == 77
        bus.write_u64(address, 78)
        assert bus.read(address, 8) == memory.read(where, 8)
        bus.invalidate(address + KIB4 * (level < 3))
        with pytest.raises(Stage2Fault):
            bus.read_u64(address)
        with pytest.raises(Stage2Fault):
            bus.write_u64(address, 1)

    def test_a_stale_translation_serves_bulk_accesses_too(
        self, memory: PhysicalMemory, tree: Tree, bus: Bus
    ) -> None:
        for index in range(8):
            tree.page(index * KIB4, DATA + index * KIB4)
        memory.write(DATA + 3 * KIB4, b"old")
        memory.write(DATA + (1 << 20), b"new")
        bus.read(3 * KIB4, 1)
        tree.page(3 * KIB4, DATA + (1 << 20))
        assert bus.read(0, 8 * KIB4)[3 * KIB4 : 3 * KIB4 + 3] == b"old"
        bus.invalidate()
        assert bus.read(0, 8 * KIB4)[3 * KIB4 : 3 * KIB4 + 3] == b"new"
        bus.invalidate()
        bus.read(3 * KIB4, 1)
        tree.page(3 * KIB4, DATA + 3 * KIB4)  # now all eight follow each other in the tables
        assert bus.read(0, 8 * KIB4)[3 * KIB4 : 3 * KIB4 + 3] == b"new"
        bus.invalidate(3 * KIB4)
        assert bus.read(0, 8 * KIB4)[3 * KIB4 : 3 * KIB4 + 3] == b"old"

    def test_invalidating_another_page_does_not_help(self, tree: Tree, bus: Bus) -> None:
        tree.page(0, DATA)
        tree.page(KIB4, DATA + KIB4)
        bus.read(0, 8 * 1024)
        tree.put(0, 3, 0)
        bus.invalidate(KIB4)
        assert bus.read(0, 1) == b"\0"
        bus.invalidate()
        with pytest.raises(Stage2Fault):
            bus.read(0, 1)

    def test_faults_are_not_cached(self, tree: Tree, bus: Bus) -> None:
        with pytest.raises(Stage2Fault):
            bus.read(0, 1)
        tree.page(0, DATA)
        assert bus.read(0, 1) == b"\0"

    def test_a_permission_miss_walks_again(self, tree: Tree, bus: Bus) -> None:
        tree.page(0, DATA, PAGE_RO)
        assert bus.read_u64(0) == 0
        tree.page(0, DATA)
        bus.write_u64(0, 5)
        assert bus.read_u64(0) == 5

    def test_revoked_write_permission_is_cached_from_a_load(self, tree: Tree, bus: Bus) -> None:
        tree.page(0, DATA)
        assert bus.read_u64(0) == 0
        tree.page(0, DATA, PAGE_RO)
        bus.write_u64(0, 5)
        bus.invalidate(0)
        with pytest.raises(Stage2Fault):
            bus.write_u64(0, 6)
        assert bus.read_u64(0) == 5

    def test_what_it_holds_can_be_seen(self, tree: Tree, bus: Bus) -> None:
        tree.page(0, DATA, PAGE_RO)
        tree.block(MIB2, RAM)
        bus.read(0, 1)
        bus.read(MIB2 + 5, 1)
        assert set(bus.tlb_entries()) == {
            TlbEntry(0, KIB4, DATA, Access.READ),
            TlbEntry(MIB2, MIB2, RAM, Access.READ),
            TlbEntry(MIB2, MIB2, RAM, Access.WRITE),
        }
        bus.invalidate()
        assert bus.tlb_entries() == []

    def test_it_is_bounded(self, tree: Tree, bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tlb_module, "TLB_PAGES", 16)
        for index in range(64):
            tree.page(index * KIB4, DATA + (index * 7 & 63) * KIB4)
        for index in range(64):
            bus.write_u64(index * KIB4, index)
            assert len(bus.tlb_entries()) <= 32
        assert [bus.read_u64(index * KIB4) for index in range(64)] == list(range(64))


class TestFaultHandler:
    def test_it_maps_and_the_access_goes_on(
        self, memory: PhysicalMemory, tree: Tree, bus: Bus
    ) -> None:
        seen: list[tuple[int, Access, int]] = []

        def on_fault(ipa: int, access: Access, fsc: int) -> bool:
            seen.append((ipa, access, fsc))
            tree.page(ipa & ~0xFFF, DATA + (ipa & ~0xFFF))
            bus.invalidate(ipa)  # would never return if the lock were held
            return True

        bus.on_fault = on_fault
        bus.write(0x10FFE, b"abcd")
        assert seen == [(0x10FFE, Access.WRITE, 0x05), (0x11000, Access.WRITE, 0x07)]
        assert memory.read(DATA + 0x10FFE, 4) == b"abcd"
        assert bus.read_u64(0x12000) == 0
        bus.write_u64(0x13000, 1)
        assert seen[2:] == [(0x12000, Access.READ, 0x07), (0x13000, Access.WRITE, 0x07)]

    def test_it_may_refuse(self, bus: Bus) -> None:
        bus.on_fault = lambda _ipa, _access, _fsc: False
        with pytest.raises(Stage2Fault) as caught:
            bus.read(0x5000, 4)
        assert caught.value.ipa == 0x5000

    def test_one_that_maps_nothing_is_asked_a_few_times_only(self, bus: Bus) -> None:
        asked: list[int] = []

        def on_fault(ipa: int, _access: Access, _fsc: int) -> bool:
            asked.append(ipa)
            return True

        bus.on_fault = on_fault
        for access in (lambda: bus.read(0x5000, 4), lambda: bus.write(0x5000, b"1")):
            asked.clear()
            with pytest.raises(Stage2Fault):
                access()
            assert asked == [0x5000] * FAULT_RETRIES

    def test_retries_are_counted_for_each_page(self, tree: Tree, bus: Bus) -> None:
        asked: dict[int, int] = {}

        def on_fault(ipa: int, _access: Access, _fsc: int) -> bool:
            asked[ipa] = asked.get(ipa, 0) + 1
            if asked[ipa] == FAULT_RETRIES:
                tree.page(ipa, DATA + ipa % MIB2)
            return True

        bus.on_fault = on_fault
        assert bus.read(0, 6 * KIB4) == bytes(6 * KIB4)
        assert asked == {index * KIB4: FAULT_RETRIES for index in range(6)}


class TestDevices:
    @pytest.fixture
    def log(self, memory: PhysicalMemory, tree: Tree, bus: Bus) -> list[tuple[object, ...]]:
        log: list[tuple[object, ...]] = []

        def read(offset: int, size: int) -> int:
            log.append(("read", offset, size))
            return 0x42

        def write(offset: int, size: int, value: int) -> None:
            log.append(("write", offset, size, value))

        def work() -> None:
            bus.invalidate()  # would never return if the lock were held
            log.append(("work",))

        memory.add_window(DeviceWindow("device", 0x1000_0000, 2 * KIB4, read, write, work))
        tree.page(0x5000, 0x1000_0000)
        tree.page(0x6000, 0x1000_1000)
        return log

    def test_registers_are_behind_the_same_translation(
        self, tree: Tree, bus: Bus, log: list[tuple[object, ...]]
    ) -> None:
        assert bus.read(0x5008, 4) == b"\x42\0\0\0"
        bus.write(0x5010, b"\x07\0")
        assert bus.read_u64(0x5018) == 0x42
        bus.write_u64(0x5020, 1 << 63)
        assert log == [
            ("read", 8, 4), ("work",),
            ("write", 0x10, 2, 7), ("work",),
            ("read", 0x18, 8), ("work",),
            ("write", 0x20, 8, 1 << 63), ("work",),
        ]  # fmt: skip
        tree.put(0x5000, 3, 0)
        bus.invalidate(0x5000)
        with pytest.raises(Stage2Fault):
            bus.read(0x5008, 4)

    def test_bulk_accesses_to_registers_are_bus_errors(
        self, bus: Bus, log: list[tuple[object, ...]]
    ) -> None:
        for access in (lambda: bus.read(0x5000, 64), lambda: bus.write(0x5000, bytes(4096))):
            with pytest.raises(BusError):
                access()
        assert log == []

    def test_an_access_to_registers_is_split_at_a_page_too(
        self, bus: Bus, log: list[tuple[object, ...]]
    ) -> None:
        assert bus.read_u64(0x5FFC) == 0x42_0000_0042
        assert log == [("read", 0xFFC, 4), ("work",), ("read", 0x1000, 4), ("work",)]

    def test_a_bulk_access_that_runs_into_registers(
        self, memory: PhysicalMemory, tree: Tree, bus: Bus, log: list[tuple[object, ...]]
    ) -> None:
        tree.page(0x4000, DATA)
        bus.write(0x4FFF, b"ab")
        assert memory.read(DATA + 0xFFF, 1) == b"a"
        assert log == [("write", 0, 1, ord("b")), ("work",)]


class TestWriteWatch:
    def test_it_hears_of_each_write_to_ram(self, tree: Tree, bus: Bus) -> None:
        heard: list[tuple[int, int]] = []
        bus.on_write = lambda pa, length: heard.append((pa, length))
        for index in range(4):
            tree.page(index * KIB4, DATA + index * KIB4)
        tree.page(4 * KIB4, DATA + (1 << 20))
        tree.block(MIB2, DATA)
        bus.write(0x10, bytes(5 * KIB4 - 0x10))
        assert heard == [(DATA + 0x10, 4 * KIB4 - 0x10), (DATA + (1 << 20), KIB4)]
        bus.write_u64(0x20, 1)
        bus.write_u64(MIB2 + 0x28, 1)
        bus.write_u64(0xFFC, 1)
        assert heard[2:] == [(DATA + 0x20, 8), (DATA + 0x28, 8), (DATA + 0xFFC, 8)]
        bus.read(0, KIB4)
        with pytest.raises(Stage2Fault):
            bus.write(5 * KIB4, b"x")
        assert len(heard) == 5


def test_invalidate_waits_for_the_access_under_way(
    memory: PhysicalMemory, tree: Tree, bus: Bus
) -> None:
    """A device that looks round while it answers stands for any access in flight."""
    invalidated = threading.Event()
    in_time: list[bool] = []

    def invalidate() -> None:
        bus.invalidate(0)
        invalidated.set()

    other = threading.Thread(target=invalidate)

    def read(_offset: int, _size: int) -> int:
        other.start()
        in_time.append(invalidated.wait(0.1))
        return 1

    memory.add_window(DeviceWindow("slow", 0x1000_0000, KIB4, read, lambda *_: None))
    tree.page(0, 0x1000_0000)
    assert bus.read_u64(0) == 1
    other.join(10)
    assert invalidated.is_set()
    assert in_time == [False]


def test_no_write_lands_after_the_invalidation(
    memory: PhysicalMemory, tree: Tree, bus: Bus
) -> None:
    for _ in range(20):
        tree.page(0, DATA)
        writing = threading.Event()

        def write(writing: threading.Event = writing) -> None:
            try:
                while True:
                    bus.write_u64(0, 1)
                    writing.set()
            except Stage2Fault:
                return

        writer = threading.Thread(target=write)
        writer.start()
        assert writing.wait(10)
        tree.put(0, 3, 0)
        bus.invalidate(0)
        memory.write_u64(DATA, 2)
        writer.join(10)
        assert not writer.is_alive()
        assert memory.read_u64(DATA) == 2


def test_a_fault_handler_and_an_invalidation_may_meet(tree: Tree, bus: Bus) -> None:
    """Both have EL2's lock: one comes from the bus, the other goes to it."""
    el2 = threading.Lock()
    faults = 0

    def on_fault(ipa: int, _access: Access, _fsc: int) -> bool:
        nonlocal faults
        with el2:
            faults += 1
            tree.page(ipa & ~0xFFF, DATA)
        return True

    def revoke() -> None:
        while not done.is_set():
            with el2:
                tree.put(0, 3, 0)
                bus.invalidate(0)

    bus.on_fault = on_fault
    done = threading.Event()
    revoker = threading.Thread(target=revoke)
    revoker.start()
    refused = 0
    for _ in range(300):
        try:
            assert bus.read_u64(0) == 0
        except Stage2Fault:
            refused += 1  # revoked again as often as it was mapped
    done.set()
    revoker.join(10)
    assert not revoker.is_alive()
    assert faults >= refused * FAULT_RETRIES


IPA_PAGES = 24
PA_PAGES = 6


class BusAgainstWalker(RuleBasedStateMachine):
    """Random tables with invalidations where due: the bus does what the walker says."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = PhysicalMemory(RAM, RAM_BYTES)
        self.tree = Tree(self.memory, RAM)
        self.bus = Bus(self.memory, "test")
        self.bus.attach(self.tree.context)

    @rule(
        page=st.integers(0, IPA_PAGES - 1),
        count=st.integers(1, 8),
        pa_page=st.integers(0, PA_PAGES - 1),
        low=st.sampled_from((0, 2, PAGE_RWX, PAGE_RWX, PAGE_RWX, PAGE_RO, PAGE_WO)),
    )
    def change_pages(self, page: int, count: int, pa_page: int, low: int) -> None:
        for index in range(count):
            ipa = MIB2 + (page + index) * KIB4
            pa = (DATA + (pa_page + index) * KIB4) if low & 1 else 0
            self.tree.put(ipa, 3, pa | low)
            self.bus.invalidate(ipa)

    @rule(low=st.sampled_from((0, BLOCK_RWX, BLOCK_RWX & ~0x80)))
    def change_the_block_below(self, low: int) -> None:
        self.tree.put(0, 2, RAM + (6 << 20) | low if low else 0)
        self.bus.invalidate(0x1234)

    def reachable(self, ipa: int, length: int, access: Access) -> tuple[list[int], bool]:
        """PAs of the bytes that an access reaches, and whether it reaches all."""
        where = []
        for address in range(ipa, ipa + length):
            try:
                where.append(walk(self.memory, self.tree.context, address, access).pa)
            except Stage2Fault:
                return where, False
        return where, True

    @rule(ipa=st.integers(MIB2 - 64, MIB2 + IPA_PAGES * KIB4), length=st.integers(0, 64))
    def read(self, ipa: int, length: int) -> None:
        self.check_read(ipa, length)

    @rule(page=st.integers(-2, IPA_PAGES), back=st.integers(0, 8))
    def read_over_pages(self, page: int, back: int) -> None:
        self.check_read(MIB2 + page * KIB4 - back, KIB4 + 16)

    def check_read(self, ipa: int, length: int) -> None:
        where, all_of_it = self.reachable(ipa, length, Access.READ)
        if all_of_it:
            expected = b"".join(self.memory.read(pa, 1) for pa in where)
            assert self.bus.read(ipa, length) == expected
            if length == 8:
                assert self.bus.read_u64(ipa) == int.from_bytes(expected, "little")
        else:
            with pytest.raises(Stage2Fault) as caught:
                self.bus.read(ipa, length)
            assert caught.value.ipa == ipa + len(where)

    @rule(
        ipa=st.integers(MIB2 - 64, MIB2 + IPA_PAGES * KIB4),
        data=st.binary(max_size=64),
        word=st.booleans(),
    )
    def write(self, ipa: int, data: bytes, word: bool) -> None:
        if word:
            data = (data + bytes(8))[:8]
        where, all_of_it = self.reachable(ipa, len(data), Access.WRITE)
        expected = bytearray(self.memory.read(DATA, 4 << 20))
        for pa, byte in zip(where, data, strict=False):
            expected[pa - DATA] = byte
        if not all_of_it:
            with pytest.raises(Stage2Fault) as caught:
                self.bus.write(ipa, data)
            assert caught.value.ipa == ipa + len(where)
        elif word:
            self.bus.write_u64(ipa, int.from_bytes(data, "little"))
        else:
            self.bus.write(ipa, data)
        assert self.memory.read(DATA, 4 << 20) == expected

    @invariant()
    def the_tlb_holds_nothing_that_the_tables_deny(self) -> None:
        for entry in self.bus.tlb_entries():
            found = walk(self.memory, self.tree.context, entry.ipa, entry.access)
            assert found.pa == entry.pa


BusAgainstWalker.TestCase.settings = settings(max_examples=40, stateful_step_count=25)
TestBusAgainstWalker = BusAgainstWalker.TestCase


@given(
    words=st.lists(st.tuples(st.integers(0, 4 * 512 - 1), rubbish_word), max_size=40),
    accesses=st.lists(st.tuples(st.integers(0, 1 << 65), st.integers(0, 9000)), max_size=10),
)
def test_rubbish_tables_give_bytes_or_a_fault(
    words: list[tuple[int, int]], accesses: list[tuple[int, int]]
) -> None:
    memory = PhysicalMemory(RAM, 16 * KIB4)
    tree = Tree(memory, RAM)
    for index, word in words:
        memory.words[index] = word
    bus = Bus(memory, "test")
    bus.attach(tree.context)
    for ipa, length in accesses:
        for base in (ipa, ipa % (1 << 22)):
            try:
                assert len(bus.read(base, length)) == length
                bus.write(base, bytes(length))
            except (Stage2Fault, BusError):
                pass
