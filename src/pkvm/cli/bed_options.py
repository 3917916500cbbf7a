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
from pkvm.vmm.errors import LoadError

MIB = 1 << 20
LEAST_MIB = 256
"""RAM below which the root does not fit, or leaves no room."""
_MACHINE = qemu.Machine()
DEFAULTS: dict[str, Any] = {
    "kernel": KERNEL,
    "qemu": _MACHINE.program,
    "cpu": _MACHINE.cpu,
    "smp": _MACHINE.cpus,
    "memory": _MACHINE.memory * MIB,
    "append": "",
}
"""The options of an emulated machine, as `args` has them; memory in bytes."""


def add_options(parser: argparse.ArgumentParser, default: dict[str, Any]) -> None:
    """The options of an emulated machine; `default` replaces the defaults of all of them."""
    group = parser.add_argument_group("emulated machine")
    group.add_argument(
        "--kernel",
        metavar="NAME",
        help=f"a Debian series or the path of an arm64 Image (default {KERNEL})",
        **({"default": DEFAULTS["kernel"]} | default),
    )
    group.add_argument(
        "--qemu",
        metavar="PROGRAM",
        help=f"another QEMU (default {_MACHINE.program})",
        **({"default": DEFAULTS["qemu"]} | default),
    )
    group.add_argument(
        "--cpu",
        metavar="MODEL",
        help=f"QEMU's CPU model (default {_MACHINE.cpu})",
        **({"default": DEFAULTS["cpu"]} | default),
    )
    group.add_argument(
        "--smp",
        metavar="N",
        type=int,
        help=f"CPUs (default {_MACHINE.cpus})",
        **({"default": DEFAULTS["smp"]} | default),
    )
    group.add_argument(
        "--memory",
        metavar="SIZE",
        type=options.size,
        help=f"RAM (default {_MACHINE.memory}M)",
        **({"default": DEFAULTS["memory"]} | default),
    )
    group.add_argument(
        "--append",
        metavar="WORDS",
        help="more for the kernel's command line",
        **({"default": DEFAULTS["append"]} | default),
    )


def settle(args: argparse.Namespace, *, wanted: bool) -> None:
    """Give the options that were not given (argparse.SUPPRESS) their defaults. Raises LoadError for
    one that was given where no emulated machine is `wanted`."""
    given = [name for name in DEFAULTS if hasattr(args, name)]
    if given and not wanted:
        flags = ", ".join("--" + name for name in given)
        raise LoadError(f"without --testbed there is no emulated machine for {flags}: add it")
    for name in DEFAULTS.keys() - given:
        setattr(args, name, DEFAULTS[name])


def emulated(
    args: argparse.Namespace,
    progress: Progress,
    *,
    files: Mapping[str, bytes] | None = None,
    on_console: Listener | None = None,
) -> TestBed:
    """The machine that the options ask for, not started yet. Raises LoadError for one that cannot
    be."""
    if args.smp < 1:
        raise LoadError(f"a machine with {args.smp} CPUs cannot be: choose --smp 1 or more")
    if args.memory < LEAST_MIB * MIB:
        raise LoadError(
            f"--memory of {args.memory} bytes is too little: choose {LEAST_MIB}M or more, such as "
            f"{_MACHINE.memory}M"
        )
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
