# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's door: any numbers whatever, and EL2 stands."""

from __future__ import annotations

import errno

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes import a64
from fakes.el2_rig import FIRMWARE_IPA, RAM_IPA, SLOT_BYTES, El2, Guest
from pkvm.events import HostHypercall, Refusal
from pkvm.hyp.abi import HOST_CALL_BASE, ExitCode, HostCall

PAGE = 4096


OF_ANDROID = {HostCall.SPLIT_GUEST, HostCall.ASSIGN_DEVICE, HostCall.MAP_DEVICE_GUEST}
"""Calls of another dialect than the one here."""


@pytest.fixture
def el2() -> El2:
    return El2()


@pytest.mark.parametrize(
    "function",
    [0, -1, HOST_CALL_BASE, HOST_CALL_BASE + 8, HOST_CALL_BASE + 10, HOST_CALL_BASE + 63,
     HOST_CALL_BASE + 71, HOST_CALL_BASE - 1, 1 << 64, (1 << 70) + 5, -(1 << 65),
     HOST_CALL_BASE + HostCall.RESERVE_VM | 1 << 32, HOST_CALL_BASE + HostCall.VCPU_RUN | 1 << 63],
)  # fmt: skip
def test_a_function_that_does_not_exist(el2: El2, function: int) -> None:
    with el2.unchanged():
        assert el2.hyp.host_call(function, 1, 2, 3) == (-1, 0)
    assert el2.refusals()[-1].check == "function_id"
    assert not el2.events(HostHypercall)


def test_every_call_of_the_table_is_served(el2: El2) -> None:
    for call in set(HostCall) - OF_ANDROID:
        assert el2.hyp.host_call(HOST_CALL_BASE + call)[0] == 0, call.name


def test_the_sve_hint_and_bits_above_64_are_ignored(el2: El2) -> None:
    for dirt in (1 << 16, 1 << 64, 1 << 16 | 1 << 90):
        assert el2.hyp.host_call(HOST_CALL_BASE + HostCall.PGD_INFO | dirt) == (0, 0x2000)


def test_missing_arguments_are_zero_and_further_ones_ignored(el2: El2) -> None:
    page = el2.pages()
    el2.call(HostCall.HOST_SHARE_HYP, page >> 12, 99, -1)
    el2.call(HostCall.HOST_UNSHARE_HYP, (page >> 12) + (1 << 64), 5)
    el2.assert_refused(errno.EPERM, HostCall.HOST_SHARE_HYP)
    el2.assert_refused(errno.ENOENT, HostCall.SET_FIRMWARE)


def test_calls_are_announced_with_what_the_host_gets(el2: El2) -> None:
    el2.call(HostCall.PGD_INFO)
    el2.x1(HostCall.HOST_UNSHARE_HYP, el2.pages() >> 12)
    refusal, second = el2.recorder.events[-2:]
    assert el2.recorder.events[-3] == HostHypercall("PGD_INFO", 0x2000)
    assert second == HostHypercall("HOST_UNSHARE_HYP", -errno.EPERM)
    assert isinstance(refusal, Refusal)
    assert (refusal.op, refusal.errno, refusal.pa) == (
        "host_unshare_hyp", errno.EPERM, el2._next - PAGE,
    )  # fmt: skip


NUMBERS = st.one_of(
    st.integers(-(1 << 66), 1 << 66),
    st.integers(0, 10),
    st.sampled_from([1 << 28, (1 << 28) - 1, 1 << 40, 1 << 52, (1 << 64) - 1, (1 << 64) - PAGE]),
    st.integers(0x1000, 0x1004),
    st.integers(0x8_0000, 0x8_2000),
    st.integers(0x8_0000, 0x8_2000).map(lambda page: page << 12),
    st.sampled_from([RAM_IPA >> 12, FIRMWARE_IPA >> 12, FIRMWARE_IPA, SLOT_BYTES, 0x10000]),
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.sampled_from(HostCall), st.lists(NUMBERS, max_size=5)), max_size=60),
    st.booleans(),
)
def test_random_calls_leave_el2_alive_and_memory_sound(
    calls: list[tuple[HostCall, list[int]]], loaded: bool
) -> None:
    el2 = El2()
    try:
        guest = Guest(el2, [a64.WFI, 0x17FF_FFFF])
        Guest(el2, [a64.HVC, a64.HVC], protected=False)
        if loaded:
            guest.load()
        for call, args in calls:
            el2.engine.interrupt()
            x0, x1, *_ = el2.hyp.host_call(HOST_CALL_BASE + call, *args)
            assert x0 == (-1 if call in OF_ANDROID else 0)
            assert -200 < x1 < 1 << 32
            el2.sound()
        el2.call(HostCall.VCPU_PUT)
    finally:
        el2.machine.close()


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(HostCall), st.lists(NUMBERS, max_size=5)), max_size=40))
def test_a_refused_call_changes_no_ownership(
    calls: list[tuple[HostCall, list[int]]],
) -> None:
    el2 = El2()
    try:
        guest = Guest(el2, [a64.WFI])
        guest.load()
        for call, args in calls:
            before = el2._states(), el2._words()
            el2.engine.interrupt()
            _, x1, *_ = el2.hyp.host_call(HOST_CALL_BASE + call, *args)
            if x1 < 0:
                assert (el2._states(), el2._words()) == before
    finally:
        el2.machine.close()


def test_a_private_page_is_out_of_reach_of_every_call(el2: El2) -> None:
    """Whatever the host asks with the number of a guest's page, it never reads it. By force it can
    only destroy it: see test_force_reclaim."""
    guest = Guest(el2, [*a64.mov(20, 0x5EC2_E75E_C2E7), a64.WFI])
    assert guest.run() == ExitCode.TRAP
    pfn = guest.ram >> 12
    before = el2.machine.memory.read(guest.ram, PAGE)
    for call in HostCall:
        if call in (HostCall.VCPU_RUN, HostCall.VCPU_LOAD, HostCall.VCPU_PUT):
            continue
        if call == HostCall.FORCE_RECLAIM_GUEST_PAGE:
            continue
        for args in (
            (pfn, pfn, 1, 7),
            (guest.ram, guest.ram, guest.ram),
            (guest.handle, guest.ram, 1),
        ):
            if call == HostCall.START_TEARDOWN_VM and args[0] == guest.handle:
                continue
            el2.hyp.host_call(HOST_CALL_BASE + call, *args)
            assert el2.machine.memory.read(guest.ram, PAGE) == before
            with pytest.raises(Exception, match="refused by stage 2"):
                el2.bus.read(guest.ram, 8)
    el2.sound()
