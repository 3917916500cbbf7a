# SPDX-License-Identifier: GPL-2.0-or-later
"""Child processes that do not outlive this one, however it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_parent() -> Callable[[], None]:
    """For a child to do first (`preexec_fn`): have the kernel kill it when the thread that starts
    it ends, the main thread with its process. Only Linux knows how; elsewhere nothing happens.
    """
    if sys.platform != "linux":
        return lambda: None
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # it ended before
            os._exit(1)

    return prepare
