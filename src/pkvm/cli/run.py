# SPDX-License-Identifier: GPL-2.0-or-later
"""`pkvm run`: a guest as a protected VM, the host's attempts on it, and a report."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pkvm.cli import devices, guest, options, session, terminal
from pkvm.cli.report import Result, as_json, as_text
from pkvm.events import GuestExit
from pkvm.trace.counting import CountingRecorder
from pkvm.vmm.lives import Lives
from pkvm.vmm.probes import Probes
from pkvm.vmm.vmm import Moment, Outcome, Vmm

if TYPE_CHECKING:
    from pkvm.check.census import Census
    from pkvm.check.door import CheckedSystem
    from pkvm.system import System
    from pkvm.trace.jsonl import JsonLinesRecorder

VIRTUAL_EPOCH_NS = 1_767_225_600 * 1_000_000_000
"""Where the calendar stands as a machine with the virtual clock starts: 2026-01-01, UTC."""
QUIT = Outcome("interrupted", "ended at the console (escape key, then q)")


def configure(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    guest.add_options(parser)
    devices.add_options(parser)
    options.add_machine_options(parser)
    session.add_options(parser)
    parser.add_argument(
        "--no-reboot",
        action="store_true",
        help="end where the guest asks for a reset; else it is started anew",
    )
    group = parser.add_argument_group("what is tried and told")
    group.add_argument(
        "--probe-all",
        action="store_true",
        help="let the host try every page, not a sample (slow)",
    )
    group.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="draws the sample of pages and a kernel's seeds (default: 0 for the pages, and with "
        "the virtual clock for both)",
    )
    group.add_argument(
        "--check",
        action="store_true",
        help="check every invariant at each exit to the host (slow)",
    )
    group.add_argument("--trace", metavar="FILE", help="write every event as a JSON line")
    group.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def execute(args: argparse.Namespace) -> int:
    """Run the guest and report; the exit status."""
    virtio = devices.Devices(args)
    with closing(virtio):
        return _run(args, virtio)


def _run(args: argparse.Namespace, virtio: devices.Devices) -> int:
    console = terminal.Console(show=not args.json)
    person = session.Session(console, interactive=_interactive(args), escape=args.escape)
    hvc = session.virtio_console(args, console, person)
    if hvc is not None:
        virtio.add(hvc)
    wanted = guest.load(args, virtio.by_slot)
    firmware = options.firmware(args)
    counting = CountingRecorder()
    seed = options.seed_of(args)
    probes = Probes(
        seed=seed or 0,
        everything=args.probe_all,
        account=lambda: system.shared_by_guests(),
        private=lambda: system.private_to_guests(),
    )
    pages: dict[str, Census] = {}

    def observe(moment: Moment) -> None:
        probes.attempt(lives.vmm, moment)
        pages[moment.value] = system.census()

    with ExitStack() as stack:
        stack.callback(console.close)
        trace = None
        if args.trace is not None:
            trace = stack.enter_context(_traced(args.trace, counting))
        system = options.make_system(
            args,
            counting if trace is None else trace,
            wanted.board.ram_bytes,
            firmware=firmware,
            check=args.check,
        )
        # After the system's end: what is broken breaks more when the rest is taken apart.
        stack.callback(_blame, system.checked)
        stack.callback(system.close)
        if trace is not None:
            trace.now_ns = system.machine.clock.now_ns
        kvm = stack.enter_context(system.open())

        def make(life: int) -> Vmm:
            return Vmm(
                kvm,
                guest.seeded(wanted, seed, life),
                wanted.image,
                initrd=wanted.initrd,
                protected=not args.unprotected,
                firmware=firmware if args.unprotected or args.firmware else None,
                console=console,
                source=person.take if hvc is None else None,
                plug=virtio.plug,
                observe=observe,
                wall_clock=_calendar(system) if args.clock == "virtual" else None,
            )

        lives = stack.enter_context(Lives(make, reboot=not args.no_reboot))
        stack.callback(person.close)
        console.on_error = lives.stop
        person.start(
            arrived=lives.arrived if hvc is None else hvc.arrived,
            resized=None if hvc is None else hvc.resize,
            on_quit=lambda: lives.stop(QUIT),
            on_inspect=lambda: _inspect(wanted.board.cpus, system, counting),
        )
        started = time.perf_counter()
        outcome = lives.run(args.timeout)
        seconds = time.perf_counter() - started
    result = Result(
        lives.vmm,
        outcome,
        seconds,
        console.text,
        pages,
        counting,
        probes,
        lives.restarts,
        virtio.traffic(),
        virtio.faults,
        args.dialect,
        None if system.checked is None else (system.checked.exits, system.checked.transitions),
    )
    paint = terminal.painter(sys.stdout)
    terminal.write_line(as_json(result) if args.json else as_text(result, paint))
    return result.status


def _blame(checked: CheckedSystem | None) -> None:
    """Raises InvariantError if that is what went wrong first."""
    if checked is not None and checked.problems:
        from pkvm.check.door import InvariantError

        raise InvariantError(checked.problems)


def _calendar(system: System) -> Callable[[], int]:
    """The time since the Epoch by the machine's clock, in nanoseconds."""
    clock = system.machine.clock
    return lambda: VIRTUAL_EPOCH_NS + clock.now_ns()


def _interactive(args: argparse.Namespace) -> bool:
    """Whether somebody at a terminal talks to the guest: to a kernel, or where it was asked for."""
    return not args.json and (args.console is not None or args.kernel is not None)


def _inspect(cpus: int, system: System, counting: CountingRecorder) -> str:
    """What the guest is doing, in one paragraph."""
    exits = counting.counts(GuestExit)
    census = system.census()
    most = sorted(exits.items(), key=lambda item: -item[1])[:4]
    return (
        f"{cpus} vCPU{'s' if cpus > 1 else ''}; {sum(exits.values())} exits to the host"
        f" ({', '.join(f'{reason} {times}' for reason, times in most)}); pages of the guest: "
        f"{census.guest['owned']} private, {census.guest['shared_with_host']} shared with the host"
    )


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
