# SPDX-License-Identifier: GPL-2.0-or-later
"""`pkvm testbed`: a machine with a real kernel in protected mode, emulated or by way of ssh."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from pkvm.cli import bed_options, options, status, terminal
from pkvm.cli.keys import DEFAULT_ESCAPE, Command, Keys, key_name
from pkvm.cli.session import RawMode
from pkvm.testbed.base import Bed, BedError, Terminal
from pkvm.testbed.ssh import SshBed
from pkvm.testbed.store import Store
from pkvm.vmm.errors import LoadError

ACTIONS = {
    "check": "start it and say what it is (what is done if nothing is said)",
    "run": "run a command in it; its exit status is this one's",
    "shell": "a prompt in it",
    "make": "make it anew, from the newest packages",
    "clean": "remove what is kept of it in the cache",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """The verb's options, and those of its actions."""
    _add_options(parser, {})
    parser.set_defaults(action="check", put=[], get=[], timeout=None, stdin=False)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=False)
    for name, words in ACTIONS.items():
        action = actions.add_parser(name, help=words, description=words + ".")
        # An action's own options must not undo those that stand before it.
        _add_options(action, {"default": argparse.SUPPRESS})
        if name == "run":
            _add_run_options(action)


def _add_options(parser: argparse.ArgumentParser, default: dict[str, Any]) -> None:
    bed_options.add_options(parser, default)
    parser.add_argument(
        "--ssh",
        metavar="USER@HOST",
        help="use this arm64 machine instead of an emulated one",
        **default,
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, nothing else", **default
    )
    parser.add_argument(
        "--quiet", action="store_true", help="no word of what is being done", **default
    )
    parser.add_argument(
        "--log", action="store_true", help="show the kernel's log on stderr", **default
    )


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timeout", type=options.seconds, metavar="SECONDS", help="end the command after that"
    )
    parser.add_argument(
        "--stdin", action="store_true", help="hand it this command's input, when that has ended"
    )
    parser.add_argument(
        "--put",
        action="append",
        metavar="FILE[:THERE]",
        default=[],
        help="copy a file there before (may be given again)",
    )
    parser.add_argument(
        "--get",
        action="append",
        metavar="THERE[:FILE]",
        default=[],
        help="copy a file back afterwards (may be given again)",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND ...")


def execute(args: argparse.Namespace) -> int:
    """Do the action; the exit status."""
    if args.action == "run" and not args.command:
        raise LoadError("say which command to run (see pkvm testbed run --help)")
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGHUP, _terminate)
    show = bed_options.Words(quiet=args.quiet)
    if args.action in ("make", "clean"):
        if args.ssh is not None:
            raise LoadError(f"{args.action} is for emulated machines: leave --ssh out")
        store = Store()
        if args.action == "clean":
            store.clean()
            return status.OK
        store.kernel(args.kernel, show, anew=True)
        store.root(show, anew=True)
    if args.action == "shell" and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise LoadError("a shell needs a terminal: without one, run a command instead")
    files = {}
    for word in args.put:
        here, _, there = word.partition(":")
        files[there or Path(here).name] = Path(here).read_bytes()
    started = time.monotonic()
    with _bed(args, show, files) as bed:
        seconds = time.monotonic() - started
        show.done()
        if args.action == "run":
            return _run(args, bed, files)
        if args.action == "shell":
            return _shell(bed)
        return _check(args, bed, seconds)


def _bed(args: argparse.Namespace, show: Callable[[str], None], files: dict[str, bytes]) -> Bed:
    if args.ssh is not None:
        return SshBed(args.ssh, progress=show)
    on_console = _to_stderr if args.log else None
    return bed_options.emulated(args, show, files=files, on_console=on_console)


def _run(args: argparse.Namespace, bed: Bed, files: dict[str, bytes]) -> int:
    if args.ssh is not None:
        for path, data in files.items():
            bed.put(path, data)
    result = bed.run(
        args.command,
        timeout=args.timeout,
        stdin=sys.stdin.buffer.read() if args.stdin else b"",
        on_stdout=None if args.json else terminal.write,
        on_stderr=None if args.json else _to_stderr,
    )
    for word in args.get:
        there, _, here = word.partition(":")
        Path(here or Path(there).name).write_bytes(bed.get(there))
    if args.json:
        facts = {
            "status": result.status,
            "stdout": result.stdout.decode(errors="backslashreplace"),
            "stderr": result.stderr.decode(errors="backslashreplace"),
        }
        terminal.write_line(json.dumps(facts))
    return result.status


def _check(args: argparse.Namespace, bed: Bed, seconds: float) -> int:
    """Say what the bed is."""
    asked = (
        "import json, os, platform as p; print(json.dumps([p.python_version(), os.cpu_count()]))"
    )
    result = bed.run(("python3", "-c", asked), timeout=120)
    if not result.ok:
        raise BedError(f"Python fails in the test bed: {result.stderr.decode(errors='replace')}")
    python, cpus = json.loads(result.stdout)
    facts = {
        "machine": args.ssh or f"{args.qemu}, {args.cpu}",
        "kernel": bed.run(("uname", "-r"), timeout=120).stdout.decode().strip(),
        "protected_mode": True,
        "cpus": cpus,
        "python": python,
        "start_seconds": round(seconds, 2),
    }
    if args.json:
        terminal.write_line(json.dumps(facts))
        return status.OK
    for name, value in facts.items():
        words = "yes" if value is True else value
        terminal.write_line(f"{name.replace('_', ' ') + ':':<16}{words}")
    return status.OK


def _shell(bed: Bed) -> int:
    """A prompt at this terminal."""
    fd = sys.stdin.fileno()
    keys = Keys(DEFAULT_ESCAPE)
    size = os.get_terminal_size(sys.stdout.fileno())
    help_line = f"[pkvm] {key_name(DEFAULT_ESCAPE)} then q ends the test bed, as exit does"

    def read() -> bytes | None:
        typed = os.read(fd, 4096)
        if not typed:
            return None
        data = bytearray()
        for part in keys.feed(typed):
            if part is Command.QUIT:
                return None
            if isinstance(part, bytes):
                data += part
            else:
                terminal.write(f"\r\n{help_line}\r\n".encode())
        return bytes(data)

    if isinstance(bed, SshBed):
        return bed.shell(Terminal(fd, size.lines, size.columns, read, terminal.write))
    terminal.write_line(help_line)
    raw = RawMode(fd, output=True)
    try:
        return bed.shell(Terminal(fd, size.lines, size.columns, read, terminal.write))
    finally:
        raw.leave()


def _to_stderr(data: bytes) -> None:
    sys.stderr.buffer.write(data)
    sys.stderr.buffer.flush()


def _terminate(number: int, _frame: FrameType | None) -> None:
    """End by way of every `with` block."""
    raise SystemExit(128 + number)
