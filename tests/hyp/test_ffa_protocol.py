# SPDX-License-Identifier: GPL-2.0-or-later
"""The FF-A proxy between two who may not keep to the protocol: versions, buffers, answers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

import pytest

from fakes.doors import OTHER_SP, SP, Doors
from fakes.el2_rig import PAGE, Guest
from fakes.ffa_rig import SHARE, VERSIONS, FfaRig, answers, begin
from pkvm.arm64 import ffa, psci
from pkvm.arm64.ffa import Function, Status
from pkvm.events import Message
from pkvm.host.ffa import FfaCallError, FfaDriver
from pkvm.hyp.abi import VCPU_AREA_BYTES, HostCall, HostVcpu
from pkvm.hyp.ffa import REFUSED
from pkvm.machine.secure_partition import Command


@pytest.fixture
def rig() -> FfaRig:
    return FfaRig()


# A secure world that does not keep to the protocol: it is trusted, but EL2 does not fall over it


@pytest.mark.parametrize(
    "answer",
    [
        (Function.FFA_MEM_FRAG_RX, 1, 0x5EC0, 112),
        (Function.FFA_MEM_FRAG_RX, 0, 0, 0),
        (Function.FFA_INTERRUPT,),
        (0,),
    ],
)
def test_strange_answers_to_a_share(rig: FfaRig, answer: tuple[int, ...]) -> None:
    """The handle is the one that was really given, or another."""
    answers(rig, SHARE, *answer)
    with pytest.raises(FfaCallError) as error:
        rig.give((rig.page(0), 1))
    assert error.value.status == Status.ABORTED
    assert not rig.problems(), "what the secure world may have stays marked"
    told = answer[1:2] == (1,)
    assert bool(rig.secure.grants.by_handle) != told
    assert len(rig.events(Message)) == (not told)


def test_success_before_all_fragments_are_there(rig: FfaRig) -> None:
    answers(rig, SHARE, Function.FFA_SUCCESS_32, 0, 1, 0x5EC0)
    data = rig.transaction((rig.page(0), 1), (rig.page(2), 1))
    with rig.nothing_changes(), pytest.raises(FfaCallError) as error:
        rig.host.send(data, SHARE, len(data) - 16)
    assert error.value.status == Status.ABORTED


def test_a_secure_world_that_keeps_what_it_refused(rig: FfaRig) -> None:
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
    rig: FfaRig, function: Function, answer: tuple[int, ...]
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


def test_calls_that_pass(rig: FfaRig) -> None:
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


def test_a_buffer_that_is_a_vcpus_page_too(rig: FfaRig) -> None:
    """EL2 has it pinned twice then, and lets go of neither by accident."""
    guest = Guest(rig, created_vcpus=2)
    for offset, value in ((HostVcpu.VCPU_ID, 1), (HostVcpu.VCPU_IDX, 1), (HostVcpu.MP_STATE, 5)):
        rig.bus.write_u64(rig.host.rx + offset, value)
    area = rig.pages(VCPU_AREA_BYTES // PAGE)
    rig.call(HostCall.INIT_VCPU, guest.handle, rig.host.rx, area)
    with rig.refused(Status.BUSY, "refcount"):
        rig.host.unmap_buffers()
    assert rig.seen == []
    assert len(rig.host.partitions()) == 2
    guest.end()
    rig.host.unmap_buffers()
    rig.sound()


def test_the_secure_world_wants_no_buffers() -> None:
    doors = Doors()
    driver = doors.driver(mapped=False)
    answers(doors, Function.FFA_RXTX_MAP_64, *ffa.error(Status.NO_MEMORY))
    with doors.refused(Status.NO_MEMORY):
        driver.map_buffers()


@pytest.mark.parametrize("version", VERSIONS)
def test_partitions_and_who_has_the_rx_buffer(version: int) -> None:
    rig = FfaRig(version)
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


def test_cpus_that_call_at_the_same_time() -> None:
    """One gives pages to the secure world, one the same pages to EL2, one starts and stops a CPU.
    Each page has one owner at a time, and all come back."""
    rig = FfaRig()
    pages = [rig.page(at) for at in range(4)]
    done = dict.fromkeys(("secure", "el2", "cpu"), 0)
    errors: list[BaseException] = []

    def secure() -> None:
        for pa in pages * 40:
            with suppress(FfaCallError):
                rig.host.reclaim(rig.give((pa, 1)))
                done["secure"] += 1

    def el2() -> None:
        for pa in pages * 40:
            if rig.x1(HostCall.HOST_SHARE_HYP, pa >> 12) == 0:
                rig.call(HostCall.HOST_UNSHARE_HYP, pa >> 12)
                done["el2"] += 1

    def cpu() -> None:
        for _ in range(40):
            assert rig.smc(psci.Function.CPU_ON_64, 1, rig.base, 0)[0] == 0
            rig.machine.host_cpus.cpus[1].bus.read(pages[0], 8)
            assert rig.smc(psci.Function.CPU_OFF, cpu=1) == ()
            done["cpu"] += 1

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in (secure, el2, cpu)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert done["cpu"] == 40
    assert min(done.values()) > 0
    assert rig.secure.grants.pages() == frozenset()
    rig.sound()
