# SPDX-License-Identifier: GPL-2.0-or-later
"""Exit statuses of the command."""

from __future__ import annotations

OK = 0
FAILED = 1
USAGE = 2
GOT_THROUGH = 3
BROKEN = 4
TIMEOUT = 124
INTERRUPTED = 130
PIPE = 141

WORDS = {
    OK: "the guest powered off, and no attempt of the host got through",
    FAILED: "the guest ended otherwise, or could not be run",
    USAGE: "bad usage or bad input: nothing was run",
    GOT_THROUGH: "an attempt of the host on the guest's private memory got through",
    BROKEN: "an invariant did not hold (--check)",
    TIMEOUT: "the time limit was reached",
    INTERRUPTED: "interrupted",
    PIPE: "whoever read the output went away",
}
