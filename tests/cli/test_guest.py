# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernels on the command line: what is loaded, what is refused, and what a reset does."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fakes.code import POWER_OFF, RESET
from fakes.kernels import cpio, image, program, zboot, zstd
from pkvm.cli import guest, status
from pkvm.cli.main import Parser, main
from pkvm.vmm.board import Board

Write = Callable[[str, bytes], str]
HELLO = program("hello", image_size=3 << 20)
INITRD = gzip.compress(cpio({"init": b"#!/bin/sh\n"}))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, data: bytes) -> str:
        path = tmp_path / name
        path.write_bytes(data)
        return str(path)

    return write


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["run", "--json", "--timeout", "60", *arguments])
    captured = capsys.readouterr()
    assert captured.err == ""
    return code, json.loads(captured.out)


def load(*arguments: str, slots: tuple[int, ...] = ()) -> guest.Guest:
    parser = Parser()
    guest.add_options(parser)
    return guest.load(parser.parse_args(arguments), slots)


@pytest.mark.parametrize(
    "kernel",
    [HELLO, gzip.compress(HELLO), zboot(gzip.compress(HELLO), b"gzip"),
     zboot(zstd(HELLO), b"zstd", len(HELLO))],
    ids=["plain", "gzip", "zboot gzip", "zboot zstd"],
)  # fmt: skip
def test_a_kernel_is_entered_through_the_firmware(
    kernel: bytes, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = run_json(
        capsys, "--kernel", write("vmlinuz", kernel), "--initrd", write("initrd", INITRD),
        "--append", "console=ttyAMA0 hello",
    )  # fmt: skip
    assert (code, report["outcome"], report["restarts"]) == (status.OK, "powered-off", 0)
    assert "RAM 0x40000000, 256 MiB" in report["console"]
    assert "  payload 0x40200000, 3145728 bytes, entry 0x40200000\n" in report["console"]
    assert f"  initramfs 0x40600000, {len(INITRD)} bytes\n" in report["console"]
    assert "hello: arguments: console=ttyAMA0 hello\n" in report["console"]
    assert report["host_probes"]["tried"] == report["host_probes"]["refused"] > 0


def test_a_kernel_as_the_image_is_a_kernel(write: Write) -> None:
    path = write("vmlinuz", HELLO)
    assert load(path) == load("--kernel", path)
    assert load(path).board.gic


def test_defaults_of_a_bare_program_are_as_ever(write: Write) -> None:
    assert load().board == Board()
    assert load(write("flat", POWER_OFF)).board == Board()
    assert guest.seeded(load(), None, 0) == Board()
    assert load("--gic").board == Board(gic=True)


def test_a_bounce_pool_is_there_for_devices_of_a_protected_guest(write: Write) -> None:
    path = write("vmlinuz", HELLO)
    assert load(path).board.bounce_bytes == 0
    assert load(path, slots=(0, 1)).board.bounce_bytes == 32 << 20
    assert load(path, "--memory", "64M", slots=(0,)).board.bounce_bytes == 16 << 20
    assert load(path, "--unprotected", slots=(0,)).board.bounce_bytes == 0
    assert load(path, "--bounce", "8M").board.bounce_bytes == 8 << 20
    assert load(path, "--bounce", "0", slots=(0,)).board.bounce_bytes == 0
    assert load(slots=(3,)).board.gic


def test_seeds_repeat_for_a_seed_and_a_life_and_are_new_else(write: Write) -> None:
    wanted = load(write("vmlinuz", HELLO))
    boards = [guest.seeded(wanted, *key) for key in ((1, 0), (1, 0), (1, 1), (2, 0))]
    seeds = [(board.rng_seed, board.kaslr_seed) for board in boards]
    assert seeds[0] == seeds[1]
    assert len(set(seeds)) == 3
    assert guest.seeded(wanted, None, 0) != guest.seeded(wanted, None, 0)
    assert all(len(rng) == 64 for rng, _ in seeds)


@pytest.mark.parametrize("what", ["--kernel", "--initrd"])
@pytest.mark.parametrize(
    ("path", "line"), [("/nonexistent", "No such file"), ("/", "Is a directory")]
)
def test_unreadable_files_are_refused_in_one_line(
    what: str, path: str, line: str, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    other = [] if what == "--kernel" else ["--kernel", write("vmlinuz", HELLO)]
    assert main(["run", *other, what, path]) == status.USAGE
    assert capsys.readouterr().err.startswith(f"pkvm: error: {path}: {line}")


@pytest.mark.parametrize(
    ("kernel", "initrd", "options", "words"),
    [
        (b"", None, (), "vmlinuz: not an arm64 kernel"),
        (b"\x7fELF" + bytes(100), None, (), "not an arm64 kernel"),
        (POWER_OFF, None, (), "given without --kernel"),
        (gzip.compress(HELLO)[:-100], None, (), "vmlinuz: the gzip data is truncated"),
        (image(image_size=255 << 20), None, (), "more with --memory"),
        (image(flags=1), None, (), "big-endian"),
        (HELLO, b"", (), "initrd: the initramfs is empty"),
        (HELLO, b"rubbish", (), "initrd: the initramfs is neither"),
        (HELLO, INITRD[:-3], (), "initrd: the gzip data is truncated"),
        (HELLO, INITRD + bytes(4 << 20), ("--memory", "8M"), "room for 2097152"),
        (HELLO, None, ("--memory", "2M"), "between 4M and"),
        (HELLO, None, ("--bounce", "1K"), "bounce pool"),
        (HELLO, None, ("image-as-well",), "not both"),
        (HELLO, None, ("--cpus", "9"), "1 to 8"),
    ],
)
def test_bad_kernels_and_initramfs_are_refused_in_one_line(
    kernel: bytes,
    initrd: bytes | None,
    options: tuple[str, ...],
    words: str,
    write: Write,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--kernel", write("vmlinuz", kernel), *options]
    if initrd is not None:
        arguments += ["--initrd", write("initrd", initrd)]
    assert main(["run", *arguments]) == status.USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert words in captured.err


def test_an_initramfs_needs_a_kernel(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--initrd", write("initrd", INITRD)]) == status.USAGE
    assert "--initrd is for a kernel" in capsys.readouterr().err


def test_a_reset_starts_the_guest_anew(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write("reset", RESET)
    code = main(["run", "--json", path, "--timeout", "1.5"])
    report = json.loads(capsys.readouterr().out)
    assert (code, report["outcome"]) == (status.TIMEOUT, "timeout")
    assert report["restarts"] > 1
    assert report["console"].count("firmware: entered at 0x0") >= report["restarts"]
    assert report["detail"] == "the guest still ran after 1.5 seconds"
    assert f"was started again {report['restarts']} times" in report["notes"][0]
    assert report["hypercalls"]["SYSTEM_RESET"] >= report["restarts"]


def test_no_reboot_ends_at_a_reset(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = run_json(capsys, write("reset", RESET), "--no-reboot")
    assert (code, report["outcome"], report["restarts"]) == (status.FAILED, "reset", 0)


def test_with_the_virtual_clock_a_kernels_seeds_repeat(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write("vmlinuz", HELLO)
    traces = [tmp_path / name for name in ("one", "two", "other")]
    for trace, seed in zip(traces, ("7", "7", "8"), strict=True):
        code, _ = run_json(
            capsys, "--kernel", path, "--memory", "16M", "--virtual-clock", "--seed", seed,
            "--trace", str(trace),
        )  # fmt: skip
        assert code == status.OK
    assert traces[0].read_bytes() == traces[1].read_bytes()
    assert traces[0].read_bytes() != traces[2].read_bytes()


def test_ptdump_of_a_kernel(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--kernel", write("vmlinuz", HELLO), "--memory", "16M", "--table", "guest"]
    assert main(["ptdump", "--at", "end", *arguments]) == status.OK
    assert "guest 0x1000" in capsys.readouterr().out
