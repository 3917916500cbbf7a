# SPDX-License-Identifier: GPL-2.0-or-later
"""EL2's driver of the SMMU, on the real one: what is configured, waited for, and read back."""

from __future__ import annotations

import threading

import pytest

from fakes.memory_rig import RAM, SMMU, STREAM, Rig
from pkvm.arm64.smmu import ABORT_STE
from pkvm.events import SmmuEvent, Tlbi
from pkvm.hyp.errors import Errno, HypBug, Refused
from pkvm.hyp.smmu import STREAM_BITS, SmmuDriver
from pkvm.machine.smmu_streams import StreamFault
from pkvm.machine.stage2 import Stage2Fault


@pytest.fixture
def rig() -> Rig:
    return Rig()


def driver(rig: Rig) -> SmmuDriver:
    assert rig.mem.smmu is not None
    return rig.mem.smmu


def test_only_known_streams_pass(rig: Rig) -> None:
    rig.dma_bus.read(RAM, 8)
    for stream in (0, STREAM + 1, 63, 64, 0xFFFF):
        with pytest.raises(StreamFault):
            rig.smmu.master(stream, "unknown").read(RAM, 8)
    names = [event.event for event in rig.recorder.events if isinstance(event, SmmuEvent)]
    assert names == ["C_BAD_STE"] * 3 + ["C_BAD_STREAMID"] * 2


def test_a_host_that_is_not_protected_has_its_devices_in_bypass() -> None:
    rig = Rig(protected=False)
    rig.host_bus.write(rig.carveout[0], b"all")
    assert rig.dma_bus.read(rig.carveout[0], 3) == b"all"
    assert rig.dma_bus.context is None
    with pytest.raises(StreamFault):
        rig.smmu.master(9, "unknown").read(RAM, 8)


def test_a_page_is_gone_when_the_call_returns(rig: Rig) -> None:
    """Over and over, so that the command queue wraps."""
    for number in range(600):
        pfn = rig.first_pfn + number % 3
        rig.dma_bus.read(pfn << 12, 8)
        assert rig.smmu.holds(0, pfn << 12)
        rig.mem.host_donate_hyp(pfn, 1)
        assert not rig.smmu.holds(0, pfn << 12)
        with pytest.raises(Stage2Fault):
            rig.dma_bus.read(pfn << 12, 8)
        rig.mem.hyp_donate_host(pfn, 1)
    rig.sound()


def test_a_device_that_writes_all_the_time_loses_the_page_at_once(rig: Rig) -> None:
    """Whatever the device has under way, nothing of it lands after the call has returned."""
    pa, stop = rig.first_pfn << 12, threading.Event()
    landed = 0

    def device() -> None:
        nonlocal landed
        number = 0
        while not stop.is_set():
            number += 1
            try:
                rig.dma_bus.write(pa, number.to_bytes(8, "little") * 512)
                landed += 1
            except Stage2Fault:
                continue

    thread = threading.Thread(target=device)
    thread.start()
    try:
        for _ in range(12):
            before = landed
            while landed < before + 3:
                thread.join(0.0005)
            rig.mem.host_donate_hyp(rig.first_pfn, 1)
            content = rig.memory.read(pa, 4096)
            assert content == content[:8] * 512, "a write was cut in two"
            for _ in range(20):
                assert rig.memory.read(pa, 4096) == content
                thread.join(0.0001)
            rig.mem.hyp_donate_host(rig.first_pfn, 1)
    finally:
        stop.set()
        thread.join(10)
    rig.sound()


def test_a_stream_is_blocked_and_comes_back(rig: Rig) -> None:
    smmu = driver(rig)
    identity = rig.mem.host.identity
    assert identity is not None
    assert smmu.ste(STREAM) == identity.ste
    rig.dma_bus.read(RAM, 8)
    smmu.configure(STREAM, ABORT_STE)
    with pytest.raises(StreamFault, match="blocked"):
        rig.dma_bus.read(RAM, 8)
    smmu.configure(STREAM, identity.ste)
    rig.dma_bus.read(RAM, 8)
    rig.sound()


@pytest.mark.parametrize("stream", [-1, 1 << STREAM_BITS, 1 << 32])
def test_a_stream_beyond_the_table_is_refused(rig: Rig, stream: int) -> None:
    with rig.refused(Errno.ENOENT, "stream"):
        driver(rig).configure(stream, ABORT_STE)


def test_events_are_read_in_order_and_lost_ones_are_counted(rig: Rig) -> None:
    smmu = driver(rig)
    for round_number in range(3):
        for number in range(150):
            with pytest.raises(Stage2Fault):
                rig.dma_bus.write(SMMU + number, b"x")
        events = list(smmu.take_events(1000))
        assert len(events) == 128
        assert [event.ipa - SMMU for event in events] == list(range(128))
        assert {(event.event, event.stream, event.is_read) for event in events} == {
            (0x10, STREAM, False)
        }
        assert smmu.overflows == round_number + 1
    assert list(smmu.take_events(1000)) == []
    assert smmu.overflows == 3


def test_invalidations_are_announced(rig: Rig) -> None:
    smmu = driver(rig)
    rig.recorder.events.clear()
    smmu.invalidate_page(5, RAM)
    smmu.invalidate_all(5)
    assert rig.recorder.events == [Tlbi(5, RAM, "smmu"), Tlbi(5, -1, "smmu")]


def test_an_smmu_that_stops_is_the_end_of_el2(rig: Rig) -> None:
    smmu = driver(rig)
    rig.memory.words[smmu._first_command + 2 * (smmu._prod + 1 & 0xFF)] = 0xFF  # its SYNC
    with pytest.raises(HypBug, match="the SMMU stopped"):
        smmu.invalidate_page(0, RAM)


def test_without_an_smmu_el2_keeps_no_tree_for_devices() -> None:
    rig = Rig(smmu=False)
    rig.mem.host_donate_hyp(rig.first_pfn, 1)
    rig.mem.host_donate_hyp(rig.first_pfn + 1, 600)
    rig.mem.hyp_donate_host(rig.first_pfn, 601)
    assert not any(isinstance(event, Tlbi) and event.bus == "smmu" for event in rig.recorder.events)
    rig.sound()
    with pytest.raises(Refused):
        rig.mem.host_donate_hyp(1, 1)
