# SPDX-License-Identifier: GPL-2.0-or-later
"""The SMMU, driven through its registers and tables as software (or an attacker) does."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import smmu_software as s
from fakes.smmu_software import CMDQ, DATA, EVENTQ, LEVEL2, STRTAB, SYNC, Software
from fakes.stage2_trees import KIB4, MIB2, PAGE_RO, PAGE_RWX, RAM, rubbish_word
from pkvm.events import SmmuEvent
from pkvm.machine.memory import BusError
from pkvm.machine.smmu_streams import StreamFault, StreamMaster
from pkvm.machine.stage2 import Access, Stage2Fault

F_TRANSLATION, F_ADDR_SIZE, F_ACCESS, F_PERMISSION = 0x10, 0x11, 0x12, 0x13
C_BAD_STREAMID, F_STE_FETCH, C_BAD_STE, F_WALK_EABT, F_UUT = 2, 3, 4, 0x0B, 1
RNW, S2, CLASS_IN = 1 << 35, 1 << 39, 2 << 40
NOWHERE = 0x4000


@pytest.fixture
def software() -> Software:
    return Software()


@pytest.fixture
def running(software: Software) -> Software:
    """Stream 1 translates: page 0 to DATA, page 1 read-only."""
    software.tree.page(0, DATA)
    software.tree.page(KIB4, DATA + KIB4, PAGE_RO)
    software.translate()
    software.start()
    return software


def device(software: Software, stream: int = 1) -> StreamMaster:
    return software.smmu.master(stream, f"device {stream}")


class TestReset:
    def test_everything_aborts_and_nothing_is_recorded(self, software: Software) -> None:
        with pytest.raises(StreamFault, match="stream 0x1 is blocked"):
            device(software).read(DATA, 8)
        assert software.read(s.GBPA) == 1 << 20
        assert software.events == []

    def test_what_it_is(self, software: Software) -> None:
        idr0 = software.read(0)
        assert idr0 & 3 == 1  # stage 2 and no stage 1
        assert (idr0 >> 2 & 3, idr0 >> 18 & 1, idr0 >> 27 & 3) == (2, 1, 1)
        assert software.read(0x14) & 7 == 2  # 40 bits of output
        software.write(0, 0)
        assert software.read(0) == idr0

    def test_bypass_needs_the_update_bit(self, software: Software) -> None:
        master = device(software)
        software.write(s.GBPA, 0)
        with pytest.raises(StreamFault):
            master.read(DATA, 8)
        software.write(s.GBPA, 1 << 31)
        master.write(DATA, b"bypassed")
        assert software.memory.read(DATA, 8) == b"bypassed"
        software.write(s.GBPA, 1 << 31 | 1 << 20)
        with pytest.raises(StreamFault):
            master.read(DATA, 8)

    @pytest.mark.parametrize(("offset", "size"), [(0x80, 1), (0x82, 2), (0x84, 8), (0x21, 4)])
    def test_a_crooked_access_does_nothing(
        self, software: Software, offset: int, size: int
    ) -> None:
        software.write(offset, (1 << 8 * size) - 1, size)
        assert software.read(offset, size) == 0
        assert software.read(s.STRTAB_BASE, 8) == 0 == software.read(s.CR0)

    def test_what_is_in_use_cannot_be_moved(self, running: Software) -> None:
        for offset, size in ((s.STRTAB_BASE, 8), (s.STRTAB_BASE_CFG, 4), (s.CMDQ_BASE, 8),
                             (s.EVENTQ_BASE, 8), (s.CMDQ_CONS, 4), (s.EVENTQ_PROD, 4)):  # fmt: skip
            before = running.read(offset, size)
            running.write(offset, before ^ 0x3F_FFFF, size)
            assert running.read(offset, size) == before


class TestTranslation:
    def test_loads_and_stores_go_through_the_tree(self, running: Software) -> None:
        master = device(running)
        master.write(8, b"from the device")
        assert running.memory.read(DATA + 8, 15) == b"from the device"
        assert master.read(8, 15) == b"from the device"
        master.write_u64(0x20, 1 << 63)
        assert running.memory.read_u64(DATA + 0x20) == 1 << 63 == master.read_u64(0x20)

    @pytest.mark.parametrize(
        ("low", "access", "kind"),
        [
            (PAGE_RO, "write", F_PERMISSION),
            (0, "read", F_TRANSLATION),
            (PAGE_RWX & ~(1 << 10), "read", F_ACCESS),
            (PAGE_RWX | 1 << 44, "write", F_ADDR_SIZE),
        ],
    )  # fmt: skip
    def test_faults_are_events(self, running: Software, low: int, access: str, kind: int) -> None:
        running.tree.page(NOWHERE, DATA, low)
        master = device(running)
        with pytest.raises(Stage2Fault) as caught:
            master.read(NOWHERE + 4, 4) if access == "read" else master.write(NOWHERE + 4, b"abcd")
        assert caught.value.ipa == NOWHERE + 4
        direction = RNW if access == "read" else 0
        expected = (kind, 1, S2 | CLASS_IN | direction, NOWHERE + 4, NOWHERE)
        assert running.taken() == [expected]
        assert len(running.events) == 1
        event = running.events[0]
        assert isinstance(event, SmmuEvent)
        assert (event.stream, event.ipa, event.access) == (1, NOWHERE + 4, access)

    def test_a_walk_that_leaves_ram_says_where(self, running: Software) -> None:
        running.tree.put(NOWHERE + MIB2, 2, 0x7000_0000 | 3)
        with pytest.raises(Stage2Fault):
            device(running).read(NOWHERE + MIB2, 4)
        (event,) = running.taken()
        assert (event.kind, event.where) == (F_WALK_EABT, 0x7000_0000)
        running.ste(*s.translating(0x7000_0000))
        running.cfgi()
        with pytest.raises(Stage2Fault):
            device(running).read(NOWHERE + MIB2, 4)
        (event,) = running.taken()
        assert (event.kind, event.where) == (F_WALK_EABT, 0x7000_0000)

    def test_without_s2r_nothing_is_recorded(self, running: Software) -> None:
        running.translate(records=False)
        with pytest.raises(Stage2Fault):
            device(running).read(NOWHERE, 4)
        assert running.taken() == [] == running.events

    def test_a_device_may_reach_the_smmu_itself(self, running: Software) -> None:
        running.ste(1 | 4 << 1)
        running.cfgi()
        master = device(running)
        assert master.read(s.BASE, 4) == running.memory.read(s.BASE, 4)
        with pytest.raises(BusError):
            master.read(s.BASE - 8, 8)


class TestStreamTable:
    def test_linear_beyond_its_size(self, running: Software) -> None:
        with pytest.raises(StreamFault, match="C_BAD_STREAMID"):
            device(running, 16).read(0, 4)
        assert [event[:2] for event in running.taken()] == [(C_BAD_STREAMID, 16)]

    def test_unless_it_is_wanted_a_bad_stream_is_not_recorded(self, running: Software) -> None:
        running.write(s.CR0, 0)
        running.write(0x2C, 0)
        running.write(s.CR0, s.SMMUEN | s.EVENTQEN)
        with pytest.raises(StreamFault):
            device(running, 16).read(0, 4)
        assert running.taken() == []

    @pytest.mark.parametrize(("stream", "there"), [(0x41, True), (0x44, False), (0x81, False)])
    def test_two_levels(self, software: Software, stream: int, there: bool) -> None:
        software.tree.page(0, DATA)
        software.memory.write_u64(STRTAB + 8, LEVEL2 | 3)  # streams 0x40 to 0x43
        software.translate(1, table=LEVEL2)
        software.translate(4, table=LEVEL2)
        software.start(log2size=8, split=6)
        master = device(software, stream)
        if there:
            master.write(0, b"two levels")
            assert software.memory.read(DATA, 10) == b"two levels"
            return
        with pytest.raises(StreamFault):
            master.read(0, 4)
        assert software.taken() == [(C_BAD_STREAMID, stream, 0, 0, 0)]

    @pytest.mark.parametrize("span", [0, 8, 31])
    def test_a_span_that_cannot_be(self, software: Software, span: int) -> None:
        software.memory.write_u64(STRTAB, LEVEL2 | span)
        software.start(log2size=8, split=6)
        with pytest.raises(StreamFault):
            device(software, 1).read(0, 4)
        assert [event.kind for event in software.taken()] == [C_BAD_STREAMID]

    @pytest.mark.parametrize("split", [0, 6])
    def test_a_table_that_is_no_ram(self, software: Software, split: int) -> None:
        software.start(log2size=8, split=split, cr0=0)
        software.write(s.STRTAB_BASE, 0x7000_0000, 8)
        software.write(s.CR0, s.SMMUEN | s.EVENTQEN)
        with pytest.raises(StreamFault):
            device(software, 1).read(0, 4)
        (event,) = software.taken()
        assert event.kind == F_STE_FETCH
        software.write(s.CR0, s.EVENTQEN)
        software.write(s.STRTAB_BASE, STRTAB, 8)
        software.memory.write_u64(STRTAB, 0x7000_0000 | 7)
        software.write(s.CR0, s.SMMUEN | s.EVENTQEN)
        with pytest.raises(StreamFault):
            device(software, 1).read(0, 4)
        (event,) = software.taken()
        assert event.kind == (F_STE_FETCH if split else C_BAD_STE)

    @pytest.mark.parametrize(
        ("word", "bits", "why"),
        [
            (0, 1, "not valid"),
            (0, 6 << 1 ^ 5 << 1, "stage 1"),
            (0, 6 << 1 ^ 7 << 1, "both stages"),
            (2, 1 << 51, "AArch32 tables"),
            (2, 1 << 52, "big-endian tables"),
            (2, 1 << 57, "stalls"),
            (2, 1 << 46, "another granule"),
            (2, 2 << 38, "no such start level"),
            (2, 0x3F << 32, "an input of no bits"),
            (3, 1 << 45, "a root beyond the address space"),
        ],
    )
    def test_an_illegal_ste(self, running: Software, word: int, bits: int, why: str) -> None:
        words = list(s.translating(running.tree.context.root))
        words[word] ^= bits
        running.ste(*words)
        with pytest.raises(StreamFault, match="C_BAD_STE"):
            device(running).read(0, 4)
        assert running.taken() == [(C_BAD_STE, 1, 0, 0, 0)], why

    @pytest.mark.parametrize("config", range(4))
    def test_an_ste_that_aborts_is_silent(self, running: Software, config: int) -> None:
        running.ste(1 | config << 1)
        with pytest.raises(StreamFault, match="is blocked"):
            device(running).read(0, 4)
        assert running.taken() == []


class TestInvalidation:
    def test_a_translation_stays_until_its_page_is_invalidated(self, running: Software) -> None:
        master = device(running)
        master.read(0, 4)
        running.tree.page(0, 0, 0)
        master.write(0, b"stale")  # the bug of whoever forgot the TLBI
        assert running.memory.read(DATA, 5) == b"stale"
        running.tlbi_ipa(KIB4)
        running.tlbi_ipa(0, vmid=8)
        assert master.holds(0)
        running.tlbi_ipa(0)
        assert not master.holds(0)
        with pytest.raises(Stage2Fault):
            master.read(0, 4)

    @pytest.mark.parametrize(
        ("command", "gone"),
        [
            ((0x28 | 7 << 32, 0), True),
            ((0x28 | 8 << 32, 0), False),
            ((0x30, 0), True),
            ((0x01 | 1 << 32, 0), False),
            ((0x02 | 1 << 32, 0), False),
            ((0x03 | 1 << 32, 1), False),
        ],
    )
    def test_by_vmid_and_all(self, running: Software, command: tuple[int, int], gone: bool) -> None:
        running.tree.block(MIB2, RAM)
        for master in (device(running), device(running)):
            master.read(0, 4)
            master.read(MIB2, 4)
        running.tree.put(MIB2, 2, 0)
        running.tree.page(0, 0, 0)
        running.command(command, SYNC)
        third = device(running)
        for ipa in (0, MIB2):
            if gone:
                with pytest.raises(Stage2Fault):
                    third.read(ipa, 4)
            else:
                third.read(ipa, 4)  # the TLB is the SMMU's, not the device's

    def test_a_block_goes_with_any_of_its_pages(self, running: Software) -> None:
        running.tree.block(MIB2, RAM)
        master = device(running)
        master.read(MIB2 + 5 * KIB4, 4)
        running.tree.put(MIB2, 2, 0)
        running.tlbi_ipa(MIB2 + 9 * KIB4)
        with pytest.raises(Stage2Fault):
            master.read(MIB2 + 5 * KIB4, 4)

    @pytest.mark.parametrize(
        ("command", "gone"),
        [
            ((0x03 | 1 << 32, 1), True),
            ((0x03 | 2 << 32, 1), False),
            ((0x04 | 1 << 32, 0), True),
            ((0x04 | 2 << 32, 0), False),
            ((0x04 | 9 << 32, 2), False),
            ((0x04 | 9 << 32, 31), True),
            ((0x30, 0), False),
        ],
    )
    def test_a_configuration_stays_until_a_cfgi_names_it(
        self, running: Software, command: tuple[int, int], gone: bool
    ) -> None:
        master = device(running)
        master.read(0, 4)
        running.ste(1)  # abort
        assert master.read(0, 4) == bytes(4)
        running.command(command, SYNC)
        if gone:
            with pytest.raises(StreamFault):
                master.read(0, 4)
        else:
            assert master.read(0, 4) == bytes(4)

    def test_a_bad_configuration_is_kept_as_well(self, running: Software) -> None:
        running.ste(0)
        master = device(running)
        for _ in range(2):
            with pytest.raises(StreamFault):
                master.read(0, 4)
            running.translate()
        running.cfgi()
        assert master.read(0, 4) == bytes(4)

    @pytest.mark.parametrize("leaf", [True, False])
    def test_level_1_is_forgotten_unless_only_the_leaf_is_named(
        self, software: Software, leaf: bool
    ) -> None:
        software.tree.page(0, DATA)
        software.memory.write_u64(STRTAB, LEVEL2 | 3)
        software.translate(1, table=LEVEL2)
        software.start(log2size=8, split=6)
        master = device(software)
        master.read(0, 4)
        software.memory.write_u64(STRTAB, 0)
        software.cfgi(leaf=leaf)
        if leaf:
            master.read(0, 4)
        else:
            with pytest.raises(StreamFault):
                master.read(0, 4)

    def test_an_invalidation_waits_for_the_access_under_way(self, running: Software) -> None:
        inside, go_on, done = threading.Event(), threading.Event(), threading.Event()
        master = device(running)

        def on_write(pa: int, nbytes: int) -> None:
            inside.set()
            assert go_on.wait(10)

        master.on_write = on_write
        writer = threading.Thread(target=master.write, args=(0, b"slow"))
        writer.start()
        assert inside.wait(10)

        def invalidate() -> None:
            running.tlbi_ipa(0)
            done.set()

        invalidator = threading.Thread(target=invalidate)
        invalidator.start()
        assert not done.wait(0.05)
        go_on.set()
        invalidator.join(10)
        writer.join(10)
        assert done.is_set()
        assert not master.holds(0)


class TestCommandQueue:
    def test_it_wraps(self, running: Software) -> None:
        master = device(running)
        for _ in range(25):
            master.read(0, 4)
            assert master.holds(0)
            running.tlbi_ipa(0)
            assert not master.holds(0)
        assert running.read(s.CMDQ_CONS) == running.read(s.CMDQ_PROD) == 50 % 16

    @pytest.mark.parametrize("command", [(0x00, 0), (0x11, 0), (0xFF, 0), (0x46 | 3 << 12, 0)])
    def test_a_bad_command_stops_it(self, running: Software, command: tuple[int, int]) -> None:
        device(running).read(0, 4)
        at = running.read(s.CMDQ_CONS)
        assert running.command(command, (0x30, 0)) == at | 1 << 24
        assert running.read(s.GERROR) ^ running.read(s.GERRORN) == 1
        assert device(running).read(0, 4) == bytes(4)
        running.memory.write_u64(CMDQ + at * 16, SYNC[0])
        running.write(s.GERRORN, running.read(s.GERROR))
        assert running.read(s.CMDQ_CONS) == at + 2
        assert running.smmu.tlb_columns()[7][0][2] == []

    def test_a_queue_of_one_entry_at_the_end_of_ram(self, software: Software) -> None:
        """Its index has a wrap flag and no other bit: a distance of 2 is none."""
        last = software.memory.ram_end - 32
        software.start(cr0=0)
        software.write(s.CMDQ_BASE, last, 8)
        software.memory.write_u64(last, 0x2A | 7 << 32)
        software.write(s.CR0, s.CMDQEN)
        software.write(s.CMDQ_PROD, 2)
        assert software.read(s.CMDQ_CONS) == 0
        software.write(s.CMDQ_PROD, 1)
        assert (software.read(s.CMDQ_CONS), software.read(s.GERROR)) == (1, 0)

    def test_a_queue_that_is_no_ram(self, software: Software) -> None:
        software.start(cr0=0)
        software.write(s.CMDQ_BASE, 0x7000_0000 | 4, 8)
        software.write(s.CR0, s.CMDQEN)
        software.write(s.CMDQ_PROD, 1)
        assert software.read(s.CMDQ_CONS) == 2 << 24
        assert software.read(s.GERROR) == 1


class TestEventQueue:
    def test_overflow_is_said_once_and_must_be_acknowledged(self, running: Software) -> None:
        master = device(running)

        def fault(times: int) -> None:
            for number in range(times):
                with pytest.raises(Stage2Fault):
                    master.read(NOWHERE + number, 1)

        fault(4)
        assert running.read(s.EVENTQ_PROD) == 4
        fault(3)
        assert running.read(s.EVENTQ_PROD) == 4 | 1 << 31
        assert [event.address for event in running.taken()] == [NOWHERE + n for n in range(4)]
        fault(5)
        assert running.read(s.EVENTQ_PROD) == 0
        assert len(running.taken()) == 4

    def test_a_queue_that_is_no_ram(self, software: Software) -> None:
        software.start(cr0=0)
        software.write(s.EVENTQ_BASE, 0x7000_0000, 8)
        software.write(s.CR0, s.SMMUEN | s.EVENTQEN)
        with pytest.raises(StreamFault):
            device(software, 99).read(0, 1)
        assert software.read(s.GERROR) == 4

    def test_switched_off_it_takes_nothing(self, running: Software) -> None:
        running.write(s.CR0, s.SMMUEN)
        with pytest.raises(Stage2Fault):
            device(running).read(NOWHERE, 1)
        assert running.read(s.EVENTQ_PROD) == 0
        assert EVENTQ  # what is there stays
        assert running.memory.read_u64(EVENTQ) == 0

    def test_an_address_of_more_than_64_bits(self, running: Software) -> None:
        with pytest.raises(Stage2Fault):
            device(running).read(1 << 64 | NOWHERE, 1)
        assert [event.kind for event in running.taken()] == [F_UUT]


class TestRubbish:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(rubbish_word, min_size=16, max_size=64), st.integers(0, 31), st.booleans())
    def test_any_stream_table_gives_an_answer(
        self, words: list[int], stream: int, two_level: bool
    ) -> None:
        software = Software()
        for index, word in enumerate(words * 4):
            software.memory.write_u64(STRTAB + index * 8, word)
        software.start(log2size=12 if two_level else 5, split=6 if two_level else 0)
        master = device(software, stream)
        for access in (Access.READ, Access.WRITE):
            try:
                master.read(DATA, 8) if access is Access.READ else master.write(DATA, bytes(8))
            except (Stage2Fault, BusError):
                continue
        assert {event.kind for event in software.taken()} <= {2, 3, 4, 0xB, 0x10, 0x11, 0x12, 0x13}

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.tuples(rubbish_word, rubbish_word), max_size=12),
        st.integers(0, (1 << 32) - 1),
    )
    def test_any_commands_end(self, commands: list[tuple[int, int]], prod: int) -> None:
        running = Software()
        running.tree.page(0, DATA)
        running.translate()
        running.start()
        for index, (first, second) in enumerate(commands[:8]):
            running.memory.write_u64(CMDQ + index * 16, first)
            running.memory.write_u64(CMDQ + index * 16 + 8, second)
        running.write(s.CMDQ_PROD, prod)
        stopped = running.read(s.GERROR) & 1
        assert stopped or running.read(s.CMDQ_CONS) == prod & 15
        assert device(running).read(0, 4) == bytes(4)

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(
            st.tuples(
                st.sampled_from([0x20, 0x28, 0x2C, 0x44, 0x60, 0x64, 0x80, 0x84, 0x88, 0x90, 0x98,
                                 0x9C, 0xA0, 0xA4, 0x100A8, 0x100AC, 0x50, 0x1FFFC]),
                st.integers(0, (1 << 32) - 1),
            ),
            max_size=40,
        )
    )  # fmt: skip
    def test_any_register_writes_are_survived(self, writes: list[tuple[int, int]]) -> None:
        software = Software()
        master = device(software)
        for offset, value in writes:
            software.write(offset, value)
            try:
                master.read(DATA, 4)
            except (Stage2Fault, BusError):
                continue
