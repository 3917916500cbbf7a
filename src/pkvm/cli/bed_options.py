# SPDX-License-Identifier: GPL-2.0-or-later
"""What the verbs that use a test bed share: the machine's options, and words of what is done."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from pkvm.cli import options
from pkvm.testbed import qemu
from pkvm.testbed.base import Listener, Progress
from pkvm.testbed.bed import TestBed
from pkvm.testbed.store import KERNEL

MIB = 1 << 20


def add_options(parser: argparse.ArgumentParser, default: dict[str, Any]) -> None:
    """The options of an emulated machine; `default` replaces the defaults of all of them."""
    group = parser.add_argument_group("emulated machine")
    machine = qemu.Machine()
    group.add_argument(
        "--kernel",
        metavar="NAME",
        help=f"a Debian series or the path of an arm64 Image (default {KERNEL})",
        **({"default": KERNEL} | default),
    )
    group.add_argument(
        "--qemu",
        metavar="PROGRAM",
        help=f"another QEMU (default {machine.program})",
        **({"default": machine.program} | default),
    )
    group.add_argument(
        "--cpu",
        metavar="MODEL",
        help=f"QEMU's CPU model (default {machine.cpu})",
        **({"default": machine.cpu} | default),
    )
    group.add_argument(
        "--smp",
        metavar="N",
        type=int,
        help=f"CPUs (default {machine.cpus})",
        **({"default": machine.cpus} | default),
    )
    group.add_argument(
        "--memory",
        metavar="SIZE",
        type=options.size,
        help=f"RAM (default {machine.memory}M)",
        **({"default": machine.memory * MIB} | default),
    )
    group.add_argument(
        "--append",
        metavar="WORDS",
        help="more for the kernel's command line",
        **({"default": ""} | default),
    )


def emulated(
    args: argparse.Namespace,
    progress: Progress,
    *,
    files: Mapping[str, bytes] | None = None,
    on_console: Listener | None = None,
) -> TestBed:
    """The machine that the options ask for, not started yet."""
    return TestBed(
        qemu.Machine(args.qemu, args.cpu, args.smp, args.memory // MIB),
        kernel=args.kernel,
        append=args.append,
        files=files,
        progress=progress,
        on_console=on_console,
    )


class Words:
    """Words on stderr of what is being done: on a terminal each in the place of the last."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._here = sys.stderr.isatty()
        self._open = False

    def __call__(self, words: str) -> None:
        """Say what comes now; a warning is said in any case, and stays."""
        if words.startswith("warning:"):
            self.done()
            print(f"pkvm: {words}", file=sys.stderr, flush=True)
        elif self._here and not self._quiet:
            print(f"\r\x1b[Kpkvm: {words}", end="", file=sys.stderr, flush=True)
            self._open = True
        elif not self._quiet:
            print(f"pkvm: {words}", file=sys.stderr, flush=True)

    def done(self) -> None:
        """No more for now."""
        if self._open:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._open = False
