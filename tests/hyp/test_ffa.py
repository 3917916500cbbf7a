# SPDX-License-Identifier: GPL-2.0-or-later
"""The FF-A proxy: the secure world gets what is the host's to give, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fakes.doors import OTHER_SP, SP, Doors
from fakes.el2_rig import PAGE, Guest
from pkvm.arm64 import ffa, ffa_memory, smccc
from pkvm.arm64.ffa import Function, Registers, Status
from pkvm.arm64.ffa_memory import Constituent
from pkvm.check.census import census
from pkvm.check.firmware_mutants import weakened
from pkvm.events import Event, Message, SecureMemory, Transition
from pkvm.host.ffa import FfaCallError, FfaDriver
from pkvm.hyp.abi import HostCall
from pkvm.hyp.ffa import MAX_BYTES, REFUSED
from pkvm.hyp.policy import ANDROID, RFC, UPSTREAM, Policy
from pkvm.machine.secure_partition import Command
from pkvm.machine.stage2 import Stage2Fault

SHARE, LEND = Function.FFA_MEM_SHARE_64, Function.FFA_MEM_LEND_64
VERSIONS = (ffa.VERSION_1_0, ffa.VERSION_1_1, ffa.VERSION_1_2)
SECRET = 0x5EC2_E75E_C2E7


class Rig(Doors):
    """With the host's driver, and pages to play with."""

    def __init__(self, version: int = ffa.VERSION_1_2, policy: Policy = RFC) -> None:
        super().__init__(policy=policy)
        self.host = self.driver(version)
        self.base = self.pages(64)
        self.warm()
        self.seen.clear()

    def warm(self) -> None:
        """Have the host's TLB filled, so that its own accesses do not change it."""
        for pa in (self.host.tx, *range(self.base, self.page(64), PAGE)):
            self.bus.write(pa, bytes(8))

    def guest(self) -> Guest:
        guest = Guest(self)
        self.warm()
        return guest

    def page(self, number: int) -> int:
        return self.base + number * PAGE

    def owned(self, *numbers: int) -> list[str]:
        """The host's state of these pages, as EL2's record has it."""
        states = self.hyp.mem.vmemmap.state
        first = self.machine.memory.ram_base
        return [f"{states[(self.page(at) - first) >> 12]:#04x}" for at in numbers]

    def transaction(self, *ranges: tuple[int, int], **more: int) -> bytes:
        constituents = [Constituent(*item) for item in ranges]
        version = self.host.version
        return ffa_memory.write_transaction(version, constituents, receivers=[SP], **more)

    def give(self, *ranges: tuple[int, int], function: Function = SHARE) -> int:
        return self.host.give(ranges, SP, function)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def edit(data: bytes, offset: int, size: int, value: int) -> bytes:
    return data[:offset] + value.to_bytes(size, "little") + data[offset + size :]


# What is the host's to give


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("function", [SHARE, LEND])
def test_memory_goes_and_comes_back(version: int, function: Function) -> None:
    rig = Rig(version)
    before = rig.owned(0, 1, 2, 3, 4)
    handle = rig.give((rig.page(0), 2), (rig.page(3), 1), function=function)
    assert rig.owned(0, 1, 3) == ["0x01"] * 3
    assert rig.owned(2, 4) == before[:2]
    rig.sound()
    rig.bus.write_u64(rig.page(3) + 16, 99)
    assert rig.host.message(SP, Command.RETRIEVE, handle)[0] == 0
    assert rig.host.message(SP, Command.READ, handle, 2 * PAGE + 16)[:2] == (0, 99)
    assert rig.host.message(SP, Command.WRITE, handle, 0, 7)[0] == 0
    assert rig.bus.read_u64(rig.page(0)) == 7
    with rig.refused(Status.DENIED):
        rig.host.reclaim(handle)
    rig.host.message(SP, Command.RELINQUISH, handle)
    rig.host.reclaim(handle)
    assert rig.owned(0, 1, 2, 3, 4) == before
    rig.sound()
    assert [event.what for event in rig.events(SecureMemory)] == [
        "share" if function == SHARE else "lend",
        "reclaim",
    ]


def test_what_the_secure_world_has_no_guest_gets(rig: Rig) -> None:
    """Facts C15."""
    handle = rig.give((rig.page(0), 1))
    guest = rig.guest()
    guest.load()
    rig.assert_refused(1, HostCall.HOST_DONATE_GUEST, rig.page(0) >> 12, 0x50000, 1)
    rig.call(HostCall.VCPU_PUT)
    rig.assert_refused(1, HostCall.HOST_SHARE_HYP, rig.page(0) >> 12)
    with rig.refused(Status.DENIED, "host_state"):
        rig.give((rig.page(0), 1))
    rig.host.reclaim(handle)
    rig.call(HostCall.HOST_SHARE_HYP, rig.page(0) >> 12)


def test_android_lends_for_good() -> None:
    """Until it reclaims: facts §3.4, and bug 23 of §12."""
    rig = Rig(policy=ANDROID)
    device = rig.device()
    shared = rig.give((rig.page(0), 1))
    rig.bus.write_u64(rig.page(4), 5)
    handle = rig.give((rig.page(4), 2), function=LEND)
    assert rig.owned(0, 4, 5) == ["0x01", "0x0b", "0x0b"]
    rig.sound()
    for bus in (rig.bus, device):
        bus.write(rig.page(0), bytes(8))
        for at in (4, 5):
            with pytest.raises(Stage2Fault):
                bus.read(rig.page(at), 8)
    rig.host.message(SP, Command.RETRIEVE, handle)
    assert rig.host.message(SP, Command.READ, handle, 0)[:2] == (0, 5)
    rig.host.message(SP, Command.WRITE, handle, PAGE, 8)
    rig.host.message(SP, Command.RELINQUISH, handle)
    assert census(rig.hyp.mem, rig.hyp.vms()).secure == 2
    for ranges in ([(rig.page(4), 1)], [(rig.page(6), 1), (rig.page(5), 1)]):
        for function in (SHARE, LEND):
            with pytest.raises(FfaCallError):
                rig.give(*ranges, function=function)
            rig.sound()
    assert rig.owned(6) == rig.owned(7)
    rig.assert_refused(1, HostCall.HOST_SHARE_HYP, rig.page(4) >> 12)
    rig.host.reclaim(handle)
    rig.host.reclaim(shared)
    assert rig.bus.read_u64(rig.page(5)) == 8
    assert device.read(rig.page(4), 8) == (5).to_bytes(8, "little")
    rig.sound()


@pytest.mark.parametrize("policy", [RFC, UPSTREAM], ids=["rfc", "upstream"])
def test_elsewhere_the_host_keeps_what_it_lends(policy: Policy) -> None:
    rig = Rig(policy=policy)
    handle = rig.give((rig.page(4), 1), function=LEND)
    rig.bus.write_u64(rig.page(4), 5)
    rig.host.reclaim(handle)
    rig.sound()


# What is not: the confused deputy


def lend_the_guests(rig: Rig, guest: Guest) -> int:
    rig.machine.memory.write_u64(guest.ram + 0x140, SECRET)
    return rig.give((rig.page(0), 1), (guest.ram, 1), (rig.page(1), 1))


def test_a_guests_page_is_refused_and_what_was_with_it_rolled_back(rig: Rig) -> None:
    guest = rig.guest()
    with rig.refused(Status.DENIED, "host_state"):
        lend_the_guests(rig, guest)
    assert all(registers[0] != SHARE for registers in rig.seen), "nobody even asked"
    assert rig.machine.memory.read_u64(guest.ram + 0x140) == SECRET
    assert [event.op for event in rig.events(Transition)[-2:]] == [
        "host_share_ffa",
        "host_unshare_ffa",
    ]


def test_without_the_proxys_check_the_secure_world_reads_the_secret() -> None:
    with weakened("the secure world is given what the host owns"):
        rig = Rig()
        guest = rig.guest()
        handle = lend_the_guests(rig, guest)
        rig.host.message(SP, Command.RETRIEVE, handle)
        assert rig.host.message(SP, Command.READ, handle, PAGE + 0x140)[:2] == (0, SECRET)
        rig.host.message(SP, Command.WRITE, handle, PAGE + 0x140, 1)
        assert rig.machine.memory.read_u64(guest.ram + 0x140) == 1
        assert any("P16" in problem for problem in rig.problems())


class Rewriter:
    """Another CPU of the host's, which rewrites the message at the worst moment: when EL2 has
    looked at it, and the secure world has not."""

    def __init__(self, rig: Rig, guest: Guest) -> None:
        record = rig.recorder.record

        def watched(event: Event, /) -> None:
            record(event)
            if isinstance(event, Transition) and event.op == "host_share_ffa":
                rig.bus.write(rig.host.tx, rig.transaction((guest.ram, 1)))

        rig.hyp.mem._record = watched


def test_a_message_that_changes_while_it_is_looked_at(rig: Rig) -> None:
    Rewriter(rig, rig.guest())
    handle = rig.give((rig.page(0), 1))
    assert rig.secure.grants.pages() == {rig.page(0) >> 12}
    rig.sound()
    rig.host.reclaim(handle)
    with weakened("a message is read once"):
        weak = Rig()
        Rewriter(weak, weak.guest())
        weak.give((weak.page(0), 1))
        assert any("P16" in problem for problem in weak.problems())


def test_a_guests_page_as_a_buffer() -> None:
    """EL2 would write there for the host, or read."""
    doors = Doors()
    guest = Guest(doors)
    before = doors.machine.memory.read(guest.ram, PAGE)
    driver = doors.driver(mapped=False)
    driver.rx = guest.ram
    with doors.refused(Status.INVALID_PARAMETERS, "host_state"):
        driver.map_buffers()
    with weakened("the host's buffers are the host's"):
        weak = Doors()
        guest = Guest(weak)
        driver = weak.driver(mapped=False)
        driver.rx = guest.ram
        driver.map_buffers()
        driver.call(Function.FFA_PARTITION_INFO_GET)
        assert weak.machine.memory.read(guest.ram, PAGE) != before
        assert weak.problems()


def raw_share(rig: Rig, guest: Guest, function: int) -> Registers:
    """A host that speaks past the proxy: it tells the secure world of its own buffers, if it
    can, and then of the guest's page."""
    upper = function & ~0xFFFF_FFFF
    rig.smc(upper | Function.FFA_RXTX_UNMAP)
    rig.smc(upper | Function.FFA_RXTX_MAP_64, rig.page(8), rig.page(9), 1)
    data = rig.transaction((guest.ram, 1))
    rig.bus.write(rig.page(8), data)
    return rig.smc(function, len(data), len(data))


def test_the_upper_half_of_x0_is_no_way_round(rig: Rig) -> None:
    guest = rig.guest()
    function = 1 << 32 | SHARE
    with rig.nothing_changes():
        assert raw_share(rig, guest, function)[0] == smccc.NOT_SUPPORTED
    with weakened("a function id is canonical"):
        weak = Rig()
        guest = weak.guest()
        answer = raw_share(weak, guest, function)
        assert answer[0] == Function.FFA_SUCCESS_32
        assert any("P16" in problem for problem in weak.problems())


def test_donate_is_no_way_round(rig: Rig) -> None:
    guest = rig.guest()
    with rig.refused(Status.NOT_SUPPORTED, "ffa_function"):
        rig.give((guest.ram, 1), function=Function.FFA_MEM_DONATE_64)


def speak_past(doors: Doors, guest: Guest) -> Registers:
    """A host that tells the secure world of buffers of its own, by the call's 32-bit form, and
    then donates what is not its own."""
    tx, rx = doors.pages(), doors.pages()
    doors.smc(Function.FFA_VERSION, ffa.VERSION_1_2)
    doors.smc(Function.FFA_RXTX_MAP_32, tx, rx, 1)
    ranges = [Constituent(guest.ram, 1)]
    data = ffa_memory.write_transaction(ffa.VERSION_1_2, ranges, receivers=[SP])
    doors.bus.write(tx, data)
    return doors.smc(Function.FFA_MEM_DONATE_32, len(data), len(data))


def test_calls_that_el2_does_not_follow_are_no_way_round() -> None:
    doors = Doors()
    assert ffa.status_of(speak_past(doors, Guest(doors))) == Status.NOT_SUPPORTED
    doors.sound()
    with weakened("memory is given by calls that EL2 follows"):
        weak = Doors()
        assert speak_past(weak, Guest(weak))[0] == Function.FFA_SUCCESS_32
        assert any("P16" in problem for problem in weak.problems())


def test_a_later_fragment_is_no_way_round(rig: Rig) -> None:
    guest = rig.guest()
    ranges = [(rig.page(at), 1) for at in (0, 2, 4)]
    data = rig.transaction(*ranges, (guest.ram, 1))
    with rig.nothing_changes(), pytest.raises(FfaCallError) as error:
        rig.host.send(data, SHARE, len(data) - 16)
    assert error.value.status == Status.DENIED
    assert rig.seen[-1][0] == Function.FFA_MEM_RECLAIM, "the secure world was told"
    with weakened("every fragment is looked at"):
        weak = Rig()
        guest = weak.guest()
        data = weak.transaction((weak.page(0), 1), (guest.ram, 1))
        weak.host.send(data, SHARE, len(data) - 16)
        assert any("P16" in problem for problem in weak.problems())


@pytest.mark.parametrize(
    "what", ["el2", "shared", "mmio", "beyond", "wrap", "straddle", "unaligned"]
)
def test_what_else_is_not_the_hosts(rig: Rig, what: str) -> None:
    first, nbytes = rig.hyp.mem.carveout
    shared = rig.shared_page()
    item = {
        "el2": (first, 1),
        "shared": (shared, 1),
        "mmio": (0x1000_0000, 1),
        "beyond": (1 << 52, 1),
        "wrap": ((1 << 64) - PAGE, 0xFFFF_FFFE),
        "straddle": (first + nbytes - PAGE, 2),
        "unaligned": (rig.page(3) + 8, 1),
    }[what]
    with rig.refused(Status.DENIED):
        rig.give((rig.page(0), 1), item)


def test_a_page_goes_once(rig: Rig) -> None:
    for ranges in (
        [(rig.page(0), 1), (rig.page(0), 1)],
        [(rig.page(0), 4), (rig.page(3), 1)],
        [(rig.page(0), 0)],
        [(rig.host.tx, 1)],
        [(rig.host.rx, 1)],
    ):
        with rig.refused(Status.DENIED):
            rig.give(*ranges)


# Descriptors that lie

HEADER, ENDPOINT, COMPOSITE, FIRST = 0, 48, 80, 96


@pytest.mark.parametrize(
    ("offset", "size", "value", "check"),
    [
        (HEADER, 2, 1, "ffa_sender"),
        (HEADER, 2, OTHER_SP, "ffa_sender"),
        (28, 4, 0, "ffa_endpoints"),
        (28, 4, 2, "ffa_endpoints"),
        (28, 4, 0xFFFF_FFFF, "ffa_endpoints"),
        (32, 4, 0xFFFF_FFF0, "ffa_descriptor"),
        (32, 4, 4096, "ffa_descriptor"),
        (ENDPOINT + 4, 4, 0, "ffa_composite"),
        (ENDPOINT + 4, 4, 48, "ffa_composite"),
        (ENDPOINT + 4, 4, 0xFFFF_FFF8, "ffa_descriptor"),
        (ENDPOINT + 4, 4, 4090, "ffa_descriptor"),
        (ENDPOINT + 4, 4, 88, "ffa_length"),
        (COMPOSITE + 4, 4, 0, "ffa_length"),
        (COMPOSITE + 4, 4, 1, "ffa_length"),
        (COMPOSITE + 4, 4, 0x1000_0000, "ffa_length"),
        (FIRST + 8, 4, 0xFFFF_FFFF, "pfn_range"),
        (FIRST + 8, 4, 0x10_0000, "ram_range"),
    ],
)
def test_descriptors_that_lie(rig: Rig, offset: int, size: int, value: int, check: str) -> None:
    data = edit(rig.transaction((rig.page(0), 1), (rig.page(2), 1)), offset, size, value)
    status = Status.DENIED if check.endswith("_range") else Status.INVALID_PARAMETERS
    with rig.refused(status, check):
        rig.host.send(data, SHARE)
    assert all(registers[0] != SHARE for registers in rig.seen)


def test_registers_that_lie(rig: Rig) -> None:
    data = rig.transaction((rig.page(0), 1))
    rig.bus.write(rig.host.tx, data)
    size = len(data)
    bad = Status.INVALID_PARAMETERS
    for status, arguments in (
        (bad, (size, size, rig.host.tx, 1)),
        (bad, (size, size, 0, 1)),
        (bad, (size, size + 16)),
        (bad, (size, size - 8)),
        (bad, (size + 16, size)),
        (bad, (0, 0)),
        (bad, (8192, 8192)),
        (bad, (1 << 32, 1 << 32)),
        (Status.NO_MEMORY, (MAX_BYTES + 16, size)),
    ):
        with rig.refused(status):
            rig.host.call(SHARE, *arguments)


def test_the_secure_worlds_no_is_handed_on_and_nothing_is_shared(rig: Rig) -> None:
    data = edit(rig.transaction((rig.page(0), 1)), COMPOSITE, 4, 5)
    with rig.refused(Status.INVALID_PARAMETERS):
        rig.host.send(data, SHARE)
    data = edit(rig.transaction((rig.page(0), 1)), ENDPOINT, 2, 0x8009)
    with rig.refused(Status.INVALID_PARAMETERS):
        rig.host.send(data, SHARE)


def test_the_host_may_rewrite_its_buffer_at_any_moment(rig: Rig) -> None:
    """What the secure world gets is EL2's copy."""
    guest = rig.guest()
    el3 = rig.machine.firmware.call

    def late(cpu: object, registers: Registers) -> Registers:
        rig.bus.write(rig.host.tx, rig.transaction((guest.ram, 1)))
        return el3(cpu, registers)  # type: ignore[arg-type]

    rig.machine.firmware.call = late  # type: ignore[method-assign]
    handle = rig.give((rig.page(0), 1))
    assert rig.secure.grants.pages() == {rig.page(0) >> 12}
    rig.sound()
    rig.host.reclaim(handle)


# Fragments


@pytest.mark.parametrize("fragment", [112, 160, 1040, PAGE])
@pytest.mark.parametrize("version", VERSIONS)
def test_fragments(version: int, fragment: int) -> None:
    rig = Rig(version)
    many = rig.pages(700)
    ranges = [(many + 2 * at * PAGE, 1) for at in range(300)]
    handle = rig.host.give(ranges, SP, fragment=fragment)
    assert rig.secure.grants.pages() == {pa >> 12 for pa, _ in ranges}
    rig.sound()
    rig.host.reclaim(handle)
    assert rig.secure.grants.pages() == frozenset()
    rig.sound()


def begin(rig: Rig, ranges: Sequence[tuple[int, int]], sent: int) -> tuple[bytes, int]:
    """The first fragment, of `sent` ranges."""
    data = rig.transaction(*ranges)
    rig.bus.write(rig.host.tx, data[: FIRST + 16 * sent])
    answer = rig.host.call(SHARE, len(data), FIRST + 16 * sent)
    assert answer[0] == Function.FFA_MEM_FRAG_RX
    return data, ffa.handle_of(answer[1], answer[2])


@pytest.mark.parametrize(
    ("length", "content"),
    [(0, b""), (7, b""), (64, b""), (5000, b""), (32, bytes(32)), (16, b"\1" * 16)],
)
def test_a_fragment_that_lies_ends_the_transaction(rig: Rig, length: int, content: bytes) -> None:
    with rig.nothing_changes():
        data, handle = begin(rig, [(rig.page(2 * at), 1) for at in range(4)], 2)
        rig.bus.write(rig.host.tx, content or data[FIRST + 32 :])
        with pytest.raises(FfaCallError):
            rig.host.call(Function.FFA_MEM_FRAG_TX, *ffa.handle_words(handle), length)
    with rig.refused(Status.INVALID_PARAMETERS, "ffa_handle"):
        rig.host.call(Function.FFA_MEM_FRAG_TX, *ffa.handle_words(handle), 32)


def test_the_secure_worlds_no_to_a_fragment(rig: Rig) -> None:
    """The last one makes the number of pages wrong."""
    with rig.nothing_changes():
        data, handle = begin(rig, [(rig.page(2 * at), 1) for at in range(4)], 2)
        rest = edit(data[FIRST + 32 :], 8, 4, 2)
        rig.bus.write(rig.host.tx, rest)
        with pytest.raises(FfaCallError) as error:
            rig.host.call(Function.FFA_MEM_FRAG_TX, *ffa.handle_words(handle), len(rest))
        assert error.value.status in (Status.INVALID_PARAMETERS, Status.DENIED)


def test_one_transaction_waits_for_fragments(rig: Rig) -> None:
    ranges = [(rig.page(2 * at), 1) for at in range(4)]
    with rig.nothing_changes():
        data, handle = begin(rig, ranges, 2)
        with rig.refused(Status.INVALID_PARAMETERS, "ffa_handle"):
            rig.host.call(Function.FFA_MEM_FRAG_TX, handle & 0xFFFF_FFFF, 0, 32)
        with rig.refused(Status.INVALID_PARAMETERS, "ffa_handle"):
            words = ffa.handle_words(handle)
            rig.host.call(Function.FFA_MEM_FRAG_TX, *words, 32, 1 << 16)
        rig.bus.write(rig.host.tx, data[: FIRST + 32])
        with rig.refused(Status.BUSY, "ffa_pending"):
            rig.host.call(SHARE, len(data), FIRST + 32)
        other = rig.give((rig.page(20), 1))
        rig.host.reclaim(other)
        rig.host.reclaim(handle)
    with rig.refused(Status.INVALID_PARAMETERS):
        rig.host.reclaim(handle)


# Reclaim


def test_only_what_was_given_comes_back(rig: Rig) -> None:
    handle = rig.give((rig.page(0), 1))
    for wrong in (handle + 1, handle & 0xFFFF_FFFF, 0, (1 << 64) - 1):
        with rig.refused(Status.INVALID_PARAMETERS):
            rig.host.reclaim(wrong)
    rig.host.reclaim(handle)
    with rig.refused(Status.INVALID_PARAMETERS):
        rig.host.reclaim(handle)


def test_a_secure_world_that_lies_about_what_it_has(rig: Rig) -> None:
    """It is trusted; but EL2 unshares no page that is not shared."""
    handle = rig.give((rig.page(0), 1))
    grant = rig.secure.grants.by_handle[handle]
    grant.ranges[0] = Constituent(rig.page(1), 1)
    with rig.unchanged(), pytest.raises(FfaCallError) as error:
        rig.host.reclaim(handle)
    assert error.value.status == Status.DENIED
    assert handle in rig.secure.grants.by_handle
    grant.ranges[0] = Constituent(rig.page(0), 1)
    rig.host.reclaim(handle)
    rig.sound()


# A secure world that does not keep to the protocol: it is trusted, but EL2 does not fall over it


def answers(rig: Rig, function: Function, *answer: int) -> None:
    """The secure world answers a call of EL2's so from now on, after it has served it."""
    el3 = rig.machine.firmware.call

    def odd(cpu: object, registers: Registers) -> Registers:
        result = el3(cpu, registers)  # type: ignore[arg-type]
        return ffa.registers(*answer) if registers[0] == function else result

    rig.machine.firmware.call = odd  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "answer",
    [
        (Function.FFA_MEM_FRAG_RX, 1, 0x5EC0, 112),
        (Function.FFA_MEM_FRAG_RX, 0, 0, 0),
        (Function.FFA_INTERRUPT,),
        (0,),
    ],
)
def test_strange_answers_to_a_share(rig: Rig, answer: tuple[int, ...]) -> None:
    """The handle is the one that was really given, or another."""
    answers(rig, SHARE, *answer)
    with pytest.raises(FfaCallError) as error:
        rig.give((rig.page(0), 1))
    assert error.value.status == Status.ABORTED
    assert not rig.problems(), "what the secure world may have stays marked"
    told = answer[1:2] == (1,)
    assert bool(rig.secure.grants.by_handle) != told
    assert len(rig.events(Message)) == (not told)


def test_success_before_all_fragments_are_there(rig: Rig) -> None:
    answers(rig, SHARE, Function.FFA_SUCCESS_32, 0, 1, 0x5EC0)
    data = rig.transaction((rig.page(0), 1), (rig.page(2), 1))
    with rig.nothing_changes(), pytest.raises(FfaCallError) as error:
        rig.host.send(data, SHARE, len(data) - 16)
    assert error.value.status == Status.ABORTED


def test_a_secure_world_that_keeps_what_it_refused(rig: Rig) -> None:
    """Then the pages stay marked: no guest gets them."""
    _, handle = begin(rig, [(rig.page(0), 1), (rig.page(2), 1)], 1)
    answers(rig, Function.FFA_MEM_RECLAIM, *ffa.error(Status.DENIED))
    with pytest.raises(FfaCallError):
        rig.host.call(Function.FFA_MEM_FRAG_TX, *ffa.handle_words(handle), 8)
    assert rig.owned(0) == ["0x01"]
    assert [event.source for event in rig.events(Message)] == ["el2"]


@pytest.mark.parametrize(
    ("function", "answer"),
    [
        (Function.FFA_MEM_RETRIEVE_REQ_32, (Function.FFA_SUCCESS_32,)),
        (Function.FFA_MEM_RETRIEVE_REQ_32, (Function.FFA_MEM_RETRIEVE_RESP, 1 << 31, 4096)),
        (Function.FFA_MEM_RETRIEVE_REQ_32, (Function.FFA_MEM_RETRIEVE_RESP, 112, 1 << 31)),
        (Function.FFA_MEM_RETRIEVE_REQ_32, (Function.FFA_MEM_RETRIEVE_RESP, 112, 80)),
        (Function.FFA_MEM_RETRIEVE_REQ_32, (Function.FFA_MEM_RETRIEVE_RESP, 0, 0)),
        (Function.FFA_MEM_FRAG_RX, (Function.FFA_MEM_FRAG_TX, 0, 0, 0)),
        (Function.FFA_MEM_FRAG_RX, (Function.FFA_MEM_FRAG_TX, 0, 0, 1 << 31)),
        (Function.FFA_MEM_FRAG_RX, (Function.FFA_SUCCESS_32,)),
        (Function.FFA_MEM_RECLAIM, ffa.error(Status.BUSY)),
    ],
)
def test_strange_answers_to_a_reclaim(
    rig: Rig, function: Function, answer: tuple[int, ...]
) -> None:
    many = rig.pages(600)
    ranges = [(many + 2 * at * PAGE, 1) for at in range(300)]
    rig.host.give(ranges, SP)
    answers(rig, function, *answer)
    states = rig._states()
    with pytest.raises(FfaCallError):
        rig.host.reclaim(next(iter(rig.secure.grants.by_handle)))
    assert rig._states() == states


# Versions, features, buffers


def test_before_a_version_there_is_nothing() -> None:
    doors = Doors()
    for function in (Function.FFA_ID_GET, SHARE, Function.FFA_RXTX_MAP_64, Function.FFA_FEATURES):
        with doors.nothing_changes():
            answer = doors.smc(function, 1, 2, 3)
        assert ffa.status_of(answer) == Status.INVALID_PARAMETERS
        assert doors.refusals()[-1].check == "ffa_version"
    assert doors.seen == []


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (ffa.VERSION_1_0, ffa.VERSION_1_0),
        (ffa.VERSION_1_1, ffa.VERSION_1_1),
        (ffa.VERSION_1_2, ffa.VERSION_1_2),
        (0x1_0005, ffa.VERSION_1_2),
        (0x2_0000, ffa.VERSION_NOT_SUPPORTED),
        (0, ffa.VERSION_NOT_SUPPORTED),
        (0x8001_0000, ffa.VERSION_NOT_SUPPORTED),
    ],
)
def test_versions(asked: int, answer: int) -> None:
    doors = Doors()
    assert doors.smc(Function.FFA_VERSION, asked)[0] == answer
    if answer == ffa.VERSION_NOT_SUPPORTED:
        return
    assert doors.smc(Function.FFA_VERSION, ffa.VERSION_1_2)[0] == answer
    lower = doors.smc(Function.FFA_VERSION, ffa.VERSION_1_0)[0]
    assert lower == (answer if answer == ffa.VERSION_1_0 else ffa.VERSION_NOT_SUPPORTED)


@pytest.mark.parametrize("function", sorted(REFUSED))
def test_calls_that_the_host_does_not_have(function: Function) -> None:
    doors = _shared_doors()
    doors.seen.clear()
    for call in (function, Function.FFA_FEATURES):
        answer = doors.smc(call, function, 64, 64)
        assert ffa.status_of(answer) == Status.NOT_SUPPORTED
    assert doors.seen == []


_DOORS: list[Doors] = []


def _shared_doors() -> Doors:
    if not _DOORS:
        _DOORS.append(Doors())
        _DOORS[0].driver(mapped=False)
    return _DOORS[0]


def test_calls_that_pass(rig: Rig) -> None:
    assert rig.host.call(Function.FFA_ID_GET)[2] == ffa.NORMAL_WORLD
    assert rig.host.call(Function.FFA_SPM_ID_GET)[2] == ffa.SPMC
    assert rig.host.message(SP, Command.PING, (1 << 64) - 2)[:2] == (0, (1 << 64) - 1)
    words = [Function.FFA_MSG_SEND_DIRECT_REQ_64, SP, 0, *range(3, 18)]
    rig.smc(*words)
    assert rig.seen[-1] == tuple(words)
    rig.host.call(Function.FFA_FEATURES, SHARE)
    with rig.refused(Status.NOT_SUPPORTED):
        rig.host.call(Function.FFA_RUN)


def test_buffers_are_shared_and_pinned_while_mapped() -> None:
    doors = Doors()
    driver = doors.driver(mapped=False)
    tx, rx = driver.tx, driver.rx
    call = Function.FFA_RXTX_MAP_64
    guest = Guest(doors)
    for bad in (
        (tx + 8, rx, 1),
        (tx, rx, 2),
        (tx, rx, 0),
        (tx, rx, 1 << 32 | 1),
        (tx, tx, 1),
        (guest.ram, rx, 1),
        (tx, guest.ram, 1),
        (tx, doors.hyp.mem.carveout[0], 1),
        (0x1000_0000, rx, 1),
        (1 << 60, rx, 1),
    ):
        with doors.refused(Status.INVALID_PARAMETERS):
            driver.call(call, *bad)
    with doors.refused(Status.INVALID_PARAMETERS, "ffa_unmapped"):
        driver.call(SHARE, 112, 112)
    driver.map_buffers()
    assert doors.secure._tx not in (tx, rx), "the secure world knows EL2's buffers only"
    with doors.refused(Status.DENIED, "ffa_mapped"):
        driver.map_buffers()
    for pa in (tx, rx):
        doors.assert_refused(16, HostCall.HOST_UNSHARE_HYP, pa >> 12, check_name="refcount")
        doors.assert_refused(1, HostCall.HOST_SHARE_HYP, pa >> 12)
    with doors.refused(Status.INVALID_PARAMETERS, "ffa_sender"):
        driver.call(Function.FFA_RXTX_UNMAP, 1)
    driver.unmap_buffers()
    with doors.refused(Status.INVALID_PARAMETERS, "ffa_unmapped"):
        driver.unmap_buffers()
    doors.call(HostCall.HOST_SHARE_HYP, tx >> 12)
    doors.call(HostCall.HOST_UNSHARE_HYP, tx >> 12)
    driver.map_buffers()
    doors.sound()


@pytest.mark.parametrize("version", VERSIONS)
def test_partitions_and_who_has_the_rx_buffer(version: int) -> None:
    rig = Rig(version)
    assert [it.endpoint for it in rig.host.partitions()] == [SP, OTHER_SP]
    with rig.refused(Status.DENIED, "ffa_rx"):
        rig.host.call(Function.FFA_RX_RELEASE)
    rig.host.call(Function.FFA_PARTITION_INFO_GET)
    with rig.refused(Status.BUSY, "ffa_rx"):
        rig.host.call(Function.FFA_PARTITION_INFO_GET)
    handle = rig.give((rig.page(0), 1))
    rig.host.reclaim(handle)
    rig.host.call(Function.FFA_RX_RELEASE)
    if version > ffa.VERSION_1_0:
        answer = rig.host.call(Function.FFA_PARTITION_INFO_GET, 0, 0, 0, 0, ffa.COUNT_ONLY)
        assert answer[2] == 2
        assert [it.endpoint for it in rig.host.partitions()] == [SP, OTHER_SP]
    with rig.refused(Status.INVALID_PARAMETERS):
        rig.host.call(Function.FFA_PARTITION_INFO_GET, 1, 2, 3, 4)


def test_a_driver_without_a_common_version() -> None:
    doors = Doors()
    with pytest.raises(FfaCallError):
        FfaDriver(doors.machine.smc, doors.bus, doors.pages(), doors.pages(), 0x2_0000)
