# SPDX-License-Identifier: GPL-2.0-or-later
"""How EL2 says no, and how it says that EL2 itself is wrong.

A refusal travels as `Refused` inside EL2 only. The doors turn it into a
negative errno or an SMCCC code and announce it; nothing outside sees the
exception. The numbers are Linux's on arm64, whatever system this runs on.
"""

from __future__ import annotations

from enum import IntEnum

from pkvm.events import NO_ADDRESS


class Errno(IntEnum):
    """The errnos of EL2's interfaces (include/uapi/asm-generic/errno*.h)."""

    EPERM = 1
    ENOENT = 2
    E2BIG = 7
    EAGAIN = 11
    ENOMEM = 12
    EFAULT = 14
    EBUSY = 16
    EEXIST = 17
    ENODEV = 19
    EINVAL = 22
    ERANGE = 34
    EHWPOISON = 133


class Refused(Exception):
    """A caller's request failed a check; nothing has changed.

    `check` is the stable name of the check, `why` says in words what it saw.
    `pa` and `ipa` are byte addresses where one is concerned, `vm` a handle.
    `pages_needed` goes with ENOMEM: so many table pages must be topped up
    before the same request can succeed.
    """

    def __init__(
        self,
        errno: int,
        check: str,
        why: str,
        *,
        pa: int = NO_ADDRESS,
        ipa: int = NO_ADDRESS,
        vm: int = 0,
        pages_needed: int = 0,
    ) -> None:
        super().__init__(f"{check}: {why}")
        self.errno = errno
        self.check = check
        self.why = why
        self.pa = pa
        self.ipa = ipa
        self.vm = vm
        self.pages_needed = pages_needed


class HypBug(AssertionError):
    """EL2 found its own state impossible: on hardware, a panic. No caller's input may cause it."""
