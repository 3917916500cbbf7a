# SPDX-License-Identifier: GPL-2.0-or-later
"""Options that verbs share: the machine; sizes, times and files."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkvm.firmware import image as firmware_image
from pkvm.uapi.dialects import DEFAULT, DIALECTS
from pkvm.vmm.board import FIRMWARE_BYTES
from pkvm.vmm.errors import LoadError

if TYPE_CHECKING:
    from pkvm.events import Recorder
    from pkvm.system import System

MODEL = "model"
"""The back-end that is the built-in machine."""
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
CPU_MODELS = ("cortex-a72", "max")
HOST_BYTES = 32 << 20
"""What the machine has beside the guest's memory: the host's own pages and EL2's carve-out."""
STEP_BYTES = 2 << 20
MODEL_DEFAULTS: dict[str, Any] = {
    "dialect": DEFAULT,
    "memlock": None,
    "firmware": None,
    "host_dtb": None,
    "kvm_mode": "protected",
    "cpu_model": CPU_MODELS[0],
    "clock": "real",
    "check": False,
    "trace": None,
    "features": False,
}
"""Options of the built-in machine, by the names under which argparse keeps them. They are not there
unless they were given, so that another back-end need not ignore one in silence."""
FILE_LIMIT = 1 << 30
"""Largest file that is read."""
PART_BYTES = 4 << 20
"""Read at a time."""


def size(text: str) -> int:
    """Bytes: a number, with K, M, G or T for powers of 1024 ("64M")."""
    match = re.fullmatch(r"(\d{1,20})([KMGT]?)(i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 64M")
    return int(match[1]) << _UNITS[match[2].upper()]


def seconds(text: str) -> float:
    """A positive, finite number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def backend(text: str) -> str:
    """ "model", or the path of a device."""
    if text == MODEL or text.startswith("/"):
        return text
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a back-end: there are {MODEL} and devices such as /dev/kvm"
    )


def device(text: str) -> str:
    """The path of a kernel's device."""
    if text.startswith("/"):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not a device such as /dev/kvm")


def write_file(path: str, text: str) -> None:
    """Write a file of text. Raises OSError with the file's name."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        # Python leaves the name out where it is the writing that fails.
        raise OSError(error.errno, error.strerror, path) from error


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """What kind of machine. `settle` gives those that are not there their defaults."""
    group = parser.add_argument_group(
        "machine", "All but --backend are of the built-in one.", argument_default=argparse.SUPPRESS
    )
    group.add_argument(
        "--backend",
        type=backend,
        default=MODEL,
        metavar="NAME",
        help=f"{MODEL}, the built-in machine (the default), or a device of this computer's kernel "
        "such as /dev/kvm, on an arm64 host in protected mode",
    )
    group.add_argument(
        "--dialect",
        choices=tuple(DIALECTS),
        help="what protected KVM the host speaks: the mail of 2021, Android's or Linux's own "
        f"(default {DEFAULT})",
    )
    group.add_argument(
        "--memlock",
        type=size,
        metavar="SIZE",
        help="RLIMIT_MEMLOCK of the VMM, for which a protected guest's pages count in the dialects "
        "android and upstream (default: unlimited)",
    )
    group.add_argument(
        "--firmware",
        metavar="FILE",
        help="guest firmware of the host, a flat binary of up to 2M; in the dialect android a "
        "guest starts in firmware only if it is named here, and upstream has none",
    )
    group.add_argument(
        "--host-dtb", metavar="FILE", help="device tree that the host's boot firmware hands over"
    )
    group.add_argument(
        "--kvm-mode",
        choices=("protected", "nvhe"),
        help="how the host boots, as kvm-arm.mode= of a kernel",
    )
    group.add_argument(
        "--cpu-model",
        "--cpu",
        dest="cpu_model",
        choices=CPU_MODELS,
        help=f"the machine's CPU (default {CPU_MODELS[0]})",
    )
    group.add_argument(
        "--clock", choices=("real", "virtual"), help="the machine's clock (default real)"
    )
    group.add_argument(
        "--virtual-clock",
        dest="clock",
        action="store_const",
        const="virtual",
        help="the same as --clock virtual: a run repeats exactly",
    )


def settle(args: argparse.Namespace) -> None:
    """Give the built-in machine's options that were not given their defaults. Raises LoadError for
    one that was given with another back-end."""
    given = [name for name in MODEL_DEFAULTS if hasattr(args, name)]
    if args.backend != MODEL:
        if getattr(args, "unprotected", False):
            given = [name for name in given if name != "firmware"]
        if given:
            flags = ", ".join("--" + name.replace("_", "-") for name in given)
            raise LoadError(
                f"{args.backend} is a kernel of its own, and {flags} of the built-in machine: "
                "leave one or the other out"
            )
    for name in MODEL_DEFAULTS.keys() - given:
        setattr(args, name, MODEL_DEFAULTS[name])


def need_model(args: argparse.Namespace, verb: str) -> None:
    """Raises LoadError where a verb that looks into the built-in machine has another back-end."""
    if args.backend != MODEL:
        raise LoadError(
            f"pkvm {verb} looks into the built-in machine, and {args.backend} is none: leave "
            "--backend out"
        )


def read_file(path: str, what: str, limit: int = FILE_LIMIT) -> bytes:
    """The bytes of a file. Raises OSError, LoadError if it has more than `limit` bytes."""
    parts, room = [], limit + 1
    with Path(path).open("rb") as file:
        # Not all at once: Python would make room for `limit` bytes first.
        while part := file.read(min(PART_BYTES, room)):
            parts.append(part)
            room -= len(part)
    if not room:
        raise LoadError(f"{path}: {what} of more than {limit} bytes cannot be used")
    return b"".join(parts)


def firmware(args: argparse.Namespace) -> bytes:
    """The guest firmware: the file named, or the one that ships. Raises LoadError, OSError,
    FirmwareImageError."""
    if args.firmware is None:
        return firmware_image.builtin()
    return firmware_image.check(read_file(args.firmware, "a firmware image", 2 * FIRMWARE_BYTES))


def seed_of(args: argparse.Namespace) -> int | None:
    """The seed of everything random in a run that is to be repeated; None if it is not: then the
    machine's entropy is used."""
    seed: int | None = args.seed
    return 0 if seed is None and args.clock == "virtual" else seed


def make_system(
    args: argparse.Namespace, recorder: Recorder, guest_bytes: int, **options: Any
) -> System:
    """The machine with its EL2 and its host, large enough for a guest of `guest_bytes`. Raises
    LoadError for what cannot be, OSError, EngineError, MemoryError."""
    from pkvm.system import System

    host_dtb = None
    if args.host_dtb is not None:
        host_dtb = read_file(args.host_dtb, "a device tree", 4 << 20)
    total = guest_bytes + FIRMWARE_BYTES + HOST_BYTES + guest_bytes // 64
    try:
        return System(
            memory=-(-total // STEP_BYTES) * STEP_BYTES,
            protected=args.kvm_mode == "protected",
            host_dtb=host_dtb,
            cpu_model=args.cpu_model,
            clock=args.clock,
            recorder=recorder,
            dialect=args.dialect,
            memlock=args.memlock,
            **options,
        )
    except ValueError as error:
        raise LoadError(f"such a machine cannot be: {error}") from error
