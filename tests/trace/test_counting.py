# SPDX-License-Identifier: GPL-2.0-or-later
"""The default recorder: every kind is counted, refusals are kept, threads lose nothing."""

from __future__ import annotations

import threading

from pkvm.events import (
    KINDS,
    GuestExit,
    GuestHypercall,
    HostAbort,
    Message,
    Refusal,
    Tlbi,
    Transition,
)
from pkvm.trace.counting import COUNTED_BY, KEPT_REFUSALS, CountingRecorder


def refusal(n: int, check: str = "host_state") -> Refusal:
    return Refusal("host_donate_guest", check, 1, f"page {n} is not the host's")


def test_every_kind_of_event_is_counted_by_a_field_that_it_has() -> None:
    assert set(COUNTED_BY) == set(KINDS)
    assert all(field in kind._fields for kind, field in COUNTED_BY.items())


def test_counts_by_kind_and_by_value() -> None:
    recorder = CountingRecorder()
    for event in (
        Transition("host_donate_guest", 0x8000_0000, 512),
        Transition("host_donate_guest", 0x8020_0000, 1),
        Transition("guest_share_host", 0x8000_0000, 1),
        GuestExit(0x1000, 0, "dabt_mmio", 0),
        GuestHypercall(0x1000, 0, 0xC600_0003, 0),
        HostAbort(0x8000_0000, "read", True),
        HostAbort(0x8000_0000, "read", False),
        Tlbi(0),
    ):
        recorder.record(event)
    assert recorder.counts(Transition) == {"host_donate_guest": 2, "guest_share_host": 1}
    assert recorder.counts(GuestHypercall) == {0xC600_0003: 1}
    assert recorder.counts(HostAbort) == {True: 1, False: 1}
    assert recorder.counts(Refusal) == {}
    assert recorder.totals() == {
        "transition": 3,
        "exit": 1,
        "hypercall": 1,
        "host_abort": 2,
        "tlbi": 1,
    }


def test_the_last_refusals_are_kept_and_all_are_counted() -> None:
    recorder = CountingRecorder()
    for n in range(KEPT_REFUSALS + 5):
        recorder.record(refusal(n))
    recorder.record(refusal(99, "ram_range"))
    kept = recorder.refusals()
    assert len(kept) == KEPT_REFUSALS
    assert kept[0] == refusal(6)
    assert kept[-1] == refusal(99, "ram_range")
    counts = recorder.refusal_counts()
    assert counts["host_donate_guest", "host_state"] == (KEPT_REFUSALS + 5, refusal(36))
    assert counts["host_donate_guest", "ram_range"] == (1, refusal(99, "ram_range"))
    assert recorder.totals() == {"refusal": KEPT_REFUSALS + 6}


def test_messages_are_kept_in_order() -> None:
    recorder = CountingRecorder()
    recorder.record(Message("host", "one"))
    recorder.record(Message("el2", "two"))
    assert recorder.messages() == [Message("host", "one"), Message("el2", "two")]
    assert recorder.counts(Message) == {"host": 1, "el2": 1}


def test_threads_lose_no_count() -> None:
    recorder = CountingRecorder()

    def work() -> None:
        for _ in range(5000):
            recorder.record(Tlbi(0))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert recorder.totals() == {"tlbi": 20000}
