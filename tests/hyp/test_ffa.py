# SPDX-License-Identifier: GPL-2.0-or-later
"""The FF-A proxy: the secure world gets what is the host's to give, and nothing else."""

from __future__ import annotations

import pytest

from fakes.doors import SP, Doors
from fakes.el2_rig import PAGE, Guest
from fakes.ffa_rig import LEND, SHARE, VERSIONS, FfaRig
from pkvm.arm64 import ffa, ffa_memory, smccc
from pkvm.arm64.ffa import Function, Registers, Status
from pkvm.arm64.ffa_memory import Constituent
from pkvm.check.census import census
from pkvm.check.mutants import weakened
from pkvm.events import Event, SecureMemory, Transition
from pkvm.host.ffa import FfaCallError
from pkvm.hyp.abi import HostCall
from pkvm.hyp.policy import ANDROID, RFC, UPSTREAM, Policy
from pkvm.machine.secure_partition import Command
from pkvm.machine.stage2 import Stage2Fault

SECRET = 0x5EC2_E75E_C2E7


@pytest.fixture
def rig() -> FfaRig:
    return FfaRig()


# What is the host's to give


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("function", [SHARE, LEND])
def test_memory_goes_and_comes_back(version: int, function: Function) -> None:
    rig = FfaRig(version)
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


def test_what_the_secure_world_has_no_guest_gets(rig: FfaRig) -> None:
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
    rig = FfaRig(policy=ANDROID)
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
    rig = FfaRig(policy=policy)
    handle = rig.give((rig.page(4), 1), function=LEND)
    rig.bus.write_u64(rig.page(4), 5)
    rig.host.reclaim(handle)
    rig.sound()


# What is not: the confused deputy


def lend_the_guests(rig: FfaRig, guest: Guest) -> int:
    rig.machine.memory.write_u64(guest.ram + 0x140, SECRET)
    return rig.give((rig.page(0), 1), (guest.ram, 1), (rig.page(1), 1))


def test_a_guests_page_is_refused_and_what_was_with_it_rolled_back(rig: FfaRig) -> None:
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
        rig = FfaRig()
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

    def __init__(self, rig: FfaRig, guest: Guest) -> None:
        record = rig.recorder.record

        def watched(event: Event, /) -> None:
            record(event)
            if isinstance(event, Transition) and event.op == "host_share_ffa":
                rig.bus.write(rig.host.tx, rig.transaction((guest.ram, 1)))

        rig.hyp.mem._record = watched


def test_a_message_that_changes_while_it_is_looked_at(rig: FfaRig) -> None:
    Rewriter(rig, rig.guest())
    handle = rig.give((rig.page(0), 1))
    assert rig.secure.grants.pages() == {rig.page(0) >> 12}
    rig.sound()
    rig.host.reclaim(handle)
    with weakened("a message is read once"):
        weak = FfaRig()
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


def raw_share(rig: FfaRig, guest: Guest, function: int) -> Registers:
    """A host that speaks past the proxy: it tells the secure world of its own buffers, if it
    can, and then of the guest's page."""
    upper = function & ~0xFFFF_FFFF
    rig.smc(upper | Function.FFA_RXTX_UNMAP)
    rig.smc(upper | Function.FFA_RXTX_MAP_64, rig.page(8), rig.page(9), 1)
    data = rig.transaction((guest.ram, 1))
    rig.bus.write(rig.page(8), data)
    return rig.smc(function, len(data), len(data))


def test_the_upper_half_of_x0_is_no_way_round(rig: FfaRig) -> None:
    guest = rig.guest()
    function = 1 << 32 | SHARE
    with rig.nothing_changes():
        assert raw_share(rig, guest, function)[0] == smccc.NOT_SUPPORTED
    with weakened("a function id is canonical"):
        weak = FfaRig()
        guest = weak.guest()
        answer = raw_share(weak, guest, function)
        assert answer[0] == Function.FFA_SUCCESS_32
        assert any("P16" in problem for problem in weak.problems())


def test_donate_is_no_way_round(rig: FfaRig) -> None:
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


def test_a_later_fragment_is_no_way_round(rig: FfaRig) -> None:
    guest = rig.guest()
    ranges = [(rig.page(at), 1) for at in (0, 2, 4)]
    data = rig.transaction(*ranges, (guest.ram, 1))
    with rig.nothing_changes(), pytest.raises(FfaCallError) as error:
        rig.host.send(data, SHARE, len(data) - 16)
    assert error.value.status == Status.DENIED
    assert rig.seen[-1][0] == Function.FFA_MEM_RECLAIM, "the secure world was told"
    with weakened("every fragment is looked at"):
        weak = FfaRig()
        guest = weak.guest()
        data = weak.transaction((weak.page(0), 1), (guest.ram, 1))
        weak.host.send(data, SHARE, len(data) - 16)
        assert any("P16" in problem for problem in weak.problems())


@pytest.mark.parametrize(
    "what", ["el2", "shared", "mmio", "beyond", "wrap", "straddle", "unaligned"]
)
def test_what_else_is_not_the_hosts(rig: FfaRig, what: str) -> None:
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


def test_a_page_goes_once(rig: FfaRig) -> None:
    for ranges in (
        [(rig.page(0), 1), (rig.page(0), 1)],
        [(rig.page(0), 4), (rig.page(3), 1)],
        [(rig.page(0), 0)],
        [(rig.host.tx, 1)],
        [(rig.host.rx, 1)],
    ):
        with rig.refused(Status.DENIED):
            rig.give(*ranges)
