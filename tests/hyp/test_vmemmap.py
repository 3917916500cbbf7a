# SPDX-License-Identifier: GPL-2.0-or-later
"""The record of a page, byte for byte as facts §3.1 has it."""

from __future__ import annotations

import struct

import pytest

from pkvm.arm64.stage2 import PageState
from pkvm.hyp.vmemmap import (
    GUEST_OWNED,
    GUEST_SHARED_WITH_HOST,
    HOST_OWNED,
    HOST_SHARED,
    HOST_SHARED_WITH_HYP,
    HYP_OWNED,
    Vmemmap,
    host_state,
    hyp_state,
    pair,
    vmemmap_bytes,
)
from pkvm.machine.memory import BusError, PhysicalMemory

RAM = 0x8000_0000


def test_state_bytes() -> None:
    assert HOST_OWNED == 0, "a record of zeroes is a page that the host owns"
    assert HYP_OWNED == 0x33
    assert HOST_SHARED_WITH_HYP == 0x11
    assert HOST_SHARED == 0x01
    assert GUEST_OWNED == 0x03
    assert GUEST_SHARED_WITH_HOST == 0x02


@pytest.mark.parametrize("host", [state for state in PageState if state != PageState.POISON])
@pytest.mark.parametrize("hyp", [state for state in PageState if state != PageState.POISON])
def test_pairs_come_apart_again(host: PageState, hyp: PageState) -> None:
    assert host_state(pair(host, hyp)) == host
    assert hyp_state(pair(host, hyp)) == hyp


def test_layout() -> None:
    memory = PhysicalMemory(RAM, 64 * 4096)
    vmemmap = Vmemmap(memory, RAM + 4096)
    vmemmap.refcount[3] = 0x1234
    vmemmap.state[3] = HYP_OWNED
    vmemmap.share_count[3] = 0xDEADBEEF
    record = memory.read(RAM + 4096 + 3 * 8, 8)
    assert struct.unpack("<HBBI", record) == (0x1234, 0, 0x33, 0xDEADBEEF)
    assert memory.read(RAM + 4096 + 2 * 8, 8) == bytes(8)
    assert vmemmap.refcounts[3] == 0x1234
    assert vmemmap.states[3] == HYP_OWNED
    assert vmemmap.share_counts[3] == 0xDEADBEEF


def test_eight_bytes_a_page() -> None:
    memory = PhysicalMemory(RAM, 64 * 4096)
    vmemmap = Vmemmap(memory, RAM)
    assert vmemmap_bytes(memory.ram_bytes) == 64 * 8
    assert len(vmemmap.state) == len(vmemmap.refcount) == len(vmemmap.share_count) == 64
    assert vmemmap.states.shape == vmemmap.refcounts.shape == vmemmap.share_counts.shape == (64,)


def test_records_must_be_in_ram() -> None:
    memory = PhysicalMemory(RAM, 64 * 4096)
    with pytest.raises(BusError):
        Vmemmap(memory, memory.ram_end - 8)
