# SPDX-License-Identifier: GPL-2.0-or-later
"""What a scenario saw: one call, and everything that came of it, in words that do not vary.

The same observation must come out of every run on the same kernel, so nothing in it is a user
address, a file descriptor or a time.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from typing import NamedTuple

from pkvm.guests.agent import AgentCommandError, AgentExitError, GuestExceptionError
from pkvm.kvm import exits
from pkvm.uapi.errors import HostOopsError, ProtectedPageError

Namer = Callable[[int], str]
"""What a number is called, such as "ram+0x1000" for an address."""

_EC_SHIFT = 26
_HAS_FAR = (0x20, 0x21, 0x22, 0x24, 0x25, 0x34, 0x35)
"""Exception classes that set FAR_EL1: aborts, PC alignment, watchpoints."""


class Observation(NamedTuple):
    """A call and its outcome. Every field is text, empty where there is nothing to say."""

    topic: str
    scenario: str
    number: int
    """Its place in the scenario, from 0."""
    call: str
    """What was called: an ioctl's name, "guest HVC", "host load"."""
    arguments: str
    result: str
    """The value that came back, "ok" for none, or the exit or exception that came instead."""
    errno: str
    """The name of the errno, if the call failed."""
    guest: str
    """Registers that the guest saw."""
    host: str
    """Bytes that the host could read."""

    def outcome(self) -> tuple[str, str, str, str]:
        """Everything that is not the question."""
        return self.result, self.errno, self.guest, self.host

    def words(self) -> str:
        """The outcome in one line."""
        return ", ".join(part for part in self.outcome() if part)


class Outcome(NamedTuple):
    """The outcome's fields of an `Observation`."""

    result: str = ""
    errno: str = ""
    guest: str = ""
    host: str = ""


def registers(values: Iterable[int], first: int = 0) -> str:
    """X registers in words, from X`first` on."""
    return " ".join(f"x{first + n}={value:#x}" for n, value in enumerate(values))


def errno_name(error: OSError) -> str:
    """EINVAL, ... for the error's number."""
    return errno.errorcode.get(error.errno or 0, str(error.errno))


def of_exit(exit_: object, name: Namer) -> str:
    """A KVM exit in words; addresses by `name`."""
    match exit_:
        case exits.Mmio(address, size, data, True):
            return f"MMIO write of {data:#x}, {size} bytes at {name(address)}"
        case exits.Mmio(address, size, _, _):
            return f"MMIO read, {size} bytes at {name(address)}"
        case exits.SystemEvent(kind, data):
            return " ".join(["system event", kind, *map(hex, data)])
        case exits.Intr():
            return "interrupted"
        case exits.FailEntry(reason, _):
            return f"fail entry {reason:#x}"
        case exits.InternalError(suberror):
            return f"internal error {suberror}"
        case exits.Unknown(reason):
            return f"exit {reason}"
    return type(exit_).__name__


def of_value(value: object, name: Namer) -> Outcome:
    """What a call returned. An owner of a descriptor is "fd": its number says nothing."""
    match value:
        case None:
            return Outcome("ok")
        case bool():
            return Outcome("yes" if value else "no")
        case int():
            return Outcome(hex(value) if abs(value) > 9 else str(value))
        case str():
            return Outcome(value)
        case bytes():
            return Outcome("ok", host=value.hex(" ", -8))
    if hasattr(value, "fd"):
        return Outcome("fd")
    return Outcome(of_exit(value, name))


def of_error(error: Exception, name: Namer, user: Namer) -> Outcome:
    """How a call failed; guest addresses by `name`, the host's by `user`."""
    match error:
        case GuestExceptionError(esr=esr, far=far):
            words = f"ESR={esr:#x}"
            if esr >> _EC_SHIFT in _HAS_FAR:
                words += f" FAR={name(far)}"
            return Outcome("guest exception", guest=f"{words} vector={error.vector:#x}")
        case AgentExitError(exit=exit_):
            return Outcome(of_exit(exit_, name))
        case AgentCommandError(answer=answer):
            return Outcome(f"agent status {answer.status}", guest=registers(answer.results))
        case ProtectedPageError(address=address):
            return Outcome(f"refused at {user(address)}", errno_name(error))
        case HostOopsError(address=address):
            return Outcome(f"oops at {user(address)}", errno_name(error))
        case OSError():
            return Outcome("", errno_name(error))
    return Outcome(f"ended by {type(error).__name__}")
