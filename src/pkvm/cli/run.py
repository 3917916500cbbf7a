# SPDX-License-Identifier: GPL-2.0-or-later
"""`pkvm run`: a guest as a protected VM, the host's attempts on it, and a report."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from pkvm.cli import backends, devices, guest, options, session, terminal
from pkvm.cli.report import Result, as_json, as_text
from pkvm.events import GuestExit
from pkvm.vmm.lives import Lives
from pkvm.vmm.probes import Probes
from pkvm.vmm.vmm import Moment, Outcome, Vmm

if TYPE_CHECKING:
    from pkvm.check.census import Census

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
        default=argparse.SUPPRESS,
        help="check every invariant at each exit to the host (slow)",
    )
    group.add_argument(
        "--trace",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="write every event as a JSON line",
    )
    group.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def execute(args: argparse.Namespace) -> int:
    """Run the guest and report; the exit status."""
    options.settle(args)
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
    seed = options.seed_of(args)
    pages: dict[str, Census] = {}
    pinned: dict[str, int] = {}

    def observe(moment: Moment) -> None:
        probes.attempt(lives.vmm, moment)
        if model is None:
            pinned[moment.value] = backends.pinned_bytes()
        else:
            pages[moment.value] = model.system.census()

    with ExitStack() as stack:
        stack.callback(console.close)
        backend = backends.enter(stack, args, wanted.board.ram_bytes, firmware)
        model = backend.model
        probes = Probes(
            seed=seed or 0,
            everything=args.probe_all,
            account=None if model is None else model.system.shared_by_guests,
            private=None if model is None else model.system.private_to_guests,
        )

        def make(life: int) -> Vmm:
            return Vmm(
                backend.kvm,
                guest.seeded(wanted, seed, life),
                wanted.image,
                initrd=wanted.initrd,
                protected=not args.unprotected,
                firmware=firmware if args.unprotected or args.firmware else None,
                console=console,
                source=person.take if hvc is None else None,
                plug=virtio.plug,
                observe=observe,
                wall_clock=None if model is None else model.wall_clock,
            )

        lives = stack.enter_context(Lives(make, reboot=not args.no_reboot))
        stack.callback(person.close)
        console.on_error = lives.stop
        person.start(
            arrived=lives.arrived if hvc is None else hvc.arrived,
            resized=None if hvc is None else hvc.resize,
            on_quit=lambda: lives.stop(QUIT),
            on_inspect=lambda: _inspect(wanted.board.cpus, model),
        )
        started = time.perf_counter()
        outcome = lives.run(args.timeout)
        seconds = time.perf_counter() - started
    result = Result(
        lives.vmm,
        outcome,
        seconds,
        console.text,
        probes,
        backend.name,
        None if model is None else model.counts,
        pages,
        pinned,
        lives.restarts,
        virtio.traffic(),
        virtio.faults,
        None if model is None else model.checked,
    )
    paint = terminal.painter(sys.stdout)
    terminal.write_line(as_json(result) if args.json else as_text(result, paint))
    return result.status


def _interactive(args: argparse.Namespace) -> bool:
    """Whether somebody at a terminal talks to the guest: to a kernel, or where it was asked for."""
    return not args.json and (args.console is not None or args.kernel is not None)


def _inspect(cpus: int, model: backends.Model | None) -> str:
    """What the guest is doing, in one paragraph."""
    vcpus = f"{cpus} vCPU{'s' if cpus > 1 else ''}"
    if model is None:
        return f"{vcpus}; the host's kernel keeps {backends.pinned_bytes() >> 10} KiB for the guest"
    exits = model.counts.counts(GuestExit)
    census = model.system.census()
    most = sorted(exits.items(), key=lambda item: -item[1])[:4]
    return (
        f"{vcpus}; {sum(exits.values())} exits to the host"
        f" ({', '.join(f'{reason} {times}' for reason, times in most)}); pages of the guest: "
        f"{census.guest['owned']} private, {census.guest['shared_with_host']} shared with the host"
    )
