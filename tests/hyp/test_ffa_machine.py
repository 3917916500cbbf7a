# SPDX-License-Identifier: GPL-2.0-or-later
"""Firmware's doors under a hostile host, in any order: against a model of who has which page."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fakes.doors import SP, Doors
from fakes.el2_rig import PAGE, Guest
from pkvm.arm64 import ffa, ffa_memory, psci
from pkvm.arm64.ffa import Function, Registers, Status
from pkvm.arm64.ffa_memory import Constituent
from pkvm.check.invariants import Snapshot
from pkvm.host.ffa import FfaDriver
from pkvm.hyp.abi import HOST_CALL_BASE, HostCall
from pkvm.hyp.policy import ANDROID, RFC, Policy
from pkvm.machine.firmware_psci import POWER_DOWN
from pkvm.machine.secure_partition import Command
from pkvm.machine.stage2 import Stage2Fault

PAGES = 12
"""Pages of the host's that are played with."""
VERSIONS = st.sampled_from([ffa.VERSION_1_0, ffa.VERSION_1_1, ffa.VERSION_1_2])
SHARE = Function.FFA_MEM_SHARE_64
LEND = (Function.FFA_MEM_LEND_64, Function.FFA_MEM_LEND_32)
GIVE = st.sampled_from(
    [
        Function.FFA_MEM_SHARE_64,
        Function.FFA_MEM_SHARE_32,
        Function.FFA_MEM_LEND_64,
        Function.FFA_MEM_LEND_32,
        Function.FFA_MEM_DONATE_64,
    ]
)
numbers = st.integers(0, PAGES + 4)
"""Pages by number; from PAGES on: a guest's, EL2's, the host's own buffers, a device's."""
ranges_of = st.lists(
    st.tuples(numbers, st.sampled_from([1, 1, 1, 2, 3, 0])), min_size=1, max_size=6
)
words = st.sampled_from([0, 1, 15, 16, 32, 48, 64, 80, 96, 112, 128, 4080, 4096, 1 << 31]) | (
    st.integers(0, (1 << 64) - 1)
)
functions = st.sampled_from([*map(int, Function), *map(int, psci.Function)])
edits = st.lists(st.tuples(st.integers(0, 40), words), max_size=3)


class HostileHost(RuleBasedStateMachine):
    """`given`: by handle, the pages that the secure world has; `mine`: pages that are the host's
    alone."""

    def __init__(self) -> None:
        super().__init__()
        self.driver: FfaDriver | None = None
        self.mine = set(range(PAGES))
        self.given: dict[int, set[int]] = {}
        self.lent: set[int] = set()
        """Handles of what was lent and not shared."""
        self.retrieved: set[int] = set()
        self.pending: tuple[int, bytes, set[int], int] | None = None
        self.pending_is_lent = False

    @initialize(version=VERSIONS, policy=st.sampled_from([RFC, ANDROID]))
    def negotiate(self, version: int, policy: Policy) -> None:
        self.doors = Doors(policy=policy)
        self.device = self.doors.device()
        self.takes_access = policy == ANDROID
        self.guest = Guest(self.doors)
        self.base = self.doors.pages(PAGES)
        self.driver = self.doors.driver(version)

    @property
    def host(self) -> FfaDriver:
        assert self.driver is not None
        return self.driver

    def pa(self, number: int) -> int:
        if number < PAGES:
            return self.base + number * PAGE
        return (
            self.guest.ram,
            self.doors.hyp.mem.carveout[0],
            self.host.tx,
            0x1000_0000,
            self.guest.vcpus[0],
        )[number - PAGES]

    def pages_of(self, ranges: list[tuple[int, int]]) -> list[int] | None:
        """The pages of a transaction that must succeed, else None."""
        found = [number + at for number, count in ranges for at in range(count)]
        good = all(count for _, count in ranges) and set(found) <= self.mine
        return found if good and len(set(found)) == len(found) else None

    def transaction(self, ranges: list[tuple[int, int]]) -> bytes:
        items = [Constituent(self.pa(number), count) for number, count in ranges]
        return ffa_memory.write_transaction(self.host.version, items, receivers=[SP])

    def attempt(self, *registers: int) -> Registers:
        """An FF-A call; an error has changed nothing."""
        doors = self.doors
        before = Snapshot(doors.hyp.mem, doors.hyp.vms())
        answer = doors.smc(*registers)
        undone = self.takes_access and registers[0] in LEND  # the host's tables may be split
        if ffa.status_of(answer) is not None and self.pending is None and not undone:
            assert before.differences(Snapshot(doors.hyp.mem, doors.hyp.vms())) == []
        return answer

    def send(self, data: bytes) -> None:
        self.doors.bus.write(self.host.tx, data[:PAGE])

    # Rules

    @rule(ranges=ranges_of, function=GIVE)
    def give(self, ranges: list[tuple[int, int]], function: Function) -> None:
        pages = self.pages_of(ranges)
        data = self.transaction(ranges)
        self.send(data)
        answer = self.attempt(function, len(data), len(data))
        if function == Function.FFA_MEM_DONATE_64:
            pages = None
        assert (answer[0] == Function.FFA_SUCCESS_32) == (pages is not None)
        if pages is not None:
            handle = ffa.handle_of(answer[2], answer[3])
            self.given[handle] = set(pages)
            self.mine -= set(pages)
            if function in LEND:
                self.lent.add(handle)

    @rule(index=st.integers(0, PAGES - 1), function=GIVE)
    def give_mine(self, index: int, function: Function) -> None:
        """One page that is the host's to give."""
        if self.mine:
            self.give([(sorted(self.mine)[index % len(self.mine)], 1)], function)

    @rule(number=st.integers(0, PAGES - 1))
    def touch(self, number: int) -> None:
        """The host's CPU and devices reach what is not the secure world's alone."""
        taken = [self.given[handle] for handle in self.lent if handle in self.given]
        if self.pending is not None and self.pending_is_lent:
            taken.append(self.pending[2])
        lost = self.takes_access and any(number in pages for pages in taken)
        for bus in (self.doors.bus, self.device):
            try:
                bus.write(self.pa(number), b"12345678")
                assert not lost
            except Stage2Fault:
                assert lost

    @rule(ranges=ranges_of, edits=edits, total=words, length=words, honest=st.booleans())
    def give_lies(
        self,
        ranges: list[tuple[int, int]],
        edits: list[tuple[int, int]],
        total: int,
        length: int,
        honest: bool,
    ) -> None:
        """Whatever stands in the buffer: if it was taken, it was the host's own."""
        data = self.transaction(ranges)
        for word, value in edits:
            value &= 0xFFFF_FFFF
            data = (data[: 4 * word] + value.to_bytes(4, "little") + data[4 * word + 4 :])[
                : max(len(data), 4 * word + 4)
            ]
        self.send(data)
        if honest:
            total = length = len(data)
        held = self.doors.secure.grants.pages()
        answer = self.attempt(Function.FFA_MEM_SHARE_64, total, length)
        function = answer[0]
        if function == Function.FFA_SUCCESS_32:
            handle = ffa.handle_of(answer[2], answer[3])
        elif function == Function.FFA_MEM_FRAG_RX:
            handle = ffa.handle_of(answer[1], answer[2])
            answer = self.doors.smc(Function.FFA_MEM_RECLAIM, *ffa.handle_words(handle))
            assert answer[0] == Function.FFA_SUCCESS_32
            return
        else:
            return
        new = self.doors.secure.grants.pages() - held
        pages = {pfn - (self.base >> 12) for pfn in new}
        assert pages <= self.mine
        self.given[handle] = pages
        self.mine -= pages

    @rule(ranges=ranges_of, cut=st.integers(0, 6), function=st.sampled_from([SHARE, *LEND]))
    def begin(self, ranges: list[tuple[int, int]], cut: int, function: Function) -> None:
        data = self.transaction(ranges)
        first = len(data) - 16 * min(cut, len(ranges))
        if first == len(data):
            return
        sent = ranges[: len(ranges) - min(cut, len(ranges))]
        pages = [] if not sent else self.pages_of(sent)
        self.send(data[:first])
        busy = self.pending is not None
        answer = self.attempt(function, len(data), first)
        good = not busy and pages is not None
        assert (answer[0] == Function.FFA_MEM_FRAG_RX) == good
        if good:
            assert pages is not None
            handle = ffa.handle_of(answer[1], answer[2])
            self.mine -= set(pages)
            self.pending = handle, data, set(pages), first
            self.pending_is_lent = function in LEND

    @rule(part=st.integers(1, 4), lie=st.sampled_from([0, 0, 0, 0, 4, 16]))
    def next_fragment(self, part: int, lie: int) -> None:
        if self.pending is None:
            answer = self.attempt(Function.FFA_MEM_FRAG_TX, 1, 0, 16)
            assert ffa.status_of(answer) == Status.INVALID_PARAMETERS
            return
        handle, data, pages, offset = self.pending
        fragment = data[offset : offset + 16 * part]
        self.send(fragment)
        items = ffa_memory.read_constituents(fragment)
        new = {(it.address - self.base) // PAGE + at for it in items for at in range(it.page_count)}
        good = (
            not (lie and (lie == 4 or len(fragment) + lie > len(data) - offset))
            and new <= self.mine
            and all(item.page_count for item in items)
            and len(new) == sum(item.page_count for item in items)
        )
        if lie == 16 and good:
            return
        words = ffa.handle_words(handle)
        answer = self.doors.smc(Function.FFA_MEM_FRAG_TX, *words, len(fragment) + lie)
        if not good:
            assert ffa.status_of(answer) is not None
            self.mine |= pages
            self.pending = None
            return
        assert ffa.status_of(answer) is None
        self.mine -= new
        offset += len(fragment)
        self.pending = (handle, data, pages | new, offset)
        if offset == len(data):
            assert answer[0] == Function.FFA_SUCCESS_32
            self.given[handle] = pages | new
            self.pending = None
            if self.pending_is_lent:
                self.lent.add(handle)

    @rule()
    def give_up(self) -> None:
        if self.pending is not None:
            handle, _, pages, _ = self.pending
            answer = self.doors.smc(Function.FFA_MEM_RECLAIM, *ffa.handle_words(handle))
            assert answer[0] == Function.FFA_SUCCESS_32
            self.mine |= pages
            self.pending = None

    @rule(index=st.integers(0, 9))
    def reclaim(self, index: int) -> None:
        handles = [*self.given, 5]
        handle = handles[index % len(handles)]
        answer = self.attempt(Function.FFA_MEM_RECLAIM, *ffa.handle_words(handle))
        if handle == 5:
            assert ffa.status_of(answer) == Status.INVALID_PARAMETERS
        elif handle in self.retrieved:
            assert ffa.status_of(answer) == Status.DENIED
        else:
            assert answer[0] == Function.FFA_SUCCESS_32
            self.mine |= self.given.pop(handle)

    @rule(index=st.integers(0, 9))
    def use(self, index: int) -> None:
        """A partition maps it, or lets go of it."""
        if self.given:
            handle = sorted(self.given)[index % len(self.given)]
            command = Command.RELINQUISH if handle in self.retrieved else Command.RETRIEVE
            assert self.host.message(SP, command, handle)[0] == 0
            self.retrieved ^= {handle}

    @rule(number=st.integers(0, PAGES - 1))
    def share_with_el2(self, number: int) -> None:
        """Pages come and go between host and EL2 meanwhile."""
        call = HOST_CALL_BASE + HostCall.HOST_SHARE_HYP
        _, result = self.doors.hyp.host_call(call, self.pa(number) >> 12)
        assert (result == 0) == (number in self.mine)
        if not result:
            answer = self.transaction([(number, 1)])
            self.send(answer)
            status = ffa.status_of(
                self.doors.smc(Function.FFA_MEM_SHARE_64, len(answer), len(answer))
            )
            assert status == Status.DENIED
            call = HOST_CALL_BASE + HostCall.HOST_UNSHARE_HYP
            assert self.doors.hyp.host_call(call, self.pa(number) >> 12)[1] == 0

    @rule(swap=st.booleans())
    def buffers(self, swap: bool) -> None:
        self.host.unmap_buffers()
        if swap:
            self.host.tx, self.host.rx = self.host.rx, self.host.tx
        self.host.map_buffers()

    @rule()
    def partitions(self) -> None:
        assert len(self.host.partitions()) == 2

    @rule(
        x0=st.sampled_from([*map(int, Function), *map(int, psci.Function)])
        | st.integers(0, 1 << 33),
        arguments=st.lists(words, max_size=6),
        immediate=st.sampled_from([0, 0, 0, 1]),
    )
    def anything(self, x0: int, arguments: list[int], immediate: int) -> None:
        """Registers with anything in them. Calls that the model must follow are left out."""
        followed = (
            Function.FFA_RXTX_UNMAP,
            Function.FFA_MEM_SHARE_32,
            Function.FFA_MEM_SHARE_64,
            Function.FFA_MEM_LEND_32,
            Function.FFA_MEM_LEND_64,
            Function.FFA_MEM_FRAG_TX,
            Function.FFA_MEM_RECLAIM,
            Function.FFA_PARTITION_INFO_GET,
            psci.Function.CPU_OFF,
        )
        suspends = (psci.Function.CPU_SUSPEND_64, psci.Function.SYSTEM_SUSPEND_64)
        if x0 in followed:
            return
        if x0 in suspends and not immediate:
            arguments = [POWER_DOWN, *arguments]
        self.doors.smc(x0, *arguments, immediate=immediate)
        cpus = self.doors.machine.host_cpus
        cpus.wake(cpus.boot)

    @invariant()
    def everything_holds(self) -> None:
        self.doors.sound()
        held = set().union(*self.given.values(), set() if self.pending is None else self.pending[2])
        first = self.base >> 12
        assert self.doors.secure.grants.pages() == {first + number for number in held}
        assert self.mine.isdisjoint(held)

    def teardown(self) -> None:
        """Reclaim brings everything back."""
        if self.driver is None:
            return
        self.give_up()
        for handle in sorted(self.retrieved):
            self.host.message(SP, Command.RELINQUISH, handle)
        for handle in sorted(self.given):
            self.host.reclaim(handle)
        assert self.doors.secure.grants.pages() == frozenset()
        self.doors.call(HostCall.HOST_SHARE_HYP, self.base >> 12)
        self.doors.sound()


TestHostileHost = HostileHost.TestCase
TestHostileHost.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
