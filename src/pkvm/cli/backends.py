# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest is run on: the built-in machine, or this computer's own kernel.

The VMM sees no difference. What differs is who else knows something: of the
built-in machine every page and every event is known, of a kernel what it tells
a process about itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pkvm.cli import options
from pkvm.kvm import Kvm
from pkvm.trace.counting import CountingRecorder

if TYPE_CHECKING:
    from pkvm.check.door import CheckedSystem
    from pkvm.system import System
    from pkvm.trace.jsonl import JsonLinesRecorder

VIRTUAL_EPOCH_NS = 1_767_225_600 * 1_000_000_000
"""Where the calendar stands as a machine with the virtual clock starts: 2026-01-01, UTC."""
STATUS = Path("/proc/self/status")


class Model(NamedTuple):
    """The built-in machine."""

    system: System
    counts: CountingRecorder
    wall_clock: Callable[[], int] | None
    """The time since the Epoch by the machine's clock in nanoseconds, if that is a virtual one."""

    @property
    def checked(self) -> tuple[int, int] | None:
        """With --check: exits to the host and transitions after which every invariant held."""
        checked = self.system.checked
        return None if checked is None else (checked.exits, checked.transitions)


class Backend(NamedTuple):
    """A kernel to run guests on."""

    name: str
    """As `--backend` has it."""
    kvm: Kvm
    model: Model | None
    """None where it is a real kernel."""


def enter(stack: ExitStack, args: argparse.Namespace, guest_bytes: int, firmware: bytes) -> Backend:
    """The back-end that `args` ask for, until `stack` is closed. A machine is made large enough for
    a guest of `guest_bytes`. Raises what `options.make_system` and `pkvm.open` raise, and at the
    end InvariantError or TraceError."""
    if args.backend != options.MODEL:
        # Imported here, as the machine below: each run needs one of them.
        from pkvm.opening import open_device

        return Backend(args.backend, stack.enter_context(open_device(args.backend)), None)
    counts = CountingRecorder()
    trace = None
    if args.trace is not None:
        trace = stack.enter_context(_traced(args.trace, counts))
    system = options.make_system(
        args,
        counts if trace is None else trace,
        guest_bytes,
        firmware=firmware,
        check=args.check,
    )
    # After the system's end: what is broken breaks more when the rest is taken apart.
    stack.callback(_blame, system.checked)
    stack.callback(system.close)
    if trace is not None:
        trace.now_ns = system.machine.clock.now_ns
    wall_clock = _calendar(system) if args.clock == "virtual" else None
    kvm = stack.enter_context(system.open())
    return Backend(args.backend, kvm, Model(system, counts, wall_clock))


def pinned_bytes() -> int:
    """Memory of this process that its kernel keeps where it is: what it counts for RLIMIT_MEMLOCK
    (proc_pid_status(5), VmLck). A guest's pages are among it from its first touch."""
    for line in STATUS.read_text().splitlines():
        if line.startswith("VmLck:"):
            return int(line.split()[1]) << 10
    return 0


def _blame(checked: CheckedSystem | None) -> None:
    """Raises InvariantError if that is what went wrong first."""
    if checked is not None and checked.problems:
        from pkvm.check.door import InvariantError

        raise InvariantError(checked.problems)


def _calendar(system: System) -> Callable[[], int]:
    clock = system.machine.clock
    return lambda: VIRTUAL_EPOCH_NS + clock.now_ns()


@contextmanager
def _traced(path: str, tee: CountingRecorder) -> Iterator[JsonLinesRecorder]:
    """A recorder that writes to a new file at `path`. Raises OSError if it cannot be made,
    TraceError at the end if not all could be written."""
    # Imported here: only a trace needs json on the way in.
    from pkvm.trace.jsonl import JsonLinesRecorder, TraceError

    with Path(path).open("w", encoding="utf-8") as file:
        trace = JsonLinesRecorder(file, tee=tee)
        try:
            yield trace
        finally:
            try:
                with file:
                    trace.finish()
            except OSError as error:
                raise TraceError(f"{path}: the trace is not whole: {error.strerror}") from error
