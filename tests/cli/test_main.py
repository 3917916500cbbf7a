# SPDX-License-Identifier: GPL-2.0-or-later
"""The command's door: every error is one line and a status, and nobody sees a traceback."""

from __future__ import annotations

import argparse
import io
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

import pkvm
from fakes.code import POWER_OFF, SPIN, words
from pkvm.cli import info, options, status, terminal
from pkvm.cli.main import VERBS, main
from pkvm.fdt import FdtError
from pkvm.firmware.image import FirmwareImageError
from pkvm.machine.cpu.errors import EngineError
from pkvm.vmm.errors import LoadError


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pkvm: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def exits_with(code: int, *arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == code


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    exits_with(0, "--version")
    assert capsys.readouterr().out == f"pkvm {pkvm.__version__}\n"
    exits_with(0, "--help")
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)
    assert all(meaning in text for meaning in status.WORDS.values())


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_json(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    exits_with(0, verb, "--help")
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "say what to do: run, info, "),
        (["fly"], "invalid choice: 'fly'"),
        (["run", "--fly"], "unrecognized arguments: --fly"),
        (["run", "--mem", "8M"], "unrecognized arguments: --mem"),
        (["run", "--memory", "much"], "'much' is not a size such as 64M"),
        (["run", "--memory", "-1"], "argument --memory"),
        (["run", "--timeout", "0"], "not a number of seconds above 0"),
        (["run", "--timeout", "nan"], "not a number of seconds above 0"),
        (["run", "--cpus", "two"], "argument --cpus"),
        (["run", "--backend", "qemu"], "not a back-end"),
        (["info", "--clock", "lunar"], "invalid choice: 'lunar'"),
        (["ptdump", "--table", "kitchen"], "invalid choice: 'kitchen'"),
    ],
)
def test_bad_usage_is_one_line(
    arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    exits_with(status.USAGE, *arguments)
    assert what in error_line(capsys)


@pytest.mark.parametrize(
    ("error", "what", "code"),
    [
        (LoadError("the image is empty"), "the image is empty", status.USAGE),
        (FdtError("no tree"), "no tree", status.USAGE),
        (FirmwareImageError("no firmware"), "no firmware", status.USAGE),
        (EngineError("install unicorn==2.1.4"), "install unicorn==2.1.4", status.FAILED),
        (MemoryError(), "out of memory: choose less with --memory", status.FAILED),
        (OSError(12, "Cannot allocate"), "the kernel refused: Cannot allocate", status.FAILED),
        (FileNotFoundError(2, "No such file", "x.bin"), "x.bin: No such file", status.USAGE),
        (
            ModuleNotFoundError("No module named 'unicorn'", name="unicorn"),
            "pip install pkvm",
            status.FAILED,
        ),
        (
            AssertionError("two\nlines"),
            "internal error (AssertionError: two lines)",
            status.FAILED,
        ),
        (KeyboardInterrupt(), "interrupted", status.INTERRUPTED),
    ],
)
def test_every_error_is_one_line_and_a_status(
    error: BaseException,
    what: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(info, "execute", fail)
    assert main(["info"]) == code
    assert what in error_line(capsys)


def test_debug_lets_the_traceback_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: argparse.Namespace) -> int:
        raise ZeroDivisionError("for the developer")

    monkeypatch.setattr(info, "execute", fail)
    for arguments in (["--debug", "info"], ["info", "--debug"]):
        with pytest.raises(ZeroDivisionError):
            main(arguments)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("64K", 65536), ("1m", 1 << 20), ("2GiB", 2 << 30), ("3TB", 3 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert options.size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-4K", "1.5G", "0x10", "4X", "4 M", "9" * 30])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        options.size(text)


def test_a_file_that_never_ends_is_not_read_to_its_end() -> None:
    with pytest.raises(LoadError, match="/dev/zero: an image of more than 1000 bytes"):
        options.read_file("/dev/zero", "an image", 1000)


def test_a_file_takes_no_more_memory_than_it_has(tmp_path: Path) -> None:
    """A computer may have less than the largest file that is allowed."""
    path = tmp_path / "image"
    data = bytes(range(256)) * (10 << 12)
    path.write_bytes(data)
    tracemalloc.start()
    assert options.read_file(str(path), "an image") == data
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(data)
    assert options.read_file(str(path), "an image", len(data)) == data
    with pytest.raises(LoadError, match="more than"):
        options.read_file(str(path), "an image", len(data) - 1)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_only_on_a_terminal_that_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert terminal.painter(Terminal())("no", "bad") == "\x1b[31mno\x1b[0m"
    assert terminal.painter(io.StringIO())("no", "bad") == "no"
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.painter(Terminal())("no", "bad") == "no"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert terminal.painter(Terminal())("no", "bad") == "no"


def test_help_needs_neither_numpy_nor_unicorn() -> None:
    code = (
        "import sys\nfrom pkvm.cli.main import main\n"
        "try: main(['run', '--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('numpy', 'unicorn', 'elftools', 'asyncio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def pkvm_process(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "pkvm", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("arguments", ["run", "run --json", "info"])
def test_a_full_disk_is_one_line(arguments: str) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "pkvm", *arguments.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.returncode == status.FAILED
    assert done.stderr == (b"pkvm: error: the output cannot be written: No space left on device\n")


def test_streams_that_were_closed_before_do_not_matter() -> None:
    for closed in (">&-", "2>&-", "<&-"):
        command = f"{sys.executable} -m pkvm run --memory 4M {closed}"
        done = subprocess.run(command, shell=True, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (status.OK, b"")


def test_a_line_that_the_guest_left_open_is_closed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "image"
    # x1 = 0x900_0000; strb wzr+"!", [x1]; then PSCI SYSTEM_OFF
    image.write_bytes(words(0xD2A1_2001, 0x5280_0422, 0x3900_0022) + POWER_OFF)
    assert main(["run", "--unprotected", str(image)]) == status.GOT_THROUGH
    assert "\n!\n\nHow it ended" in capsys.readouterr().out


def test_a_reader_that_goes_away_ends_the_run_quietly(tmp_path: Path) -> None:
    image = tmp_path / "spin.bin"
    image.write_bytes(SPIN)
    process = pkvm_process("run", "--timeout", "20")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == status.PIPE


def test_ctrl_c_ends_a_spinning_guest_with_a_report(tmp_path: Path) -> None:
    image = tmp_path / "spin.bin"
    image.write_bytes(SPIN)
    with pkvm_process("run", str(image), "--timeout", "60") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if b"starting the payload" in line:
                break
        os.kill(process.pid, signal.SIGINT)
        report = process.stdout.read().decode()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(60) == status.INTERRUPTED
    assert "interrupted from the keyboard" in report
    assert "every attempt was refused" in report
