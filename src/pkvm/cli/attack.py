# SPDX-License-Identifier: GPL-2.0-or-later
"""`pkvm attack`: the attacker's tour of a running protected Linux guest."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pkvm.check.attacks import NAMES, attack
from pkvm.check.attacks.linux import GuestError
from pkvm.check.attacks.tour import End, Material, Verdict, tour, weakened_twin
from pkvm.cli import status, terminal
from pkvm.cli.options import read_file
from pkvm.testbed import initramfs
from pkvm.testbed.debian import DebianError, Packages
from pkvm.vmm.errors import LoadError
from pkvm.vmm.loader import is_kernel_file

SERIES = "7.3"
"""The Debian kernel that is fetched if none is named."""


def configure(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument(
        "attacks", nargs="*", metavar="ATTACK", help="try these alone (default: all; see --list)"
    )
    parser.add_argument("--list", action="store_true", help="list the attacks and end")
    parser.add_argument(
        "--weakened",
        action="store_true",
        help="take away the guard in the way of each attack, which must then get through",
    )
    group = parser.add_argument_group("guest")
    group.add_argument(
        "--kernel",
        metavar="FILE",
        help=f"arm64 Linux kernel (default: Debian's stock {SERIES}, fetched once)",
    )
    group.add_argument(
        "--initrd",
        metavar="FILE",
        help="its initramfs: a shell on the console, as `python -m pkvm.testbed.initramfs` makes "
        "(default)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def execute(args: argparse.Namespace) -> int:
    """Let the attacks try and tell; 0 if each came to what it had to."""
    unknown = [name for name in args.attacks if name not in NAMES]
    if unknown:
        return _complain(f"there is no attack {unknown[0]!r}; --list lists them", status.USAGE)
    if args.list:
        terminal.write_line(_listed_facts() if args.json else _listed())
        return status.OK
    names = args.attacks or NAMES
    verdicts: list[Verdict] = []
    try:
        material = _material(args)
        for verdict in _verdicts(names, material, weak=args.weakened, quiet=args.json):
            verdicts.append(verdict)
            if not args.json:
                terminal.write_line(_told(verdict, terminal.painter(sys.stdout)))
    except (GuestError, DebianError) as error:
        return _complain(str(error), status.FAILED)
    as_it_must_be = (End.THROUGH, End.HARM) if args.weakened else (End.REFUSED,)
    wrong = [verdict.name for verdict in verdicts if verdict.end not in as_it_must_be]
    if args.json:
        facts = {
            "weakened": args.weakened,
            "holds": not wrong,
            "attacks": [_facts(verdict) for verdict in verdicts],
        }
        terminal.write_line(json.dumps(facts))
    else:
        terminal.write_line(_summary(len(verdicts), wrong, weakened=args.weakened))
    if not wrong:
        return status.OK
    return status.FAILED if args.weakened else status.GOT_THROUGH


def _material(args: argparse.Namespace) -> Material:
    """The guest's files. Raises DebianError, LoadError, OSError."""
    packages = Packages()
    kernel = str(args.kernel or packages.kernel(SERIES))
    data = read_file(kernel, "a kernel")
    if not is_kernel_file(data):
        raise LoadError(f"{kernel}: not an arm64 kernel (Image, gzip or EFI zboot file)")
    initrd = args.initrd or initramfs.cached(packages.busybox())
    return Material(data, read_file(str(initrd), "an initramfs"))


def _verdicts(
    names: Sequence[str], material: Material, *, weak: bool, quiet: bool
) -> Iterator[Verdict]:
    def started(name: str) -> None:
        if not quiet and sys.stderr.isatty():
            print(f"\r\x1b[K{name} ...\r", end="", file=sys.stderr, flush=True)

    if not weak:
        yield from tour(names, material, started)
        return
    for name in names:
        started(name)
        yield weakened_twin(name, material)


def _listed() -> str:
    width = max(map(len, NAMES))
    return "\n".join(f"{name:<{width}}  {attack(name).TRIES}" for name in NAMES)


def _listed_facts() -> str:
    return json.dumps([{"name": name, "tries": attack(name).TRIES} for name in NAMES])


def _told(verdict: Verdict, paint: Callable[[str, str], str]) -> str:
    """A verdict as a paragraph."""
    style = "good" if verdict.end is End.REFUSED else "bad"
    lines = [f"{paint(verdict.end.value, style):<10} {verdict.name}: {verdict.tries}"]
    lines.append(f"           {verdict.words}")
    lines += [f"           {place.file}:{place.line}: {place.check}" for place in verdict.places]
    lines.append(f"           guard: {verdict.guard}")
    if verdict.whole is not None:
        lines.append(f"           the guest's data is {'' if verdict.whole else 'not '}whole")
    return "\n".join(lines)


def _summary(count: int, wrong: Sequence[str], *, weakened: bool) -> str:
    if weakened:
        said = f"{count - len(wrong)} of {count} attacks got through without their guards"
    else:
        said = f"{count - len(wrong)} of {count} attacks refused"
    return said + (f"; not so: {', '.join(wrong)}" if wrong else "")


def _facts(verdict: Verdict) -> dict[str, Any]:
    return {
        "name": verdict.name,
        "tries": verdict.tries,
        "guard": verdict.guard,
        "end": verdict.end.value,
        "words": verdict.words,
        "places": [place._asdict() for place in verdict.places],
        "whole": verdict.whole,
    }


def _complain(text: str, exit_status: int) -> int:
    print(f"pkvm: error: {' '.join(text.split())}", file=sys.stderr)
    return exit_status
