# SPDX-License-Identifier: GPL-2.0-or-later
"""Options that say what guest: its board and what is loaded, from the files that they name."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from pkvm.cli.options import read_file, seconds, size
from pkvm.vmm.board import DEFAULT_RAM_BYTES, LINUX_RAM_BYTES, PAGE_SIZE, Board
from pkvm.vmm.errors import LoadError
from pkvm.vmm.loader import Image, Segment, is_kernel_file, load_image

BOUNCE_BYTES = 32 << 20
"""The bounce pool of a protected guest with virtio devices, if it is at most a quarter of RAM."""
RNG_SEED_BYTES = 64
KASLR_SEED_BYTES = 8


class Guest(NamedTuple):
    """What is needed to make a VM of it, again and again."""

    board: Board
    image: Image
    initrd: Segment | None


def add_options(parser: argparse.ArgumentParser) -> None:
    """What kind of guest."""
    parser.add_argument(
        "image",
        nargs="?",
        metavar="IMAGE",
        help="flat AArch64 binary, ELF file or kernel (default: the demonstration)",
    )
    group = parser.add_argument_group("guest")
    group.add_argument(
        "--kernel",
        metavar="FILE",
        help="arm64 Linux kernel: Image, plain, gzipped or as an EFI zboot file",
    )
    group.add_argument("--initrd", metavar="FILE", help="the kernel's initramfs")
    group.add_argument("--append", default="", metavar="TEXT", help="kernel command line")
    group.add_argument(
        "--memory",
        type=size,
        metavar="SIZE",
        help=f"RAM (default {DEFAULT_RAM_BYTES >> 20}M, for a kernel {LINUX_RAM_BYTES >> 20}M)",
    )
    group.add_argument("--cpus", type=int, default=1, metavar="N", help="vCPUs, 1 to 8")
    group.add_argument(
        "--gic",
        action="store_true",
        help="interrupt controller and real-time clock also without a kernel",
    )
    group.add_argument(
        "--bounce",
        type=size,
        metavar="SIZE",
        help="memory through which the guest passes what its virtio devices see (default "
        f"{BOUNCE_BYTES >> 20}M for a protected guest that has any, 0 else)",
    )
    group.add_argument(
        "--unprotected", action="store_true", help="run the same guest without protection"
    )
    group.add_argument(
        "--timeout", type=seconds, metavar="S", help="stop the guest after S seconds"
    )


def load(args: argparse.Namespace, virtio_slots: Iterable[int] = ()) -> Guest:
    """The guest asked for, with devices in these slots. Raises LoadError, OSError."""
    slots = tuple(virtio_slots)
    path = args.kernel or args.image
    if args.kernel is not None and args.image is not None:
        raise LoadError("give a kernel with --kernel or an image, not both")
    data = _demonstration() if path is None else read_file(path, "an image")
    kernel = args.kernel is not None or is_kernel_file(data)
    if args.kernel is not None and not is_kernel_file(data):
        raise LoadError(
            f"{path}: not an arm64 kernel (Image, gzip or EFI zboot file); a bare program is given "
            "without --kernel"
        )
    if args.initrd is not None and not kernel:
        raise LoadError("--initrd is for a kernel: give one with --kernel")
    ram = args.memory
    if ram is None:
        ram = LINUX_RAM_BYTES if kernel else DEFAULT_RAM_BYTES
    board = Board(
        ram,
        args.cpus,
        _command_line(args, kernel=kernel),
        gic=kernel or args.gic or bool(slots),
        virtio_slots=slots,
        bounce_bytes=_bounce_bytes(args, ram, has_devices=bool(slots)),
    )
    try:
        image = load_image(data, board)
    except LoadError as error:
        raise LoadError(f"{path}: {error}") from None
    return Guest(board, image, None if args.initrd is None else _initrd(args.initrd, image, board))


def seeded(guest: Guest, seed: int | None, life: int) -> Board:
    """The guest's board with seeds for a kernel's random numbers and addresses: from this
    machine's entropy, or, to be repeated, from `seed` and the number of resets before."""
    if not guest.board.gic:
        return guest.board
    length = RNG_SEED_BYTES + KASLR_SEED_BYTES
    if seed is None:
        entropy = os.urandom(length)
    else:
        # Imported here: a bare program gets no seeds.
        import hashlib

        entropy = hashlib.shake_256(f"pkvm {seed} {life}".encode()).digest(length)
    return replace(
        guest.board,
        rng_seed=entropy[:RNG_SEED_BYTES],
        kaslr_seed=int.from_bytes(entropy[RNG_SEED_BYTES:], "big"),
    )


def _command_line(args: argparse.Namespace, *, kernel: bool) -> str:
    """What `--append` says; for a kernel that is to talk by virtio-console, that too."""
    text: str = args.append
    if kernel and getattr(args, "console", None) == "virtio" and "console=" not in text:
        text = f"{text} console=hvc0".lstrip()
    return text


def _demonstration() -> bytes:
    from pkvm import guests

    return guests.image("sharing")


def _bounce_bytes(args: argparse.Namespace, ram: int, *, has_devices: bool) -> int:
    if args.bounce is not None:
        bounce: int = args.bounce
        return bounce
    if not has_devices or args.unprotected:
        return 0
    return min(BOUNCE_BYTES, ram // 4 // PAGE_SIZE * PAGE_SIZE)


def _initrd(path: str, image: Image, board: Board) -> Segment:
    # Imported here: only a kernel has one.
    from pkvm.vmm.initrd import place_initrd

    try:
        return place_initrd(read_file(path, "an initramfs"), image, board)
    except LoadError as error:
        raise LoadError(f"{path}: {error}") from None
