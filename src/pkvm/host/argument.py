# SPDX-License-Identifier: GPL-2.0-or-later
"""ioctl(2)'s third argument."""

from __future__ import annotations

import errno
from collections.abc import Callable

from pkvm.host.mm import UserSpace

_MASK64 = (1 << 64) - 1


class Argument:
    """ioctl(2)'s third argument: a number or a pointer.

    A caller's bytearray is a structure whose address is nobody's business: as a number it is not
    zero and no valid one. A number may point to user memory.
    """

    __slots__ = ("_users", "_value")

    def __init__(self, value: int | bytearray, users: UserSpace) -> None:
        self._value = value
        self._users = users

    @property
    def number(self) -> int:
        """As an unsigned long."""
        return self._value & _MASK64 if isinstance(self._value, int) else _MASK64

    def read(self, length: int) -> bytes:
        """copy_from_user of a structure. Raises EFAULT."""
        if isinstance(self._value, int):
            return self._users.copy_from_user(self.number, length)
        if not isinstance(self._value, bytearray) or len(self._value) < length:
            raise self._too_short(length)
        return bytes(self._value[:length])

    def write(self, data: bytes) -> None:
        """copy_to_user of a structure. Raises EFAULT."""
        if isinstance(self._value, int):
            self._users.copy_to_user(self.number, data)
            return
        if not isinstance(self._value, bytearray) or len(self._value) < len(data):
            raise self._too_short(len(data))
        self._value[: len(data)] = data

    def _too_short(self, length: int) -> OSError:
        return OSError(errno.EFAULT, f"the request's structure needs a bytearray of {length} bytes")


Handler = Callable[[Argument], int]
"""An ioctl: returns ioctl(2)'s value. Raises OSError."""
