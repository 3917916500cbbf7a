# SPDX-License-Identifier: GPL-2.0-or-later
"""Child processes that do not outlive this one, however it ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

_BOUND = """\
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL: prctl(2)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent ended before")
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[2]} cannot be run: {error.strerror}")
"""


def bound(command: Sequence[str]) -> list[str]:
    """`command` as one that the kernel kills when the thread that starts it ends, which for the
    main thread is the end of this process.

    Only Linux knows how; elsewhere it is `command` itself. The process stays the same one. A
    `preexec_fn` would do it in fewer steps, and is not safe where there are threads.
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _BOUND, str(os.getpid()), *command]
