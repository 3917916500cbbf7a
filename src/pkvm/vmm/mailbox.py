# SPDX-License-Identifier: GPL-2.0-or-later
"""The mailbox: the device by which a guest program and its VMM talk.

Its registers are those of guests/include/mailbox.h: a bank of 0x100 bytes a
CPU, 64-bit registers. A write of COMMAND announces an event of the guest's; a
read of COMMAND asks for work, and a write of STATUS ends it. An access of
another size, or not aligned, reads as zero and is not written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pkvm.guests.protocol import Mailbox as Register

BANK, CPUS = int(Register.BANK), 16
COMMAND, STATUS = int(Register.COMMAND), int(Register.STATUS)
ARG, ARGS = int(Register.ARG), int(Register.ARGS)
RESULT, RESULTS = int(Register.RESULT), int(Register.RESULTS)
DATA, DATAS = int(Register.DATA), int(Register.DATAS)


class Event(NamedTuple):
    """What CPU `cpu` announced: `code` (`pkvm.guests.protocol.Event` names some), ARG0-ARG5."""

    cpu: int
    code: int
    args: tuple[int, ...]


class Command(NamedTuple):
    """Work for an agent: its code (not 0), up to 6 arguments and 16 register values."""

    code: int
    args: tuple[int, ...] = ()
    data: tuple[int, ...] = ()


class Answer(NamedTuple):
    """How an agent's command ended: its STATUS and RESULT0-7."""

    cpu: int
    status: int
    results: tuple[int, ...]


class _Bank:
    """One CPU's registers. What the guest writes and what it reads are different registers."""

    def __init__(self) -> None:
        self.event_args = [0] * ARGS
        self.command_args = [0] * ARGS
        self.results = [0] * RESULTS
        self.data = [0] * DATAS


class Mailbox:
    """The device. `on_event` is called while the guest's write is under way; `next_command` is
    asked whenever a CPU reads COMMAND; `on_answer` gets what the agent found."""

    def __init__(
        self,
        on_event: Callable[[Event], object],
        next_command: Callable[[int], Command | None] | None = None,
        on_answer: Callable[[Answer], object] | None = None,
    ) -> None:
        self._on_event = on_event
        self._next_command = next_command
        self._on_answer = on_answer
        self._banks = [_Bank() for _ in range(CPUS)]

    def read(self, offset: int, size: int) -> int:
        """An access of `size` bytes at `offset` within the device's page."""
        if size != 8 or offset & 7:
            return 0
        cpu, register = divmod(offset, BANK)
        bank = self._banks[cpu]
        if register == COMMAND:
            return self._fetch(cpu)
        if ARG <= register < ARG + 8 * ARGS:
            return bank.command_args[register - ARG >> 3]
        if DATA <= register < DATA + 8 * DATAS:
            return bank.data[register - DATA >> 3]
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A store of `size` bytes at `offset` within the device's page."""
        if size != 8 or offset & 7:
            return
        cpu, register = divmod(offset, BANK)
        bank = self._banks[cpu]
        if register == COMMAND:
            self._on_event(Event(cpu, value, tuple(bank.event_args)))
        elif ARG <= register < ARG + 8 * ARGS:
            bank.event_args[register - ARG >> 3] = value
        elif RESULT <= register < RESULT + 8 * RESULTS:
            bank.results[register - RESULT >> 3] = value
        elif register == STATUS and self._on_answer is not None:
            self._on_answer(Answer(cpu, value, tuple(bank.results)))

    def _fetch(self, cpu: int) -> int:
        command = self._next_command(cpu) if self._next_command is not None else None
        if command is None:
            return 0
        bank = self._banks[cpu]
        bank.command_args = [*command.args, *[0] * ARGS][:ARGS]
        bank.data = [*command.data, *[0] * DATAS][:DATAS]
        bank.results = [0] * RESULTS
        return command.code
