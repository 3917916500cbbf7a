# SPDX-License-Identifier: GPL-2.0-or-later
"""The mailbox's banks, in both directions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvm.vmm.mailbox import ARG, COMMAND, DATA, RESULT, STATUS, Answer, Command, Event, Mailbox


class Recorded:
    """A mailbox whose events and answers are kept, and whose work is given here."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.answers: list[Answer] = []
        self.work: dict[int, list[Command]] = {}
        self.mailbox = Mailbox(self.events.append, self.next, self.answers.append)

    def next(self, cpu: int) -> Command | None:
        queue = self.work.get(cpu)
        return queue.pop(0) if queue else None


def test_an_event_carries_its_cpus_arguments() -> None:
    recorded = Recorded()
    mailbox = recorded.mailbox
    for n in range(6):
        mailbox.write(ARG + 8 * n, 8, 0x100 + n)
    mailbox.write(0x200 + ARG, 8, 7)
    mailbox.write(COMMAND, 8, 1)
    mailbox.write(0x200 + COMMAND, 8, 3)
    assert recorded.events == [
        Event(0, 1, (0x100, 0x101, 0x102, 0x103, 0x104, 0x105)),
        Event(2, 3, (7, 0, 0, 0, 0, 0)),
    ]


def test_a_command_and_its_answer() -> None:
    recorded = Recorded()
    mailbox = recorded.mailbox
    assert mailbox.read(COMMAND, 8) == 0
    recorded.work[1] = [Command(5, (1, 2), tuple(range(16))), Command(6)]
    assert mailbox.read(0x100 + COMMAND, 8) == 5
    assert [mailbox.read(0x100 + ARG + 8 * n, 8) for n in range(6)] == [1, 2, 0, 0, 0, 0]
    assert [mailbox.read(0x100 + DATA + 8 * n, 8) for n in range(16)] == list(range(16))
    mailbox.write(0x100 + RESULT + 8, 8, 2**64 - 1)
    mailbox.write(0x100 + STATUS, 8, 1)
    assert mailbox.read(0x100 + COMMAND, 8) == 6
    mailbox.write(0x100 + STATUS, 8, 2)
    assert recorded.answers == [
        Answer(1, 1, (0, 2**64 - 1, 0, 0, 0, 0, 0, 0)),
        Answer(1, 2, (0,) * 8),
    ]


def test_what_the_guest_writes_it_does_not_read() -> None:
    recorded = Recorded()
    for offset in (ARG, RESULT, STATUS, DATA):
        recorded.mailbox.write(offset, 8, 1)
        assert recorded.mailbox.read(offset, 8) == 0


@pytest.mark.parametrize(("offset", "size"), [(COMMAND, 4), (COMMAND, 1), (COMMAND + 4, 8), (3, 8)])
def test_other_accesses_do_nothing(offset: int, size: int) -> None:
    recorded = Recorded()
    recorded.work[0] = [Command(5)]
    recorded.mailbox.write(offset, size, 1)
    assert recorded.mailbox.read(offset, size) == 0
    assert recorded.events == []
    assert len(recorded.work[0]) == 1


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.integers(0, 0xFFF),
            st.sampled_from((1, 2, 4, 8)),
            st.integers(0, 2**64 - 1),
        )
    )
)
def test_every_access_is_defined(log: list[tuple[bool, int, int, int]]) -> None:
    recorded = Recorded()
    for is_write, offset, size, value in log:
        if is_write:
            recorded.mailbox.write(offset, size, value)
        else:
            assert recorded.mailbox.read(offset, size) == 0
