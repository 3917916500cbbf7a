# SPDX-License-Identifier: GPL-2.0-or-later
"""The console of `pkvm run`: at a real pseudo-terminal, and with pipes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.code import ECHO
from fakes.pty_child import PATIENCE_S, PtyChild
from pkvm.cli import status
from pkvm.cli.session import LineEnds


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """`pkvm run` of a guest that prints '>' and then what it receives, up to Ctrl-D."""
    path = tmp_path / "echo"
    path.write_bytes(ECHO)
    return ["-m", "pkvm", "run", str(path), "--console", "pl011"]


@pytest.fixture
def terminal(command: list[str]) -> Iterator[PtyChild]:
    with PtyChild(command) as child:
        child.expect(rb"\[pkvm\] Ctrl-\] then \?.*>")
        yield child


def test_keys_go_to_the_guest_and_its_output_comes_unchanged(terminal: PtyChild) -> None:
    assert terminal.is_raw()
    # Ctrl-C, Ctrl-Z, Ctrl-\, Ctrl-S, carriage return: a cooked terminal would act on them.
    terminal.press(b"a\x03\x1a\x1c\x13\r\x7f\xc3\xa9b")
    terminal.expect(rb"a\x03\x1a\x1c\x13\r\x7f\xc3\xa9b")
    terminal.press(b"\x04")
    assert terminal.wait() == status.OK
    assert b"the guest powered off" in terminal.seen
    assert terminal.attributes() == terminal.before


def test_a_bare_line_feed_starts_a_line_until_the_guest_sends_pairs(terminal: PtyChild) -> None:
    assert b"RAM 0x40000000" in terminal.seen
    assert terminal.seen.count(b"\n") == terminal.seen.count(b"\r\n")
    terminal.press(b"x\ny\r\nz\nw")
    terminal.expect(rb"x\r\ny\r\nz\nw")


def test_escape_key(terminal: PtyChild) -> None:
    terminal.press(b"\x1d?")
    terminal.expect(rb"\r\n\[pkvm\] Ctrl-\] q quits.*sends Ctrl-\] to the guest\r\n")
    terminal.press(b"\x1di")
    inspected = terminal.expect(rb"1 vCPU; (\d+) exits .* (\d+) private, 0 shared .*\r\n")
    assert int(inspected[1]) > 10
    assert int(inspected[2]) == (16 + 2) * 256
    terminal.press(b"(\x1d\x1d)")
    terminal.expect(rb"\(\x1d\)")
    terminal.press(b"\x1dq")
    assert terminal.wait() == status.INTERRUPTED
    assert b"ended at the console" in terminal.seen
    assert terminal.attributes() == terminal.before


def test_another_escape_key(command: list[str]) -> None:
    with PtyChild([*command, "--escape", "^a"]) as child:
        child.expect(rb"Ctrl-A then \?.*>")
        child.press(b"\x1d\x01\x01;")
        child.expect(rb"\x1d\x01;")
        child.press(b"\x01q")
        assert child.wait() == status.INTERRUPTED


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_terminal_is_restored_after_a_signal(terminal: PtyChild, number: int) -> None:
    terminal.process.send_signal(number)
    assert terminal.wait() == 128 + number
    assert terminal.attributes() == terminal.before


def test_the_terminal_is_restored_after_the_time_limit(command: list[str]) -> None:
    with PtyChild([*command, "--timeout", "0.5"]) as child:
        child.expect(rb"\[pkvm\]")
        assert child.wait() == status.TIMEOUT
        assert child.attributes() == child.before


def test_the_terminal_is_restored_when_stdout_goes_away(command: list[str]) -> None:
    read, write = os.pipe()
    with PtyChild(command, stdout=write) as child:
        os.close(write)
        while b">" not in os.read(read, 4096):
            pass
        assert child.is_raw()
        os.close(read)
        child.press(b"x")
        assert child.wait() == status.PIPE
        assert child.attributes() == child.before
        assert b"Traceback" not in child.seen


def test_the_mode_comes_back_after_a_stop(terminal: PtyChild) -> None:
    terminal.process.send_signal(signal.SIGSTOP)
    os.waitpid(terminal.process.pid, os.WUNTRACED)
    termios.tcsetattr(terminal.slave, termios.TCSANOW, terminal.before)
    assert not terminal.is_raw()
    terminal.process.send_signal(signal.SIGCONT)
    end = time.monotonic() + PATIENCE_S
    while not terminal.is_raw():
        assert time.monotonic() < end
    terminal.press(b"\x1d?")
    terminal.expect(rb"Ctrl-\] q quits")


def test_a_terminal_that_is_not_ours_stays_as_it_is(command: list[str]) -> None:
    with PtyChild(command, controlling=False) as child:
        child.expect(rb">")
        assert child.attributes() == child.before
        child.press(b"line\n")
        child.expect(rb"line\r\n.*line\r\n")


@pytest.mark.parametrize("also", [(), ("--json",)])
def test_all_of_a_pipe_reaches_the_guest(command: list[str], also: tuple[str, ...]) -> None:
    # More than is kept for the guest at a time; the escape key is a byte like any other.
    data = b"".join(b"%d\x1dq," % n for n in range(2000)) + b"\x04"
    ended = subprocess.run(
        [sys.executable, *command, *also], input=data, capture_output=True, timeout=PATIENCE_S
    )
    assert ended.returncode == status.OK
    assert ended.stderr == b""
    text = ended.stdout.replace(b"\\u001d", b"\x1d").replace(b"\\u0004", b"\x04")
    assert b">" + data in text


def test_the_end_of_a_pipe_is_not_the_end_of_the_run(command: list[str]) -> None:
    with subprocess.Popen(
        [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"<end>")
        child.stdin.close()
        seen = b""
        while b"<end>" not in seen:
            seen += os.read(child.stdout.fileno(), 4096)
        child.send_signal(signal.SIGTERM)
        assert child.wait(PATIENCE_S) == 128 + signal.SIGTERM


@pytest.mark.parametrize("closing", ["<&-", "</dev/null"])
def test_without_stdin(command: list[str], closing: str) -> None:
    ended = subprocess.run(
        ["sh", "-c", f'exec "$@" {closing}', "sh", sys.executable, *command, "--timeout", "0.5"],
        capture_output=True,
        timeout=PATIENCE_S,
    )
    assert ended.returncode == status.TIMEOUT
    assert ended.stderr == b""


_SIZES = """
import signal
from pkvm.cli.session import Session
from pkvm.cli.terminal import Console, write_line
session = Session(Console(show=True), interactive=True)
session.start(resized=lambda columns, rows: write_line(f"size {columns} {rows};"))
while session.take(1) != b"e":
    signal.sigtimedwait([], 0.01)
session.close()
"""


def test_changes_of_the_size_are_told() -> None:
    with PtyChild(["-c", _SIZES]) as child:
        child.expect(rb"size 80 24;")
        child.set_size(132, 43)
        child.expect(rb"size 132 43;")
        child.press(b"e")
        assert child.wait() == 0


def test_line_ends_of_a_system_that_knows_terminals_are_left_alone() -> None:
    ends = LineEnds()
    assert [ends(part) for part in (b"a\nb", b"\n", b"c\r", b"\n", b"d\n")] == [
        b"a\r\nb", b"\r\n", b"c\r", b"\n", b"d\n",
    ]  # fmt: skip
