# SPDX-License-Identifier: GPL-2.0-or-later
"""The C library's calls that Python's own modules do not offer as a driver of KVM needs them.

ctypes, since Python's `mmap` tells no address and unmaps a whole object only, `fcntl.ioctl` takes
no number above a C int, `os.pread` no address to read to, and `signal.signal` neither another
thread than the main one nor a handler in C. Addresses and sizes are numbers here; no Python object
stands for the memory, so that nothing can touch it but a system call. glibc or musl on 64-bit
Linux.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_int, c_long, c_size_t, c_ulong, c_void_p
from typing import Any

_C = ctypes.CDLL(None, use_errno=True)
_SIGACTION_BYTES = 256
"""More than a struct sigaction has; its first word is the handler, then come mask and flags."""


def _declared(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(_C, name)
    function.restype, function.argtypes = result, arguments
    return function


_ioctl = _declared("ioctl", c_int, c_int, c_ulong, c_ulong)
_pread = _declared("pread", c_long, c_int, c_void_p, c_size_t, c_long)
_pwrite = _declared("pwrite", c_long, c_int, c_void_p, c_size_t, c_long)
_syscall = _declared("syscall", c_long, c_long, c_long, c_long, c_long)
_sigaction = _declared("sigaction", c_int, c_int, c_void_p, c_void_p)
_WORD = (1 << 64) - 1
_MINUS_ONE = (1 << 32) - 1
"""-1 as an int."""
_TGKILL = {"x86_64": 234}.get(os.uname().machine, 131)
"""The number of tgkill(2), of which musl knows nothing: x86's own, or that of arm64 and all later
architectures (asm-generic/unistd.h)."""


def ioctl(fd: int, request: int, argument: int) -> int:
    """ioctl(2) with an unsigned long. Raises OSError."""
    return _checked(_ioctl(fd, request, argument))


def call(name: str, *arguments: int | ctypes.Array[ctypes.c_char] | None) -> int:
    """Call a function by name, with numbers of 64 bits and buffers. Raises OSError where it returns
    -1, as an int or a long."""
    # Not an attribute, which would be the same object for everyone.
    function = _C[name]
    function.restype = c_long
    result: int = function(
        *[c_ulong(item & _WORD) if isinstance(item, int) else item for item in arguments]
    )
    # The upper half of an int's register is nobody's; no address or count ends in these bits.
    if result & _MINUS_ONE == _MINUS_ONE:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def pread(fd: int, address: int, length: int, offset: int) -> int:
    """pread(2) to memory at `address`: how many bytes came. Raises OSError."""
    return _checked(_pread(fd, address, length, offset))


def pwrite(fd: int, address: int, length: int, offset: int) -> int:
    """pwrite(2) of memory at `address`: how many bytes went. Raises OSError."""
    return _checked(_pwrite(fd, address, length, offset))


def tgkill(tid: int, signal_number: int) -> None:
    """Send a signal to a thread of this process. Raises OSError: ESRCH if there is no such one."""
    _checked(_syscall(_TGKILL, os.getpid(), tid, signal_number))


def interrupt_on(signal_number: int) -> Any:
    """Let a signal interrupt system calls and do nothing else, in every thread; what it did before,
    for `restore`. Raises OSError.

    The handler is abs(3): it takes a number, as a handler does, and touches nothing, so that it may
    run at any point of any thread. Python, whose handlers wait for the main thread, hears nothing.
    """
    before = ctypes.create_string_buffer(_SIGACTION_BYTES)
    handler = ctypes.cast(_C.abs, c_void_p).value or 0
    action = ctypes.create_string_buffer(handler.to_bytes(8, "little"), _SIGACTION_BYTES)
    _checked(_sigaction(signal_number, action, before))
    return before


def restore(signal_number: int, before: Any) -> None:
    """Undo `interrupt_on`. Raises OSError."""
    _checked(_sigaction(signal_number, before, None))


def _checked(result: int) -> int:
    if result < 0:
        raise _error()
    return result


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
